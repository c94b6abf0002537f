"""A grid, and finer ones for the samples whose own error asks for them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastsde.batching import row_norm
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

    Args:
        grids: the base grid and finer ones, from the same start to the same end.
        rtol: relative tolerance, positive.
        atol: absolute tolerance in units of the data, positive.
        limit: E above which a sample starts again; `math.inf` for the base grid alone.

    Raises:
        TypeError, ValueError: naming the argument and what is allowed.
    """

    adaptive = True

    grids: Sequence[Grid]
    rtol: float
    atol: float
    limit: float = 1.0

    def __post_init__(self) -> None:
        for name in ("rtol", "atol", "limit"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not value > 0 or (name != "limit" and value == float("inf")):
                raise ValueError(f"{name} must be a positive, finite number; got {value!r}.")
        grids = self.grids
        if not isinstance(grids, Sequence) or not grids or not all(isinstance(grid, Grid) for grid in grids):
            raise TypeError(f"grids must be a sequence of fastsde.Grid, the coarsest first; got {grids!r}.")
        steps = [grid.steps for grid in grids]
        if len({grid.ends for grid in grids}) > 1 or steps != sorted(set(steps)):
            raise ValueError(f"grids must have the same ends and ever more steps; got {list(grids)}.")

    def span(self, t_min: float, t_max: float) -> tuple[float, float]:
        return self.grids[0].span(t_min, t_max)

    def reversed(self) -> AdaptiveGrid:
        return dataclasses.replace(self, grids=[grid.reversed() for grid in self.grids])

    def through(self, times: list[float]) -> AdaptiveGrid:
        """The same with further times in every grid."""
        return dataclasses.replace(self, grids=[grid.through(times) for grid in self.grids])

    @functools.cached_property
    def _tables(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        """By device: the times of all grids, one after another, and where those of each begin."""
        counts = torch.tensor([grid.steps + 1 for grid in self.grids])
        tables = (torch.cat([grid.times.cpu() for grid in self.grids]), counts.cumsum(0) - counts)
        return {torch.device("cpu"): tables}

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._tables:
            times, first = self._tables[torch.device("cpu")]
            self._tables[device] = times.to(device), first.to(device)
        return self._tables[device]

    def init(self, t: Time, t_end: float) -> Carry:
        zero = torch.zeros(t.shape, dtype=torch.int64, device=t.device)
        return {"grid": zero, "first": zero, "k": zero}

    def plan_row(self, position: Index, carry: Carry) -> Index:
        return carry["first"] + position

    def target(self, t: Time, t_end: float, carry: Carry) -> Time:
        times, _ = self._on(t.device)
        return times[(carry["first"] + carry["k"] + 1).clamp(max=len(times) - 1)]

    def update(
        self, t: Time, s: Time, t_end: float, error: State | None, scale: State | None, carry: Carry
    ) -> Decision:
        if error is None or scale is None:
            raise ValueError("the solver gives no error estimate; it needs a Grid.")
        scaled = row_norm(error / (self.rtol * scale).clamp(min=self.atol))
        finite = torch.isfinite(scaled)
        restart = (scaled > self.limit) & finite & (carry["grid"] < len(self.grids) - 1)
        grid = carry["grid"] + restart
        after = {"grid": grid, "first": self._on(t.device)[1][grid], "k": (carry["k"] + 1) * ~restart}
        failure = torch.full(t.shape, int(Status.NON_FINITE), device=t.device).masked_fill(finite, int(Status.PENDING))
        return Decision(finite & ~restart, after, failure, restart)
