r"""Gauss-Newton steps on the numbers of a `FittedSolver`.

The Jacobian comes from finite differences, a walk from the changed step on for each number. So no gradient goes through
the network, and any function can be fitted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsde.batching import select_rows
from fastsde.fitting.grids import starts, walkable
from fastsde.fitting.kept import Kept
from fastsde.fitting.pilots import ENERGY, ON_PATH, Pilots, Walked
from fastsde.fitting.price import STARTS, numbers_of
from fastsde.solvers.fitted import FittedSolver, Row
from fastsde.types import Carry

_ITERATIONS, _LEAST_GAIN = 10, 0.01
"""Steps at most. One that mends a smaller share of the error is the last."""
_DAMPING, _CHANGE, _FARTHEST = 1e-3, 0.02, 0.4
"""Of Gauss-Newton; the change for a difference, in units of the noise or of half the log-SNR; the longest move of a
level, in half the log-SNR."""


class Fit:
    """The fit for one number of levels."""

    def __init__(self, pilot: Pilots, levels: int, default: Walked, until: float, kept: Kept | None) -> None:
        self.pilot, self.levels, self.default, self.until, self.kept = pilot, levels, default, until, kept
        self.path, self.last, self.turns = list[dict[str, float]](), 0, 0

    def run(self) -> Fit:
        """Finds the best start, steps from there, and leaves in `best` what is best."""
        pilot = self.pilot
        now, value, mu = self._start()
        best, least = now, pilot.error(now.x)
        last = self.last
        for turn in range(_ITERATIONS):
            self.path.append({"cost": pilot.cost, "error": pilot.relative(now.x)})
            if pilot.cost + last > self.until:
                break
            before = pilot.cost
            stepped = self._step(now, value, mu)
            last = pilot.cost - before
            if stepped is None:
                break
            gained, (now, value, mu) = 1 - stepped[1] / value, stepped
            if (error := pilot.error(now.x)) < least:
                best, least = now, error
            if gained < _LEAST_GAIN and turn:
                break
        self._judge(best)
        return self

    def _start(self) -> tuple[Walked, float, float]:
        """A step on all pilots from the grid that is best on a few, or from that of the default: the better one."""
        pilot = self.pilot
        solvers = starts(pilot, self.levels)
        if (past := self._past("grids")) is not None:
            first, cost = past
            pilot.resume(cost)
        else:
            first = {
                name: float(pilot.root_errors(pilot.walked(solver, pilot.scouts).x, pilot.scouts).mean())
                for name, solver in solvers.items()
            }
            self._put("grids", first)
        found, before = list[tuple[str, Walked, float, float]](), pilot.cost
        ranked = sorted(first, key=lambda name: first[name])
        # Few pilots say nothing of rare hard samples. For these the default's grid is not much worse. So it is a start:
        # the last of that name, which has a guess if there is one.
        own = [name for name in solvers if name.startswith("default")][-1:]
        for name in list(dict.fromkeys([ranked[0], *own, *ranked]))[:STARTS]:
            if found and pilot.cost + (pilot.cost - before) > self.until:
                break
            before = pilot.cost
            walked = pilot.walked(solvers[name])
            value = pilot.objective(walked)
            stepped = self._step(walked, value, _DAMPING) if math.isfinite(value) else None
            found.append((name, *(stepped or (walked, value, _DAMPING))))
            self.last = pilot.cost - before
        self.name, walked, value, mu = min(found, key=lambda entry: (pilot.error(entry[1].x), entry[2]))
        if not math.isfinite(value):
            raise RuntimeError("pilot samples are not finite at the levels of any grid: the network returned NaN.")
        return walked, value, mu

    def _past(self, part: str) -> tuple[Any, int] | None:
        """What came of a part of an interrupted fit, and the price up to there."""
        return None if self.kept is None else self.kept.done.get(f"{self.levels} calls, {part}")

    def _put(self, part: str, value: Any) -> None:
        """Keeps what came of a part, in types that JSON has."""
        if self.kept is not None:
            self.kept.put(f"{self.levels} calls, {part}", (value, self.pilot.cost))

    def _step(self, now: Walked, value: float, mu: float) -> tuple[Walked, float, float] | None:
        """A Gauss-Newton step that lowers the objective, with its damping; None if none does."""
        self.turns += 1
        part = f"step {self.turns}"
        if (past := self._past(part)) is None:
            found = self._lower(now, value, mu)
            # The guess is that of the pilots, and may be long.
            kept = found and (dataclasses.replace(found[0].solver, guess=()).as_json(), found[2])
            self._put(part, kept)
            return found
        kept, cost = past
        if kept is None:
            after = None
        else:
            walked = self.pilot.walked(dataclasses.replace(FittedSolver.from_json(kept[0]), guess=now.solver.guess))
            after = walked, self.pilot.objective(walked), kept[1]
        self.pilot.resume(cost)
        return after

    def _lower(self, now: Walked, value: float, mu: float) -> tuple[Walked, float, float] | None:
        """The step without the file."""
        matrix, vector, scale = self._normal_equations(now)
        for _ in range(6):
            move = torch.linalg.solve(matrix + mu * torch.eye(len(matrix), dtype=torch.float64), vector) / scale
            moved = self._moved(now.solver, move.tolist())
            if moved is not None:
                after = self.pilot.walked(moved)
                better = self.pilot.objective(after)
                if better < value:
                    return after, better, max(mu / 10, 1e-6)
            mu *= 10
        return None

    def _moved(self, solver: FittedSolver, move: Sequence[float]) -> FittedSolver | None:
        """The solver with its numbers moved; None if they are not finite, or levels out of order."""
        if not all(math.isfinite(v) for v in move):
            return None
        high = self.pilot.lams[1]
        lams = [v / 2 for v in solver.log_snr]
        weights = [list(row) for row in solver.weights]
        output = list(solver.output)
        for (kind, k, j), by in zip(self._numbers(solver), move, strict=True):
            if kind == "level":
                lams[k] = min(lams[k] + max(-_FARTHEST, min(_FARTHEST, by)), high)
            elif kind == "weight":
                weights[k - 1][j] += by
            else:
                output[j] += by
        finite = all(math.isfinite(v) for row in (lams, output, *weights) for v in row)
        if not finite or (self.pilot.given is None and not walkable(lams, high)):
            return None
        return self.pilot.solver(lams, self._rows(weights), output, solver.guess)

    def _numbers(self, solver: FittedSolver) -> list[tuple[str, int, int]]:
        return numbers_of(len(solver.times), self.pilot.history, moving=self.pilot.given is None)

    def _rows(self, weights: list[list[float]]) -> tuple[Row, ...] | None:
        """The weights, or None for the standard ones, which move with the levels."""
        return tuple(tuple(row) for row in weights) if self.pilot.history else None

    def _normal_equations(self, now: Walked) -> tuple[Tensor, Tensor, Tensor]:
        """Matrix and right-hand side for the move of all numbers, each in units of its effect, and these units."""
        pilot, size = self.pilot, len(self._numbers(now.solver))
        own, done = ~pilot.held, 0
        matrix, vector = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
        slope = torch.zeros(size, dtype=torch.float64)
        v, centred, total = pilot.energy(now.x)
        _, weight, counted = pilot.counted(now.x)
        ends = (weight / (len(weight) * now.x[0].numel())).sqrt()
        on_path = ON_PATH * (pilot.variance * counted / (counted.sum() * pilot.compared(now.solver))).sqrt()
        for rows, chain in zip(pilot.chunks(torch.arange(pilot.count)), now.states, strict=True):
            mine = own[rows].nonzero().flatten()
            if not len(mine):
                continue
            part, these = rows[mine], slice(done, done + len(mine))
            done += len(mine)
            states = [select_rows(mine.to(pilot.device), state) for state in chain]
            columns, moved = self._columns(now.solver, part, states)
            residual = (pilot.target[part.to(pilot.device)] - states[-1]["x_0"]).flatten(1)
            slope += (columns.flatten(1).double() @ centred[these].flatten()).cpu() / total
            off = pilot.off(now.solver, states, part)
            for change, wanted, weights in ((columns, residual, ends), (moved, -off, on_path)):
                by = weights[these].float().to(pilot.device)[:, None]
                scaled = (change * by).flatten(1).double()
                matrix += (scaled @ scaled.T).cpu()
                vector += (scaled @ (wanted * by).flatten().double()).cpu()
        unit = matrix.diagonal().sqrt().clamp(min=1e-12)
        share = ENERGY * pilot.variance
        matrix = (matrix + share * torch.outer(slope, slope)) / torch.outer(unit, unit)
        return matrix, (vector - share * v * slope) / unit, unit

    def _columns(self, solver: FittedSolver, rows: Tensor, states: list[Carry]) -> tuple[Tensor, Tensor]:
        """Derivatives after each number: of the samples, with shape (numbers, rows, elements), and of `off`."""
        pilot, last, off = self.pilot, states[-1], self.pilot.off(solver, states, rows)
        found, moves = list[Tensor](), list[Tensor]()
        for kind, k, j in self._numbers(solver):
            if kind == "output":
                found.append(last[f"past_{j}"].flatten(1))
                moves.append(torch.zeros_like(off))
                continue
            before = states[k - 1]
            change = _CHANGE
            if kind == "weight":  # in y, the state that it multiplies, and the noise of the level
                alpha = float(pilot.sde.alpha(torch.tensor([solver.times[k - 1]], dtype=torch.float64)))
                size = float((before["x"] / alpha if j == 0 else before[f"past_{j - 1}"]).square().mean().sqrt())
                change *= min(math.sqrt(pilot.variance), math.exp(-solver.log_snr[k] / 2)) / max(size, 1e-6)
            elif solver.log_snr[k] / 2 + change > pilot.lams[1]:
                change = -change
            moved = self._changed(solver, kind, k, j, change)
            chain = pilot.walk(moved, rows, k, before)
            by = torch.cat([torch.zeros_like(off[:k]), pilot.off(moved, chain, rows, k) - off[k:]]) / change
            # What leaves the numbers says nothing of where to go.
            found.append(((chain[-1]["x_0"] - last["x_0"]) / change).flatten(1).nan_to_num(0.0, 0.0, 0.0))
            moves.append(by.nan_to_num(0.0, 0.0, 0.0))
        return torch.stack(found), torch.stack(moves)

    def _changed(self, solver: FittedSolver, kind: str, k: int, j: int, change: float) -> FittedSolver:
        """The solver with one number changed, however near its levels come to each other."""
        lams, weights = [v / 2 for v in solver.log_snr], [list(row) for row in solver.weights]
        if kind == "level":
            lams[k] += change
        else:
            weights[k - 1][j] += change
        return self.pilot.solver(lams, self._rows(weights), solver.output, solver.guess)

    def _judge(self, found: Walked) -> None:
        """Keeps what was found, or the default if that is nearer, and notes both errors."""
        pilot = self.pilot
        self.error, self.default_error = pilot.relative(found.x), pilot.relative(self.default.x)
        ours, theirs = (pilot.held_errors(walked.x) for walked in (found, self.default))
        logs = (ours / theirs).log()
        middle, spread = float(logs.mean()), 2 * float(logs.std()) / math.sqrt(len(logs))
        self.ratio, self.interval = math.exp(middle), (math.exp(middle - spread), math.exp(middle + spread))
        self.best = found
        # With noise most of the error is that of the noise between two levels: a gain must be more than chance.
        clear = self.ratio < 1.0 if pilot.eta == 0 else self.interval[1] < 1.0 and self.error < self.default_error
        if not (clear and pilot.error(found.x) < pilot.error(self.default.x)):
            self.best, self.error, self.ratio, self.interval = self.default, self.default_error, 1.0, (1.0, 1.0)
