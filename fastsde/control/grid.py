"""Fixed grids of times."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fastsde.control.base import Controller, Decision
from fastsde.result import Status
from fastsde.types import Carry, Coef, State, Time


@runtime_checkable
class Clock(Protocol):
    """What a grid needs to know of a process: its time range and its log-SNR clock."""

    t_min: float
    t_max: float

    def log_snr(self, t: Time) -> Coef:
        """Log signal-to-noise ratio at t, with shape (B,)."""
        ...

    def t_of_log_snr(self, log_snr: Coef) -> Time:
        """The inverse of `log_snr`, with shape (B,)."""
        ...


class Grid(Controller):
    """Walks the given times, the same for every sample, and accepts every step.

    Args:
        times: strictly decreasing, from the process's t_max to its t_min; a tensor or a sequence of at least 2 numbers.

    Raises:
        ValueError: if the times are too few, not finite or not strictly decreasing.
    """

    adaptive = False

    def __init__(self, times: Tensor | list[float]) -> None:
        self.times = torch.as_tensor(times, dtype=torch.float64).detach().cpu().clone()
        if self.times.ndim != 1 or len(self.times) < 2:
            raise ValueError(f"times must be a vector of at least 2 numbers; got shape {tuple(self.times.shape)}.")
        if not torch.isfinite(self.times).all() or not (self.times.diff() < 0).all():
            raise ValueError("times must be finite and strictly decreasing, from t_max to t_min.")

    @property
    def steps(self) -> int:
        """The number of steps."""
        return len(self.times) - 1

    @classmethod
    def uniform(cls, clock: Clock, steps: int) -> Grid:
        """Equal steps in t. `clock` is the SDE."""
        return cls(_line(clock.t_max, clock.t_min, steps))

    @classmethod
    def geometric(cls, clock: Clock, steps: int) -> Grid:
        """Equal steps in log t."""
        ends = torch.tensor([clock.t_max, clock.t_min], dtype=torch.float64).log()
        return cls._pinned(_line(float(ends[0]), float(ends[1]), steps).exp(), clock)

    @classmethod
    def log_snr(cls, clock: Clock, steps: int) -> Grid:
        """Equal steps in log-SNR."""
        first, last = clock.log_snr(torch.tensor([clock.t_max, clock.t_min], dtype=torch.float64)).tolist()
        return cls._pinned(clock.t_of_log_snr(_line(first, last, steps)), clock)

    @classmethod
    def karras(cls, clock: Clock, steps: int, rho: float = 7.0) -> Grid:
        """Equal steps in (sigma / alpha)^(1 / rho) (Karras et al., https://arxiv.org/abs/2206.00364, eq. 5)."""
        ends = (-0.5 * clock.log_snr(torch.tensor([clock.t_max, clock.t_min], dtype=torch.float64))).exp()
        first, last = (ends ** (1 / rho)).tolist()
        return cls._pinned(clock.t_of_log_snr(-2 * rho * _line(first, last, steps).log()), clock)

    @classmethod
    def _pinned(cls, times: Tensor, clock: Clock) -> Grid:
        times[0], times[-1] = clock.t_max, clock.t_min
        return cls(times)

    def check(self, t_min: float, t_max: float) -> None:
        first, last = float(self.times[0]), float(self.times[-1])
        if first != t_max or last != t_min:
            raise ValueError(f"the grid must go from t_max={t_max} to t_min={t_min}; it goes from {first} to {last}.")

    def init(self, t: Time, t_end: float) -> Carry:
        return {"k": torch.zeros(t.shape, dtype=torch.int64, device=t.device)}

    def target(self, t: Time, t_end: float, carry: Carry) -> Time:
        if self.times.device != t.device:
            self.times = self.times.to(t.device)
        return self.times[(carry["k"] + 1).clamp(max=self.steps)]

    def update(
        self, t: Time, s: Time, t_end: float, error: State | None, scale: State | None, carry: Carry
    ) -> Decision:
        accept = torch.ones(t.shape, dtype=torch.bool, device=t.device)
        failure = torch.full(t.shape, int(Status.PENDING), device=t.device)
        return Decision(accept, {"k": carry["k"] + 1}, failure)

    def __repr__(self) -> str:
        return f"Grid({self.steps} steps from {float(self.times[0]):g} to {float(self.times[-1]):g})"


def _line(first: float, last: float, steps: int) -> Tensor:
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}.")
    return torch.linspace(first, last, steps + 1, dtype=torch.float64)
