"""Pilot samples: an accurate solution of each, walks of a solver from the same start, and the error of the walks."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from fastsde.api import warn_of_range
from fastsde.batching import select_rows
from fastsde.control import Grid
from fastsde.fitting.kept import Kept
from fastsde.fitting.price import held_of, scouts_of
from fastsde.job import Samples, noise_of
from fastsde.noise import StepNoise
from fastsde.score.base import BoundModel, ScoreModel
from fastsde.sde.base import SDE
from fastsde.solvers import ExponentialPC
from fastsde.solvers.fitted import FittedSolver, Row, standard_weights
from fastsde.steps import own_grid
from fastsde.types import Carry, State

ENERGY = 10.0
"""Weight of the samples' variance, which least squares alone makes too small."""
ON_PATH = 0.2
"""Weight of the distance of the states from the accurate ones, in units of the samples' size."""
_SEEN = 2048
"""Elements of which that distance is taken, at most, over all levels of a sample."""
_POWER, _OUTLIER, _FEW = 1.5, 4.0, 3
"""Power of the errors whose mean is lowered. Pilots beyond this many times the median error count less; in the mean
only those that have a larger error than the last of this many."""
_GUESSED_AT = -2.0
"""Where the mean of the data is looked for beside t_max, in half the log-SNR for data of variance 1."""
_ON = 5
"""Steps of the accurate solution from where the default's grid ends to t_min."""


@dataclasses.dataclass
class Walked:
    """A solver, the samples that it gives, and what is needed to go on from each of its levels, by chunk of rows."""

    solver: FittedSolver
    x: Tensor
    states: list[list[Carry]]


