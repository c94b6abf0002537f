"""A grid, and finer ones for the samples whose own error asks for them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastsde.batching import row_norm
from fastsde.checks import check_number, check_positive
from fastsde.control.base import Controller, Decision
from fastsde.control.grid import Grid
from fastsde.result import Status
from fastsde.types import Carry, Index, State, Time


@dataclasses.dataclass(frozen=True)
class AdaptiveGrid(Controller):
    r"""Walks a grid, and starts a sample again on a finer one where its error is far above what is meant.

        E = || error / max(atol, rtol scale) ||_2 / d^(1/2)

    A sample whose step has E above `limit` goes back to its start, to the same start state and noise, and walks the
    next of the grids; on the last one every step is accepted. So a multistep method sees a smooth grid all the way, a
    sample without difficulties walks the first grid itself, and times are the same numbers at any batch size. What is
    wrong with a hard sample was as a rule decided some steps before its error is seen; shorter steps from there on
    would not mend it (docs/solver.md).

    This pays where a few samples are far harder than the others, as in mixtures with rare tight clusters. On trained
    networks nobody started again, or so many did that the plain grid was nearer at equal mean calls: so `sample(rtol=)`
    has one grid alone, and finer ones are asked for here:

        AdaptiveGrid([Grid.tapered(sde, 15 << k) for k in range(3)], rtol=0.05, atol=1 / 128)

    The noise is the same again if the solver keeps its path, as `ExponentialPC` does; drawn anew, it would make those
    samples rarer that are sent back.

    Args:
        grids: the base grid and finer ones, from the same start to the same end.
        rtol: relative tolerance, positive.
        atol: absolute tolerance in units of the data, positive.
        limit: E above which a sample starts again; `math.inf` for the base grid alone.
        stops: times that every sample steps on exactly, in any order. Steps about them are not judged: they are uneven.

    Raises:
        TypeError, ValueError: naming the argument and what is allowed.
    """

    adaptive = True

    grids: Sequence[Grid]
    rtol: float
    atol: float
    limit: float = 1.0
    stops: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            check_positive(name, getattr(self, name))
        check_number("limit", self.limit, 0.0, ends="(]")
        grids = self.grids
        if not isinstance(grids, Sequence) or not grids or not all(isinstance(grid, Grid) for grid in grids):
            raise TypeError(f"grids must be a sequence of fastsde.Grid, the coarsest first; got {grids!r}.")
        object.__setattr__(self, "grids", tuple(grids))
        if len(ends := {grid.ends for grid in grids}) > 1:
            raise ValueError(f"grids must have the same ends, exactly; got {sorted(ends)}.")
        if any(fine.steps <= coarse.steps for coarse, fine in itertools.pairwise(grids)):
            raise ValueError(f"grids must have more and more steps; got {[grid.steps for grid in grids]}.")

    def span(self, t_min: float, t_max: float) -> tuple[float, float]:
        return self.grids[0].span(t_min, t_max)

    def reversed(self) -> AdaptiveGrid:
        grids = tuple(grid.reversed() for grid in self.grids)
        return dataclasses.replace(self, grids=grids, stops=tuple(-t for t in self.stops))

    @functools.cached_property
    def walks(self) -> tuple[Grid, ...]:
        """The grids, with the stops in them: in place of a time that is as good as the same."""
        walks = []
        for grid in self.grids:
            times = grid.times.cpu()
            gaps = times.diff().abs()
            room = 0.01 * torch.minimum(gaps[:-1], gaps[1:])
            apart = (times[1:-1, None] - torch.tensor(self.stops, dtype=torch.float64)).abs() > room[:, None]
            kept = torch.cat([times[:1], times[1:-1][apart.all(1)], times[-1:]])
            walks.append(Grid(kept).through(list(self.stops)))
        return tuple(walks)

    @functools.cached_property
    def _tables(self) -> dict[torch.device, tuple[Tensor, Tensor, Tensor]]:
        """By device: the times of all walks, one after another, which steps to them are judged, where each begins."""
        counts = torch.tensor([walk.steps + 1 for walk in self.walks])
        # The last one twice, for rows that have ended.
        times = torch.cat([*(walk.times.cpu() for walk in self.walks), self.walks[-1].times[-1:].cpu()])
        stop = torch.isin(times, torch.tensor(self.stops, dtype=torch.float64))
        # The steps to a stop and from it, and the one after, which extrapolates from those.
        near = stop | stop.roll(1) | stop.roll(2)
        return {torch.device("cpu"): (times, ~near, counts.cumsum(0) - counts)}

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if device not in self._tables:
            self._tables[device] = tuple(table.to(device) for table in self._tables[torch.device("cpu")])  # type: ignore[assignment]
        return self._tables[device]

    def init(self, t: Time, t_end: float) -> Carry:
        zero = torch.zeros(t.shape, dtype=torch.int64, device=t.device)
        return {"grid": zero, "first": zero}

    def plan_row(self, carry: Carry) -> Index:
        return carry["first"] + carry["position"]

    def target(self, t: Time, t_end: float, carry: Carry) -> Time:
        return self._on(t.device)[0].take(self.plan_row(carry))

    def update(
        self, t: Time, s: Time, t_end: float, error: State | None, scale: State | None, carry: Carry
    ) -> Decision:
        if error is None or scale is None:
            raise ValueError("the solver gives no error estimate; it needs a Grid.")
        scaled = row_norm(error / (self.rtol * scale).clamp(min=self.atol))
        finite = torch.isfinite(scaled)
        _, judged, first = self._on(t.device)
        asked = judged.take(self.plan_row(carry))
        restart = (scaled > self.limit) & finite & asked & (carry["grid"] < len(self.grids) - 1)
        grid = carry["grid"] + restart
        after = {"grid": grid, "first": first.take(grid)}
        failure = torch.full(t.shape, int(Status.NON_FINITE), device=t.device).masked_fill(finite, int(Status.PENDING))
        return Decision(finite & ~restart, after, failure, restart)
