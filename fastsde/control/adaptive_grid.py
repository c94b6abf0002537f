"""A grid, and finer ones for the samples whose own error asks for them."""

from __future__ import annotations

import dataclasses

import torch

from fastsde.batching import row_norm
from fastsde.control.base import Clock, Controller, Decision
from fastsde.control.grid import Grid
from fastsde.result import Status
from fastsde.types import Carry, State, Time


@dataclasses.dataclass(frozen=True)
class AdaptiveGrid(Controller):
    r"""Walks a smooth grid, and starts a sample again on one twice as fine where its error is far above what is meant.

        E = || error / max(atol, rtol scale) ||_2 / d^(1/2)

    A sample whose step has E above `limit` goes back to its start, to the same start state and noise, and walks the
    grid with each step halved in log-SNR; after a second such step quartered, and so on down to 2^-depth, where every
    step is accepted. So a multistep method sees a smooth grid all the way, a sample without difficulties walks `grid`
    itself, and times are the same numbers at any batch size. What is wrong with a hard sample was as a rule decided
    some steps before its error is seen; halved steps from there on would not mend it (docs/solver.md).

    Args:
        grid: the base grid.
        rtol: relative tolerance, positive.
        atol: absolute tolerance in units of the data, positive.
        clock: the SDE, in whose log-SNR steps are halved.
        limit: E above which a sample starts again; `math.inf` for the plain grid.
        depth: how many times it may, from 0 to 12.
        mirrored: whether the engine, and the grid with it, runs on u = -t.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    adaptive = True

    grid: Grid
    rtol: float
    atol: float
    clock: Clock
    limit: float = 1.0
    depth: int = 2
    mirrored: bool = False

    def __post_init__(self) -> None:
        for name in ("rtol", "atol", "limit"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not value > 0 or (name != "limit" and value == float("inf")):
                raise ValueError(f"{name} must be a positive, finite number; got {value!r}.")
        if not isinstance(self.depth, int) or not 0 <= self.depth <= 12:
            raise ValueError(f"depth must be an integer from 0 to 12; got {self.depth!r}.")

    def span(self, t_min: float, t_max: float) -> tuple[float, float]:
        return self.grid.span(t_min, t_max)

    def reversed(self) -> AdaptiveGrid:
        return dataclasses.replace(self, grid=self.grid.reversed(), mirrored=not self.mirrored)

    def init(self, t: Time, t_end: float) -> Carry:
        zero = torch.zeros(t.shape, dtype=torch.int64, device=t.device)
        return {"place": zero, "level": zero.clone()}

    def target(self, t: Time, t_end: float, carry: Carry) -> Time:
        times = self.grid.times_on(t.device)
        last = self.grid.steps << self.depth
        place = (carry["place"] + (1 << self.depth >> carry["level"])).clamp(max=last)
        k, rest = place >> self.depth, (place & ((1 << self.depth) - 1)).double() / (1 << self.depth)
        low, high = times[k], times[(k + 1).clamp(max=self.grid.steps)]
        sign = -1.0 if self.mirrored else 1.0
        between = torch.lerp(self.clock.log_snr(sign * low), self.clock.log_snr(sign * high), rest)
        return torch.where(rest == 0, low, sign * self.clock.t_of_log_snr(between))

    def update(
        self, t: Time, s: Time, t_end: float, error: State | None, scale: State | None, carry: Carry
    ) -> Decision:
        if error is None or scale is None:
            raise ValueError("the solver gives no error estimate; it needs a Grid.")
        scaled = row_norm(error / (self.rtol * scale).clamp(min=self.atol))
        place, level = carry["place"], carry["level"]
        restart = (scaled > self.limit) & (level < self.depth)
        place = (place + (1 << self.depth >> level)) * ~restart
        failure = torch.full(t.shape, int(Status.PENDING), device=t.device)
        failure = failure.masked_fill(~torch.isfinite(scaled), int(Status.NON_FINITE))
        accept = ~restart & torch.isfinite(scaled)
        return Decision(accept, {"place": place, "level": level + restart}, failure, restart)
