"""Step size control from an error estimate, per sample."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from fastsde.checks import check_number, check_positive
from fastsde.control.base import Clock, Controller, Decision, Verdict, scaled_error
from fastsde.noise import RESOLUTION
from fastsde.types import Carry, Coef, Mask, State, Time


@dataclasses.dataclass(frozen=True)
class Adaptive(Controller):
    r"""Accepts a step if its scaled error is at most 1, and chooses the next step size from that error.

        E = || error / max(atol, rtol scale) ||_q / d^(1/q),    accept if E <= limit,    h <- safety h E^-r

    The rule and its constants are those of thesis sec. 10.4.1 and Algorithm 6. (The prose of sec. 10.4.2 names q =
    infinity as default; the algorithm, the released code and Table D.2 use q = 2, and so does this class.)

    Two things are added. First, h is rounded to six significant bits, in units of the Brownian path's resolution. A
    Brownian path is rough: a change of 1e-7 in a time changes its value by 3e-4, the next time by more, and after a few
    steps the whole sample. With rounded steps the last digits of the network's output do not change the times, so a
    sample is the same at any batch size. Rounding changes h by at most 1.6 %, and after a rejection makes it smaller by
    at most 3 %. Second, h grows at most tenfold from one step to the next. In few dimensions an error can be tiny by
    accident, and the next step would be far too long.

    No step is below the smallest one. If a step of that size is rejected, the sample ends with `Status.MIN_STEP`.

    Args:
        rtol: relative tolerance, positive.
        atol: absolute tolerance in units of the data, positive.
        r: exponent of the error, in (0, 2]; anything in [0.5, 1] works.
        safety: theta in (0, 1].
        h_init: first step, in units of time (or of the clock), positive; cut to the time range.
        norm: 2 or `math.inf`.
        growth: largest ratio of a step to the one before, above 1.
        limit: largest E that is accepted, at least 1; `math.inf` to reject nothing. If it is above 1, only very large
            errors are rejected. Smaller ones only decide the size of the next step.
        resolution: smallest step, as a share of the time range; by default that of a Brownian path.
        stops: times that every sample steps on exactly, in any order.
        clock: an SDE, to choose steps in its log-SNR instead of t. Then h is a difference of log-SNR. For solvers whose
            error depends on the log-SNR, and not on t.
        mirrored: whether the engine runs on u = -t.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    adaptive = True

    rtol: float
    atol: float
    r: float = 0.9
    safety: float = 0.9
    h_init: float = 0.01
    norm: float = 2.0
    growth: float = 10.0
    limit: float = 1.0
    resolution: float = RESOLUTION
    stops: tuple[float, ...] = ()
    clock: Clock | None = None
    mirrored: bool = False

    def __post_init__(self) -> None:
        limits = {"rtol": math.inf, "atol": math.inf, "r": 2, "safety": 1, "h_init": math.inf}
        for name, most in limits.items():
            if check_positive(name, getattr(self, name)) > most:
                raise ValueError(f"{name} must be positive and at most {most}; got {getattr(self, name)!r}.")
        if not isinstance(self.norm, (int, float)) or self.norm not in (2.0, math.inf):
            raise ValueError(f"norm must be 2 or math.inf; got {self.norm!r}.")
        check_number("growth", self.growth, 1.0, ends="(]")
        check_number("limit", self.limit, 1.0)
        check_number("resolution", self.resolution, 0.0, 1.0, ends="()")
        if not isinstance(self.stops, tuple) or not all(isinstance(t, float) and math.isfinite(t) for t in self.stops):
            raise ValueError(f"stops must be a tuple of finite floats; got {self.stops!r}.")

    def span(self, t_min: float, t_max: float) -> tuple[float, float]:
        outside = [t for t in self.stops if not t_min <= t <= t_max]
        if outside:
            raise ValueError(f"stops must lie within t_min={t_min} .. t_max={t_max}; got {outside}.")
        return t_max, t_min

    def stopping_at(self, times: Sequence[float]) -> tuple[Adaptive, list[float]]:
        return dataclasses.replace(self, stops=(*self.stops, *times)), list(times)

    def reversed(self) -> Adaptive:
        return dataclasses.replace(self, stops=tuple(-t for t in self.stops), mirrored=not self.mirrored)

    def _position(self, t: Time) -> Time:
        """Where t is on the clock of the steps, which falls as t does, with shape (B,)."""
        sign = -1 if self.mirrored else 1
        return t if self.clock is None else -sign * self.clock.log_snr(sign * t)

    def _time(self, position: Time) -> Time:
        """The inverse of `_position`."""
        sign = -1 if self.mirrored else 1
        return position if self.clock is None else sign * self.clock.t_of_log_snr(-sign * position)

    def init(self, t: Time, t_end: float) -> Carry:
        h_min = (self._position(t) - self._position(torch.full_like(t, t_end))) * self.resolution
        # A first step below the resolution would round to 0 and never move.
        h = self._round(torch.full_like(t, self.h_init), h_min, down=h_min < 0).maximum(h_min)
        return {"h": h, "h_min": h_min}

    def target(self, t: Time, t_end: float, carry: Carry) -> Time:
        position, stop = self._position(t) - carry["h"], torch.full_like(t, t_end)
        if self.stops:
            stops = torch.tensor(sorted({t_end, *self.stops}), dtype=torch.float64, device=t.device)
            stop = stops[(torch.searchsorted(stops, t) - 1).clamp(min=0)]
        # A remainder below the smallest step is taken along: it would cost calls and see a path it cannot resolve.
        return torch.where(position - self._position(stop) < carry["h_min"], stop, self._time(position))

    def update(
        self, t: Time, s: Time, t_end: float, error: State | None, scale: State | None, carry: Carry
    ) -> Decision:
        scaled, h_min = scaled_error(error, scale, self.rtol, self.atol, self.norm), carry["h_min"]
        accept = scaled <= self.limit
        tried = self._position(t) - self._position(s)
        h = self._round(tried * (self.safety * scaled.pow(-self.r)).clamp(max=self.growth), h_min, down=~accept)
        if self.stops:
            # A step cut short to meet a stop says nothing against the length it was meant to have.
            h = torch.where(accept & (tried < carry["h"]), h.maximum(carry["h"]), h)
        carry = {"h": h.maximum(h_min), "h_min": h_min}
        # On a kept path the same step would be rejected for ever.
        stuck = ~accept & (self.target(t, t_end, carry) <= s)
        verdict = torch.where(accept, int(Verdict.ACCEPT), int(Verdict.REJECT))
        verdict = verdict.masked_fill(stuck, int(Verdict.TOO_SHORT))
        verdict = verdict.masked_fill(~torch.isfinite(scaled), int(Verdict.NOT_FINITE))
        return Decision(verdict, carry)

    def _round(self, h: Coef, unit: Coef, down: Mask) -> Coef:
        """h to six significant bits of a whole number of units, at most the whole range, with shape (B,).

        `down` where the step was rejected: a step of few units, asked to shrink by a tenth, must not come back as it
        was.
        """
        count = (h / unit).clamp(max=1 / self.resolution)
        spacing = torch.ldexp(torch.ones_like(count), (torch.frexp(count).exponent - 6).clamp(min=0))
        count = count / spacing
        return torch.where(down, count.floor(), count.round()) * spacing * unit
