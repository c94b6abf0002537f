r"""Linear forward diffusions.

Every process here is an affine Ito SDE started from the data at t = 0,

    dx = f(t) x dt + g(t) dw,        x_t | x_0 ~ N(alpha(t) x_0, sigma(t)^2 I),

with `f = d log alpha / dt` and `g^2 = d sigma^2 / dt - 2 f sigma^2` (Sarkka and Solin, "Applied Stochastic
Differential Equations", 2019, ch. 6; Song et al., https://arxiv.org/abs/2011.13456, sec. 3).
Times are float64 vectors with one entry per row, because steps near `t_min` vanish in single precision.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fastsde.batching import expand_like
from fastsde.checks import check_real
from fastsde.types import Coef, State, Time


class Level:
    """What a process is at a time: `alpha`, `sigma` and, on request, `log_snr` from the two; each with shape (B,)."""

    def __init__(self, alpha: Coef, sigma: Coef) -> None:
        self.alpha, self.sigma = alpha, sigma

    @functools.cached_property
    def log_snr(self) -> Coef:
        """log(alpha^2 / sigma^2)."""
        return 2 * (self.alpha.log() - self.sigma.log())


class SDE(ABC):
    """A linear forward SDE on [0, t_max], solved backwards from `t_max` to `t_min`.

    Attributes:
        t_min: where sampling stops and the state is denoised. Positive: the score is singular at 0.
        t_max: where sampling starts, from `prior_std` times a standard normal.
    """

    t_min: float
    t_max: float

    @abstractmethod
    def log_alpha(self, t: Time) -> Coef:
        """Natural logarithm of the signal scale alpha(t), with shape (B,)."""

    @abstractmethod
    def sigma(self, t: Time) -> Coef:
        """Standard deviation of x_t given x_0, with shape (B,)."""

    @abstractmethod
    def f(self, t: Time) -> Coef:
        """Linear drift coefficient d log alpha / dt, with shape (B,)."""

    @abstractmethod
    def g2(self, t: Time) -> Coef:
        """Squared diffusion coefficient g(t)^2, with shape (B,)."""

    @abstractmethod
    def t_of_log_snr(self, log_snr: Coef) -> Time:
        """Inverse of `log_snr`: the time, with shape (B,), at which the log-SNR has the given value."""

    def alpha(self, t: Time) -> Coef:
        """Signal scale alpha(t), with shape (B,)."""
        return self.log_alpha(t).exp()

    def log_snr(self, t: Time) -> Coef:
        """Log signal-to-noise ratio log(alpha^2 / sigma^2), with shape (B,); strictly decreasing in t.

        Half of it is the `lambda` of the DPM-Solver papers.
        """
        return 2 * (self.log_alpha(t) - self.sigma(t).log())

    def level(self, t: Time) -> Level:
        """alpha, sigma and the log-SNR at once, each with shape (B,); a process that can share work does so here."""
        return Level(self.alpha(t), self.sigma(t))

    def transition(self, t: Time, s: Time) -> tuple[Coef, Coef]:
        """a and b^2 of the process from s to t > s, x_t = a x_s + b z: alpha_t / alpha_s, sigma_t^2 - a^2 sigma_s^2.

        Both with shape (B,).
        """
        a = (self.log_alpha(t) - self.log_alpha(s)).exp()
        return a, -(self.sigma(t) ** 2) * torch.expm1(self.log_snr(t) - self.log_snr(s))

    def drift(self, x: State, t: Time) -> State:
        """Forward drift f(t) x, with shape (B, *event)."""
        return expand_like(self.f(t), x) * x

    def reverse_drift(self, x: State, t: Time, score: State) -> State:
        """Drift f(t) x - g(t)^2 score of the reverse-time SDE, dx = [..] dt + g dw for dt < 0, with shape (B, *event).

        Source: Anderson 1982, https://doi.org/10.1016/0304-4149(82)90051-5; thesis eq. 10.2.
        """
        return self.drift(x, t) - expand_like(self.g2(t), x) * score

    def probability_flow_drift(self, x: State, t: Time, score: State) -> State:
        """Drift f(t) x - g(t)^2 score / 2 of the probability-flow ODE, dx = [..] dt, with shape (B, *event).

        It has the marginals of the SDE. Source: Song et al., https://arxiv.org/abs/2011.13456, eq. 13 of sec. 4.3.
        """
        return self.drift(x, t) - expand_like(self.g2(t) / 2, x) * score

    def marginal(self, x_0: State, t: Time, noise: State) -> State:
        """A draw of x_t given x_0: alpha(t) x_0 + sigma(t) noise, with shape (B, *event)."""
        return expand_like(self.alpha(t), x_0) * x_0 + expand_like(self.sigma(t), x_0) * noise

    @property
    def prior_std(self) -> float:
        """Standard deviation of the start of sampling: that of the noise at `t_max`."""
        return float(self.sigma(torch.tensor([self.t_max], dtype=torch.float64)))

    def prior(self, noise: State, t: float | None = None) -> State:
        """The start of sampling, N(0, sigma(t)^2 I) at t = t_max or below, from standard normal `noise` (B, *event)."""
        return noise * float(self.sigma(torch.tensor([self.t_max if t is None else t], dtype=torch.float64)))

    def _set_range(self, t_min: float, t_max: float, *, upper: float | None = None) -> None:
        """Sets the time range; a ValueError if it is empty, starts at or below 0, or ends above `upper`."""
        name, top = type(self).__name__, "" if upper is None else f" <= {upper}"
        for key, value in (("t_min", t_min), ("t_max", t_max)):
            check_real(f"{key} of {name}", value)
        if not (0 < t_min < t_max < math.inf and (upper is None or t_max <= upper)):
            raise ValueError(f"{name} needs 0 < t_min < t_max{top}; got t_min={t_min}, t_max={t_max}.")
        self.t_min, self.t_max = t_min, t_max

    def __repr__(self) -> str:
        fields = ", ".join(f"{k}={_short(v)}" for k, v in vars(self).items() if not k.startswith("_"))
        return f"{type(self).__name__}({fields})"


def _short(value: object) -> str:
    return f"<{value.numel()} values>" if isinstance(value, Tensor) else repr(value)
