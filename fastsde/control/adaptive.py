"""Step size control from an error estimate, per sample."""

from __future__ import annotations

import dataclasses
import math

import torch

from fastsde.batching import row_norm
from fastsde.control.base import Controller, Decision
from fastsde.noise import RESOLUTION
from fastsde.result import Status
from fastsde.types import Carry, State, Time


@dataclasses.dataclass(frozen=True)
class Adaptive(Controller):
    r"""Accepts a step if its scaled error is at most 1, and chooses the next step size from that error.

        E = || error / max(atol, rtol scale) ||_q / d^(1/q),    accept if E <= 1,    h <- safety h E^-r

    The rule and its constants are those of thesis sec. 10.4.1 and Algorithm 6. (The prose of sec. 10.4.2 names q =
    infinity as default; the algorithm, the released code and Table D.2 use q = 2, and so does this class.)

    Args:
        rtol: relative tolerance, positive.
        atol: absolute tolerance in units of the data, not negative.
        r: exponent of the error; anything in [0.5, 1] works.
        safety: theta in (0, 1].
        h_init: first step, in units of time; cut to the time range.
        norm: 2 or `math.inf`.
        h_min: smallest step, in units of time; a row that asks for less ends with `Status.MIN_STEP`. By default 2^-16
            of the time range, the resolution of the Brownian path.

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
    h_min: float | None = None

    def __post_init__(self) -> None:
        for name, low, high in (("rtol", 0, math.inf), ("r", 0, 2), ("safety", 0, 1), ("h_init", 0, math.inf)):
            if not low < getattr(self, name) <= high or math.isinf(getattr(self, name)):
                raise ValueError(f"{name} must be finite and in ({low}, {high}]; got {getattr(self, name)}.")
        if not 0 <= self.atol < math.inf:
            raise ValueError(f"atol must be finite and not negative; got {self.atol}.")
        if self.norm not in (2.0, math.inf):
            raise ValueError(f"norm must be 2 or math.inf; got {self.norm}.")
        if self.h_min is not None and not 0 < self.h_min <= self.h_init:
            raise ValueError(f"h_min must be in (0, h_init={self.h_init}]; got {self.h_min}.")

    def check(self, t_min: float, t_max: float) -> None:
        if self.h_min is not None and self.h_min >= t_max - t_min:
            raise ValueError(f"h_min={self.h_min} leaves no step in the time range [{t_min}, {t_max}].")

    def init(self, t: Time, t_end: float) -> Carry:
        h_min = (t - t_end) * RESOLUTION if self.h_min is None else torch.full_like(t, self.h_min)
        return {"h": torch.full_like(t, self.h_init), "h_min": h_min}

    def target(self, t: Time, t_end: float, carry: Carry) -> Time:
        s = t - carry["h"]
        # A remainder below the smallest step is taken along: it would cost calls and see a path it cannot resolve.
        return torch.where(s - t_end < carry["h_min"], torch.full_like(s, t_end), s)

    def update(
        self, t: Time, s: Time, t_end: float, error: State | None, scale: State | None, carry: Carry
    ) -> Decision:
        if error is None or scale is None:
            raise ValueError("the solver gives no error estimate; it needs a Grid.")
        scaled = row_norm(error / (self.rtol * scale).clamp(min=self.atol), q=self.norm)
        h = self.safety * (t - s) * scaled.pow(-self.r)
        accept = scaled <= 1
        # masked_fill rather than indexing: a boolean index would wait for the device.
        failure = torch.full(t.shape, int(Status.PENDING), device=t.device)
        failure = failure.masked_fill((h < carry["h_min"]) & ~(accept & (s <= t_end)), int(Status.MIN_STEP))
        failure = failure.masked_fill(~torch.isfinite(scaled), int(Status.NON_FINITE))
        return Decision(accept, {"h": h, "h_min": carry["h_min"]}, failure)
