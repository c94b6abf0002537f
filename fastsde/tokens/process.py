r"""The forward process of masked diffusion: every token becomes the mask, independently, and stays it.

At the time t of a schedule a token is masked with chance `share(t)`, which is 1 - alpha(t) in most papers. A sampler
needs no schedule: its clock is the masked share itself. So one step takes a masked token from the share t to s < t:

    it stays masked with chance s / t, and is drawn from p(x_l | the rest) otherwise,

whatever the schedule (Sahoo et al., https://arxiv.org/abs/2406.07524, eq. 6, with their alpha = 1 - share). A schedule
says where the steps of a grid end, which time a network is told, and how a training loss is weighted.

Two different schedules are called "cosine" in the field. So schedules have the names of their formulas here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastsde.checks import check_count, check_instance, check_kind, check_positive
from fastsde.control import Grid
from fastsde.types import Coef, Time, Tokens

MASK = -1
"""The mask in states of the engine and in results, whatever id it has for the network."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The masked share as a function of a time from 0 to 1.

    Attributes:
        formula: the share, in words of mathematics.
        share: rises from 0 at t = 0 to 1 at t = 1.
        time: the inverse of `share`.
        slope: the derivative of `share`.
    """

    formula: str
    share: Callable[[Tensor], Tensor]
    time: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]

    def __repr__(self) -> str:
        return f"Schedule({self.formula})"


_HALF_PI = math.pi / 2

LINEAR = Schedule("t", lambda t: t, lambda u: u, torch.ones_like)
"""MDLM's log-linear schedule (without its eps), LLaDA, Dream; "linear" or "uniform" of MaskGIT."""
SINE = Schedule(
    "sin(pi t / 2)",
    lambda t: torch.sin(_HALF_PI * t),
    lambda u: torch.asin(u) / _HALF_PI,
    lambda t: _HALF_PI * torch.cos(_HALF_PI * t),
)
"""The "cosine" of MaskGIT, Muse, aMUSEd and Token-Critic: cos(pi r / 2) of the progress r = 1 - t. Few tokens early."""
ONE_MINUS_COSINE = Schedule(
    "1 - cos(pi t / 2)",
    lambda t: 2 * torch.sin(_HALF_PI / 2 * t) ** 2,
    lambda u: 2 * torch.asin((u / 2).sqrt()) / _HALF_PI,
    lambda t: _HALF_PI * torch.sin(_HALF_PI * t),
)
"""The "cosine" of MDLM: alpha = cos(pi t / 2). Many tokens early."""
SINE_SQUARED = Schedule(
    "sin^2(pi t / 2)",
    lambda t: torch.sin(_HALF_PI * t) ** 2,
    lambda u: torch.asin(u.sqrt()) / _HALF_PI,
    lambda t: _HALF_PI * torch.sin(math.pi * t),
)
"""The "cosine squared" of MDLM: alpha = cos^2(pi t / 2)."""
ARCCOSINE = Schedule(
    "(2 / pi) arccos(1 - t)",
    lambda t: torch.acos(1 - t) / _HALF_PI,
    lambda u: 1 - torch.cos(_HALF_PI * u),
    lambda t: 1 / (_HALF_PI * (t * (2 - t)).sqrt()),
)
"""Of Halton-MaskGIT."""


def power(p: float) -> Schedule:
    """1 - (1 - t)^p: MaskGIT's "square" (p = 2), "cubic" (3) and "root" (1/2) of the progress 1 - t.

    Raises:
        ValueError: if p is not positive.
    """
    p = check_positive("p", p)
    return Schedule(
        f"1 - (1 - t)^{p:g}",
        lambda t: 1 - (1 - t) ** p,
        lambda u: 1 - (1 - u) ** (1 / p),
        lambda t: p * (1 - t) ** (p - 1),
    )


def exponential(n: int) -> Schedule:
    """1 - n^-t, divided by its end: MaskGIT's "exp" for n tokens. At 1 it would end at 1 - 1 / n.

    Raises:
        ValueError: if n is less than 2.
    """
    rate = math.log(check_count("n", n, 2))
    end = -math.expm1(-rate)
    return Schedule(
        f"(1 - {n}^-t) / (1 - 1 / {n})",
        lambda t: -torch.expm1(-rate * t) / end,
        lambda u: -torch.log1p(-end * u) / rate,
        lambda t: rate * torch.exp(-rate * t) / end,
    )


class Masking:
    """The process, with its schedule. On the clock of the samplers, t is the masked share, from 1 down to 0.

    Args:
        schedule: how the masked share depends on the time of training and of the network.

    Raises:
        TypeError: if it is no `Schedule`.
    """

    t_min, t_max = 0.0, 1.0

    def __init__(self, schedule: Schedule = LINEAR) -> None:
        check_instance("schedule", schedule, Schedule, "a Schedule such as fastsde.tokens.SINE")
        self.schedule = schedule

    def __repr__(self) -> str:
        return f"Masking({self.schedule})"

    def share(self, t: Time) -> Coef:
        """The masked share at times of the schedule, with shape (B,)."""
        return self.schedule.share(t)

    def time(self, share: Coef) -> Time:
        """The time of the schedule at which so much is masked, with shape (B,)."""
        return self.schedule.time(share.clamp(0, 1))

    def weight(self, t: Time) -> Coef:
        """w(t) = share'(t) / share(t) of the masked NELBO, with shape (B,)."""
        return self.schedule.slope(t) / self.schedule.share(t)

    def grid(self, steps: int) -> Grid:
        """Equal steps in the time of the schedule, as masked shares.

        Raises:
            ValueError: if `steps` is no positive integer.
        """
        times = self.schedule.share(torch.linspace(1, 0, check_count("steps", steps, 1) + 1, dtype=torch.float64))
        times[0], times[-1] = 1.0, 0.0
        return Grid(times)

    def mask(self, x_0: Tokens, t: Time, uniform: Tensor, free: Tensor | None = None) -> Tokens:
        """A draw of the state at the time t of the schedule: each free token is masked with chance `share(t)`.

        Args:
            x_0: tokens, with shape (B, *event).
            t: times, with shape (B,).
            uniform: in (0, 1), with shape (B, *event).
            free: which positions may be masked, with shape (B, *event); all by default.
        """
        check_kind("free", free, Tensor, "a mask with the shape of the tokens")
        masked = uniform < self.share(t).reshape(-1, *(1,) * (x_0.ndim - 1))
        return x_0.masked_fill(masked if free is None else masked & free, MASK)

    def posterior(self, t: Coef, s: Coef) -> Coef:
        """Chance that a token masked at the share t is known at the share s < t: (t - s) / t, with shape (B,)."""
        return (t - s) / t
