"""A grid, and finer ones for the samples whose own error asks for them."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastsde.checks import check_number, check_positive
from fastsde.control.base import Controller, Decision, Verdict, scaled_error
from fastsde.control.grid import Grid
from fastsde.types import Carry, Index, State, Time


@dataclasses.dataclass(frozen=True)
class AdaptiveGrid(Controller):
    r"""A grid, and finer ones on which a sample starts again if its error is large.

        E = || error / max(atol, rtol scale) ||_2 / d^(1/2)

    If a step has E above `limit`, the sample starts again from the same start state, with the same noise, on the next
    grid. On the last grid every step is accepted. So a multistep method always has a smooth grid, and the times are the
    same at any batch size. Shorter steps from there on would not help: the cause of a large error usually lies some
    steps before it is seen (docs/explanation/solver.md).

    This helps if a few samples are far harder than the others, as in mixtures with rare tight clusters. On the trained
    networks that we measured it did not help. So `sample(rtol=)` has only one grid. Ask for finer ones here:

        AdaptiveGrid([Grid.tapered(sde, 15 << k) for k in range(3)], rtol=0.05, atol=1 / 128)

    The solver must keep its Brownian path, as `ExponentialPC` does. With new noise, samples that start again would
    become rarer than they should be.

    Args:
        grids: the base grid and finer ones, from the same start to the same end.
        rtol: relative tolerance, positive.
        atol: absolute tolerance in units of the data, positive.
        limit: E above which a sample starts again; `math.inf` for the base grid alone.
        stops: times that every sample steps on exactly, in any order. Steps next to them are not judged, because they
            are uneven.

    Raises:
        TypeError, ValueError: naming the argument and what is allowed.
    """

    adaptive = True

    grids: Sequence[Grid]
    rtol: float
    atol: float
    limit: float = 1.0
    stops: tuple[float, ...] = ()
    # The times of all grids, one after another; which steps to them are judged; where each grid begins.
    _tables: tuple[Tensor, Tensor, Tensor] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_positive("rtol", self.rtol)
        check_positive("atol", self.atol)
        check_number("limit", self.limit, 0.0, ends="(]")
        grids = self.grids
        if not isinstance(grids, Sequence) or not grids or not all(isinstance(grid, Grid) for grid in grids):
            raise TypeError(f"grids must be a sequence of fastsde.Grid, the coarsest first; got {grids!r}.")
        if len(ends := {grid.ends for grid in grids}) > 1:
            raise ValueError(f"grids must have the same ends, exactly; got {sorted(ends)}.")
        if any(fine.steps <= coarse.steps for coarse, fine in itertools.pairwise(grids)):
            raise ValueError(f"grids must have more and more steps; got {[grid.steps for grid in grids]}.")
        grids = tuple(grid.through(self.stops) if self.stops else grid for grid in grids)
        object.__setattr__(self, "grids", grids)
        counts = torch.tensor([grid.steps + 1 for grid in grids])
        # The last one twice, for rows that have ended.
        times = torch.cat([*(grid.times for grid in grids), grids[-1].times[-1:]])
        stop = torch.isin(times, torch.tensor(self.stops, dtype=torch.float64))
        # The steps to a stop and from it, and the one after, which extrapolates from those.
        near = stop | stop.roll(1) | stop.roll(2)
        object.__setattr__(self, "_tables", (times, ~near, counts.cumsum(0) - counts))

    def span(self, t_min: float, t_max: float) -> tuple[float, float]:
        return self.grids[0].span(t_min, t_max)

    def reversed(self) -> AdaptiveGrid:
        grids = tuple(grid.reversed() for grid in self.grids)
        return dataclasses.replace(self, grids=grids, stops=tuple(-t for t in self.stops))

    def all_grids(self) -> tuple[Grid, ...]:
        return tuple(self.grids)

    def coarsest(self, count: int) -> AdaptiveGrid:
        return dataclasses.replace(self, grids=self.grids[: max(1, count)])

    def stopping_at(self, times: Sequence[float]) -> tuple[AdaptiveGrid, list[float]]:
        return dataclasses.replace(self, stops=(*self.stops, *times)), list(times)

    def to(self, device: torch.device) -> AdaptiveGrid:
        moved = copy.copy(self)
        object.__setattr__(moved, "_tables", tuple(table.to(device) for table in self._tables))
        return moved

    def init(self, t: Time, t_end: float) -> Carry:
        return {"grid": torch.zeros(t.shape, dtype=torch.int64, device=t.device)}

    def plan_row(self, carry: Carry) -> Index:
        return self._tables[2].take(carry["grid"]) + carry["position"]

    def target(self, t: Time, t_end: float, carry: Carry) -> Time:
        return self._tables[0].take(self.plan_row(carry))

    def update(
        self, t: Time, s: Time, t_end: float, error: State | None, scale: State | None, carry: Carry
    ) -> Decision:
        if len(self.grids) == 1:
            return Decision(torch.zeros_like(carry["grid"]), {"grid": carry["grid"]})
        scaled = scaled_error(error, scale, self.rtol, self.atol)
        finer = carry["grid"] < len(self.grids) - 1
        restart = (scaled > self.limit) & finer & self._tables[1].take(self.plan_row(carry))
        verdict = torch.where(restart, int(Verdict.RESTART), int(Verdict.ACCEPT))
        verdict = verdict.masked_fill(~torch.isfinite(scaled), int(Verdict.NOT_FINITE))
        return Decision(verdict, {"grid": carry["grid"] + (verdict == Verdict.RESTART)})
