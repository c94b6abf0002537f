"""Fixed grids of times."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fastsde.checks import check_choice, check_count, check_number, check_positive
from fastsde.control.base import Clock, Controller, Decision
from fastsde.noise import ALL_NOISE
from fastsde.types import Carry, State, Time


@runtime_checkable
class Levels(Protocol):
    """What `Grid.timesteps` needs to know of a discrete process: how many levels its table has."""

    levels: int


_ROUNDING = 1e-6
"""Share of an end of the process by which a grid may be outside of it."""


class Grid(Controller):
    """Fixed times, the same for every sample. Every step is accepted.

    Args:
        times: strictly decreasing, within t_max .. t_min of the process, usually from t_max to t_min. Sampling starts
            at the first and denoises at the last. A tensor or a sequence of at least 2 numbers.

    Raises:
        ValueError: if the times are too few, not finite or not strictly decreasing.
    """

    adaptive = False

    def __init__(self, times: Tensor | list[float]) -> None:
        try:
            self.times = torch.as_tensor(times, dtype=torch.float64).detach().cpu().clone()
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(f"times must be a vector of at least 2 numbers; got {str(times)[:80]}.") from error
        if self.times.ndim != 1 or len(self.times) < 2:
            raise ValueError(f"times must be a vector of at least 2 numbers; got shape {tuple(self.times.shape)}.")
        if not torch.isfinite(self.times).all() or not (self.times.diff() < 0).all():
            raise ValueError(
                f"times must be finite and strictly decreasing, from t_max to t_min; got {str(times)[:80]}."
            )

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
    def tapered(cls, clock: Clock, steps: int, *, first: float | None = None) -> Grid:
        """Steps in log-SNR of relative lengths `first`, 1, .., 1, 0.85, 0.7: `ExponentialPC`'s on most processes.

        The last two are shorter because no later step repairs an error there. With six steps or fewer they are not
        shorter. The first is up to twice as long, if it ends where sigma / alpha is 10 or more. For data within about
        [-1, 1] the denoised sample is there still close to their mean, and hardly changes. docs/measured has the
        measurements.

        Args:
            clock: the SDE.
            steps: number of steps, at least 1.
            first: relative length of the first step, at least 0.1; None for the rule above.
        """
        lengths = torch.ones(check_count("steps", steps, 1), dtype=torch.float64)
        if steps > 6:
            lengths[-2:] = torch.tensor([0.85, 0.7], dtype=torch.float64)
        start, end = clock.log_snr(torch.tensor([clock.t_max, clock.t_min], dtype=torch.float64)).tolist()
        lengths[0] = _first(first, -2 * math.log(ALL_NOISE) - start, end - start, float(lengths[1:].sum()))
        return cls._pinned(clock.t_of_log_snr(start + _shares(lengths) * (end - start)), clock)

    @classmethod
    def central(cls, clock: Clock, steps: int, width: float = 1.0, *, first: float | None = 1.0) -> Grid:
        r"""Steps that are shortest where sigma / alpha is 1, and an end that moves outward with their number.

        With rho = sigma / alpha, levels have steps of relative lengths `first`, 1, .., 1 in

            v = 1 / (1 + rho^(1 / width))

        from the start of the process. The share of noise is rho / (1 + rho). The last level is where this share is 1 /
        (steps + 1) of that at the start, or at the end of the process if that comes first. For a flow the share is t.
        There width 1 gives equal steps in t, with the last level at t_max / (steps + 1). Width 100 gives nearly equal
        steps in log-SNR. The sample is denoised at the last level, so detail far below 1 / (steps + 1) of the data's
        size is smoothed. The shorter steps gain more than that, unless the data are mostly such detail
        (docs/explanation/solver.md).

        Args:
            clock: the SDE.
            steps: number of steps, at least 1.
            width: positive. At a distance of 1.76 widths from the middle, in log rho, steps are twice as long as there.
            first: relative length of the first step, at least 0.1; None for that of `tapered`.
        """
        check_count("steps", steps, 1)
        width = check_positive("width", width)
        start, end = (clock.log_snr(torch.tensor([clock.t_max, clock.t_min], dtype=torch.float64)) / 2).tolist()
        share = 1 / (1 + math.exp(start)) / (steps + 1)
        last = min(end, math.log1p(-share) - math.log(share))
        levels = torch.tensor([start, -math.log(ALL_NOISE), last], dtype=torch.float64)
        high, middle, low = torch.sigmoid(-levels / width).tolist()  # 1 - v
        lengths = torch.ones(steps, dtype=torch.float64)
        lengths[0] = _first(first, high - middle, high - low, steps - 1.0)
        times = clock.t_of_log_snr(-2 * width * torch.logit(high + _shares(lengths) * (low - high)))
        times[0] = clock.t_max
        if last == end:
            times[-1] = clock.t_min
        return cls(times)

    @classmethod
    def karras(cls, clock: Clock, steps: int, rho: float = 7.0) -> Grid:
        """Equal steps in (sigma / alpha)^(1 / rho) (Karras et al., https://arxiv.org/abs/2206.00364, eq. 5)."""
        ends = (-0.5 * clock.log_snr(torch.tensor([clock.t_max, clock.t_min], dtype=torch.float64))).exp()
        first, last = (ends ** (1 / rho)).tolist()
        return cls._pinned(clock.t_of_log_snr(-2 * rho * _line(first, last, steps).log()), clock)

    @classmethod
    def timesteps(cls, table: Levels, steps: int, spacing: str = "trailing", *, offset: int = 0) -> Grid:
        """Timesteps of a discrete table, as pipelines choose them: `steps` levels, and so `steps` calls.

        "leading": k N' with N' = N // steps, plus `offset`; "trailing": N, N - N / steps, .. rounded, minus 1;
        "linspace": equal steps from 0 to N - 1, rounded; level k is at t = (k + 1) / N. The last level is where the
        sample is denoised. Source: Lin et al., https://arxiv.org/abs/2305.08891, table 2 (diffusers' names).

        Args:
            table: a `DiscreteVPSDE`.
            steps: number of levels, from 2 to N.
            spacing: "leading", "trailing" or "linspace".
            offset: added to leading levels (`steps_offset` of a config).

        Raises:
            ValueError: naming the argument that is out of range.
        """
        n = table.levels
        if not 2 <= steps <= n:
            raise ValueError(f"steps must be from 2 to the table's {n} levels; got {steps}.")
        k = torch.arange(steps, dtype=torch.float64)
        spaced = {
            "leading": k.flip(0) * (n // steps) + offset,
            "trailing": (n - k * n / steps).round() - 1,
            "linspace": torch.linspace(n - 1, 0, steps, dtype=torch.float64).round(),
        }
        check_choice("spacing", spacing, spaced)
        return cls((spaced[spacing] + 1) / n)

    @classmethod
    def _pinned(cls, times: Tensor, clock: Clock) -> Grid:
        times[0], times[-1] = clock.t_max, clock.t_min
        return cls(times)

    def all_grids(self) -> tuple[Grid, ...]:
        return (self,)

    @property
    def ends(self) -> tuple[float, float]:
        """The first and the last time."""
        return float(self.times[0]), float(self.times[-1])

    def span(self, t_min: float, t_max: float) -> tuple[float, float]:
        first, last = self.ends
        # Times in single precision may be a rounding outside.
        if not t_min - _ROUNDING * abs(t_min) <= last < first <= t_max + _ROUNDING * abs(t_max):
            raise ValueError(
                f"the grid must lie within t_min={t_min} .. t_max={t_max}; it goes from {first} to {last}."
            )
        return first, last

    def through(self, times: Sequence[float]) -> Grid:
        """The same grid with further times, which lie within it: in place of a time that is as good as the same."""
        further = torch.tensor(times, dtype=torch.float64)
        gaps = self.times.diff().abs()
        room = 0.01 * torch.minimum(gaps[:-1], gaps[1:])
        apart = ((self.times[1:-1, None] - further).abs() > room[:, None]).all(1)
        kept = torch.cat([self.times[:1], self.times[1:-1][apart], self.times[-1:], further])
        return Grid(kept.unique().flip(0))

    def stopping_at(self, times: Sequence[float]) -> tuple[Grid, list[float]]:
        nearest = (self.times[:, None] - torch.tensor(times, dtype=torch.float64)).abs().argmin(0)
        return self, self.times[nearest].tolist()

    def reversed(self) -> Grid:
        """The same times from the last to the first, on the clock u = -t."""
        return Grid(-self.times.flip(0))

    def init(self, t: Time, t_end: float) -> Carry:
        return {}

    def to(self, device: torch.device) -> Grid:
        grid = copy.copy(self)
        grid.times = self.times.to(device)
        return grid

    def target(self, t: Time, t_end: float, carry: Carry) -> Time:
        # Positions go one further where a row has ended.
        return self.times.index_select(0, carry["position"].clamp(max=self.steps))

    def update(
        self, t: Time, s: Time, t_end: float, error: State | None, scale: State | None, carry: Carry
    ) -> Decision:
        return Decision(torch.zeros_like(carry["position"]), {})

    def __repr__(self) -> str:
        return f"Grid({self.steps} steps from {float(self.times[0]):g} to {float(self.times[-1]):g})"


def _first(said: float | None, room: float, whole: float, others: float) -> float:
    """Relative length of a first step: as said, or up to 2, as far as it stays within `room` of `whole`.

    `others` is the sum of the other lengths.
    """
    if said is not None:
        return check_number("first", said, 0.1, 10.0)
    # Of length `room` where the others share what is left, which is all that may be longer.
    return min(2.0, max(1.0, room * others / max(whole - room, 1e-9)))


def _shares(lengths: Tensor) -> Tensor:
    """Where steps of relative lengths, with shape (N,), begin and end, from 0 to 1, with shape (N + 1,)."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0) / lengths.sum()])


def _line(first: float, last: float, steps: int) -> Tensor:
    check_count("steps", steps, 1)
    return torch.linspace(first, last, steps + 1, dtype=torch.float64)