class Pilots:
    """The pilot samples: their start, their accurate solution, and walks of a solver from one to the other."""

    def __init__(
        self,
        model: ScoreModel,
        sde: SDE,
        samples: Samples,
        eta: float,
        batch_size: int,
        given: Grid | None,
        history: int,
        teacher: int,
    ) -> None:
        self.given, self.history, self.teacher_calls = given, history, teacher
        self.model, self.sde, self.samples, self.eta, self.batch_size = model, sde, samples, eta, batch_size
        self.index, self.device, self.count = samples.index, samples.device, len(samples.index)
        count, seed = self.count, samples.seed
        # Conditioning may come in order.
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed % (1 << 63)))
        held = held_of(count)
        self.held = torch.zeros(count, dtype=torch.bool)
        self.held[order[:held]] = True
        self.scouts = order[held : held + scouts_of(count)].sort().values
        self.cost, self.bar = 0, tqdm(disable=True)
        self.guess, self.spread = tuple[float, ...](), math.inf
        self.noise = noise_of(samples, ExponentialPC(eta=eta), sde, (sde.t_min, sde.t_max))
        size = math.prod(samples.event)
        # None with noise: the path between two levels is not known then.
        seen = 0 if eta else _SEEN // 3
        self.seen = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:seen].to(self.device)
        self.start = sde.prior(self.noise.prior(self.index), sde.t_max)
        self.lams = [v / 2 for v in sde.log_snr(torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)).tolist()]

    def paid(self, calls: int) -> None:
        """Adds network calls to the price."""
        self.cost += calls
        self.bar.update(calls)

    def resume(self, cost: int) -> None:
        """Takes the price that an interrupted fit had come to."""
        self.paid(cost - self.cost)

    def solve(self, kept: Kept | None) -> None:
        """The accurate solution, from the file if it is there."""
        found = None if kept is None else kept.solution()
        teacher = self._at(self._fine(self.teacher_calls - 1).times)
        self.rho = [math.exp(-v / 2) for v in teacher.log_snr]
        if found is None:
            target, course = found = self._solved(teacher)
            if kept is not None:
                kept.keep(target.cpu().numpy(), course.cpu().numpy(), self.cost)
        elif kept is not None:
            self.resume(kept.cost)
        self.target, self.course = (part.to(self.device).float() for part in found)
        centred = (self.target - self.target.mean(0)).double()
        self.variance = max(float(centred.square().mean()), 1e-12)
        self.floor = self.variance / 6400  # of a squared error: an 80th of the samples' size

    def _solved(self, teacher: FittedSolver) -> tuple[Tensor, Tensor]:
        """Samples of a fine grid; and y at its levels, with shape (levels, pilots, elements seen)."""
        ends, courses = list[Tensor](), list[Tensor]()
        alpha = self.sde.alpha(torch.tensor(teacher.times, dtype=torch.float64)).tolist()
        for part in self.chunks(torch.arange(self.count)):
            course = list[Tensor]()
            for state in self._states(teacher, part):
                course.append(state["x"].flatten(1)[:, self.seen] / alpha[len(course)])
            ends.append(state["x_0"])
            courses.append(torch.stack(course))
        found = torch.cat(ends)
        failed = int((~torch.isfinite(found).flatten(1).all(1)).sum())
        if failed:
            raise RuntimeError(f"pilot samples failed: {failed} of {self.count} are not finite.")
        warn_of_range(found, self.model)
        return found, torch.cat(courses, 1)

    def agree(self) -> None:
        """Looks for the mean of the data in the network's predictions in noise, where these agree best."""
        rows = torch.arange(self.count)
        mean, noise = self.target.mean(0), self.start / self.sde.prior_std
        low, high = self.lams
        lams = [low, min(max(low, _GUESSED_AT - 0.5 * math.log(self.variance)), high)]
        found = None
        times = self.sde.t_of_log_snr(2 * torch.tensor(lams, dtype=torch.float64))
        times = times.clamp(self.sde.t_min, self.sde.t_max)
        times[0] = self.sde.t_max
        for t in times.tolist():
            time = torch.full((self.count,), t, dtype=torch.float64, device=self.device)
            x = self.sde.marginal(mean.expand_as(noise), time, noise)
            predicted = []
            for part in self.chunks(rows.to(self.device)):
                active = torch.ones(len(part), dtype=torch.bool, device=self.device)
                model = BoundModel(self.model, select_rows(part, self.samples.cond), active)
                predicted.append(model(x[part], time[part]).x_0)
                self.paid(int(model.nfe.sum()))
            d = torch.cat(predicted).double()
            spread = float((d - d.mean(0)).square().mean()) / self.variance
            if spread < self.spread:
                self.spread, found = spread, d.mean(0)
        if found is not None:
            self.guess = tuple(round(v, 6) for v in found.flatten().tolist())

    def _fine(self, steps: int) -> Grid:
        """The default's grid, and on to t_min in equal steps of the log-SNR where it ends before."""
        times = own_grid(self.sde, ExponentialPC(), steps - _ON).times
        if float(times[-1]) == self.sde.t_min:
            return own_grid(self.sde, ExponentialPC(), steps)
        first, last = self.sde.log_snr(torch.tensor([float(times[-1]), self.sde.t_min], dtype=torch.float64)).tolist()
        rest = self.sde.t_of_log_snr(torch.linspace(first, last, _ON + 1, dtype=torch.float64)[1:])
        rest[-1] = self.sde.t_min
        return Grid(torch.cat([times, rest]))

    def root_errors(self, x: Tensor, rows: Tensor) -> Tensor:
        """Root of the squared error of each of these samples, with a floor, with shape (rows,)."""
        square = (x - self.target[rows.to(x.device)]).double().flatten(1).square().mean(1)
        return (square + self.floor).sqrt().cpu().nan_to_num(nan=math.inf)

    def held_errors(self, x: Tensor) -> Tensor:
        """The same of the held-out pilots, from the samples of all."""
        return self.root_errors(x[self.held.to(x.device)], self.held)

    def relative(self, x: Tensor) -> float:
        """Median over the held-out samples of the error over the sample's size."""
        held = self.held.to(x.device)
        error, size = (v[held].double().flatten(1).norm(dim=1) for v in (x - self.target, self.target))
        return float((error / size.clamp(min=1e-12)).nan_to_num(nan=math.inf).median())

    def objective(self, walked: Walked) -> float:
        """What is lowered, on the samples that are fitted."""
        error, _, counted = self.counted(walked.x)
        parts = zip(self.chunks(torch.arange(self.count)), walked.states, strict=True)
        off = torch.cat([self.off(walked.solver, chain, part).square().sum((0, 2)) for part, chain in parts])
        u = float(counted @ off.cpu()[~self.held].double() / counted.sum()) / self.compared(walked.solver)
        more = ENERGY * self.energy(walked.x)[0] ** 2 + ON_PATH**2 * u
        value = math.sqrt(error**2 + self.variance * more)
        return value if math.isfinite(value) else math.inf

    def counted(self, x: Tensor) -> tuple[float, Tensor, Tensor]:
        """Of the samples that are fitted: their mean error, the weights of its derivative, and how much each counts."""
        return _counted(self.root_errors(x[~self.held.to(x.device)], ~self.held))

    def error(self, x: Tensor) -> float:
        """Mean error of all pilots, as one in another mode is too large a part of the held-out ones."""
        return _counted(self.root_errors(x, torch.arange(self.count)))[0]

    def energy(self, x: Tensor) -> tuple[float, Tensor, float]:
        """v of the objective; the weighted centred samples and the sum of squares of the target, of which v is made."""
        own = ~self.held.to(x.device)
        weight = self.counted(x)[2].to(x.device)
        centred, wanted = (
            rows - weight @ rows / weight.sum() for rows in (v[own].double().flatten(1) for v in (x, self.target))
        )
        total = max(float((weight @ wanted.square()).sum()), 1e-12)
        weighted = weight[:, None] * centred
        return (float((weighted * centred).sum()) / total - 1) / 2, weighted, total

    def off(self, solver: FittedSolver, states: list[Carry], rows: Tensor, first: int = 0) -> Tensor:
        """How far y is from the accurate one at each level from number `first` on, over sqrt(rho^2 + s^2).

        With shape (levels - first, rows, elements). The accurate y is taken as straight in rho between its levels.
        """
        alpha = self.sde.alpha(torch.tensor(solver.times, dtype=torch.float64)).tolist()
        rows, seen = rows.to(self.device), self.seen[: _SEEN // len(solver.times)]
        found = list[Tensor]()
        for k, state in enumerate(states, first):
            rho = math.exp(-solver.log_snr[k] / 2)
            after = min(max(1, sum(there > rho for there in self.rho)), len(self.rho) - 1)
            a, b = self.rho[after - 1 : after + 1]
            before, behind = (self.course[j, rows, : len(seen)] for j in (after - 1, after))
            accurate = torch.lerp(before, behind, (a - rho) / (a - b))
            found.append((state["x"].flatten(1)[:, seen] / alpha[k] - accurate) / math.sqrt(rho**2 + self.variance))
        return torch.stack(found)

    def compared(self, solver: FittedSolver) -> int:
        """How many elements `off` has for each row, at least 1."""
        return max(1, len(solver.times) * min(len(self.seen), _SEEN // len(solver.times)))

    def chunks(self, rows: Tensor) -> list[Tensor]:
        """The rows in parts of a batch."""
        return list(rows.split(self.batch_size))

    def normals(self, times: Tensor, rows: Tensor) -> list[State | None]:
        """The noise of each step along the path, in variance 1, with shape (rows, *event)."""
        if self.eta == 0:
            return [None] * len(times)
        index, zero = self.index[rows], torch.zeros(len(rows), dtype=torch.int64, device=self.device)
        at = [t.expand(len(rows)).to(self.device) for t in times]
        carry, found = self.noise.start(index, at[0]), list[State | None]([None])
        for t, s in itertools.pairwise(at):
            step = StepNoise(self.noise, index, zero, zero, t, s, carry)
            found.append(step.z)
            carry = step.carry
        return found

    def walk(self, solver: FittedSolver, rows: Tensor, first: int = 0, state: Carry | None = None) -> list[Carry]:
        """States after each level from number `first` on, from the state before it, or from the start."""
        return list(self._states(solver, rows, first, state))

    def _states(
        self, solver: FittedSolver, rows: Tensor, first: int = 0, state: Carry | None = None
    ) -> Iterator[Carry]:
        times = torch.tensor(solver.times, dtype=torch.float64)
        plan = solver.plan(self.sde, times).map(lambda v: v.float() if v.is_floating_point() else v)
        active = torch.ones(len(rows), dtype=torch.bool, device=self.device)
        model = BoundModel(self.model, select_rows(rows.to(self.device), self.samples.cond), active)
        normals = self.normals(times, rows.to(self.device))
        if state is None:
            x = self.start[rows.to(self.device)]
            state = {"x": x, **solver.init(x)}
            if solver.guesses:  # its first level is the start
                first = 1
                yield state
        for k in range(first, len(times)):
            c = plan.rows(torch.full((len(rows),), k)).map(lambda value: value.to(self.device))
            ahead = solver.predict(state["x"], c, state, normals[k])
            prediction = model(ahead.x, times[k].expand(len(rows)).to(self.device))
            x, carry = solver.correct(ahead, prediction, c, state)
            state = {**carry, "x": x}
            yield state
        self.paid(int(model.nfe.sum()))

    def walked(self, solver: FittedSolver, rows: Tensor | None = None) -> Walked:
        """A solver's samples, of some of the pilots or of all."""
        rows = torch.arange(self.count) if rows is None else rows
        states = [self.walk(solver, part) for part in self.chunks(rows)]
        return Walked(solver, torch.cat([chain[-1]["x_0"] for chain in states]), states)

    def solver(
        self,
        lams: Sequence[float],
        weights: tuple[Row, ...] | None,
        output: Sequence[float],
        guess: tuple[float, ...] = (),
    ) -> FittedSolver:
        """With given levels in half the log-SNR, the first of which is that of t_max; standard weights if None."""
        log_snr = 2 * torch.tensor(list(lams), dtype=torch.float64)
        times = self.sde.t_of_log_snr(log_snr).clamp(self.sde.t_min, self.sde.t_max)
        times[0] = self.sde.t_max
        if self.given is not None:
            times = self.given.times
        if weights is None:
            # Of as high an order as the history allows.
            order = 3 if self.history == 0 else max(1, min(3, self.history - 1))
            weights = standard_weights(self.sde, times.tolist(), self.eta, order)
            if self.history:
                weights = tuple((*row, *[0.0] * k)[: 1 + min(k, self.history)] for k, row in enumerate(weights, 1))
                output = [*output, *[0.0] * len(times)][: min(len(times), self.history)]
        return FittedSolver(
            eta=self.eta,
            times=tuple(times.tolist()),
            log_snr=tuple(self.sde.log_snr(times).tolist()),
            weights=weights,
            output=tuple(output),
            guess=guess,
        )

    def own_times(self, levels: int) -> Tensor:
        """The times of `sample(nfe=...)`, or those that are given."""
        if self.given is not None:
            return self.given.times
        return own_grid(self.sde, ExponentialPC(eta=self.eta), levels - 1).times

    def default(self, levels: int) -> Walked:
        """What `sample(nfe=...)` does."""
        return self.walked(self._at(self.own_times(levels)))

    def _at(self, times: Tensor) -> FittedSolver:
        """`ExponentialPC` at these times."""
        log_snr = tuple(self.sde.log_snr(times).tolist())
        return FittedSolver(eta=self.eta, times=tuple(times.tolist()), log_snr=log_snr)


def _counted(errors: Tensor) -> tuple[float, Tensor, Tensor]:
    """Mean of errors, the weights of its derivative, and how much each counts."""
    far = _OUTLIER * errors.median()
    # Of fewer than five, one is too large a part to be left out.
    limit = max(far, errors.topk(_FEW if len(errors) >= 5 else 1).values[-1])
    beyond = limit**_POWER * (1 + _POWER * (errors / limit).log())
    mean = torch.where(errors <= limit, errors**_POWER, beyond).mean() ** (1 / _POWER)
    weight = (limit / errors).clamp(max=1.0) ** _POWER * (mean / errors) ** (2 - _POWER)
    return float(mean), weight, (far / errors).clamp(max=1.0) ** _POWER
