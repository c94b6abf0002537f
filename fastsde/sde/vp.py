r"""Variance-preserving and sub-variance-preserving diffusion with a linear beta(t)."""

from __future__ import annotations

import math

import torch

from fastsde.checks import check_real
from fastsde.sde.base import SDE, Level
from fastsde.types import Coef, Time


class LinearBeta(SDE):
    r"""What VP and sub-VP share: beta(t) = beta_min + t (beta_max - beta_min) and alpha(t).

    B(t) = int_0^t beta = beta_min t + (beta_max - beta_min) t^2 / 2,    alpha(t) = exp(-B(t) / 2)
    """

    def __init__(
        self, beta_min: float = 0.1, beta_max: float = 20.0, *, t_min: float = 1e-3, t_max: float = 1.0
    ) -> None:
        name = type(self).__name__
        for key, value in (("beta_min", beta_min), ("beta_max", beta_max)):
            check_real(f"{key} of {name}", value)
        if not 0 < beta_min <= beta_max < math.inf:
            raise ValueError(f"{name} needs 0 < beta_min <= beta_max; got {beta_min} and {beta_max}.")
        self.beta_min, self.beta_max = beta_min, beta_max
        self._set_range(t_min, t_max)

    def beta(self, t: Time) -> Coef:
        """The noise rate beta(t), with shape (B,)."""
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def log_alpha(self, t: Time) -> Coef:
        return -0.5 * (self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t**2)

    def f(self, t: Time) -> Coef:
        return -0.5 * self.beta(t)

    def t_of_log_alpha(self, log_alpha: Coef) -> Time:
        """The positive root of B(t) = -2 log alpha, with shape (B,)."""
        slope, integral = self.beta_max - self.beta_min, -2 * log_alpha
        # The textbook root divides by the slope; this form also holds for a constant beta.
        return 2 * integral / (self.beta_min + (self.beta_min**2 + 2 * slope * integral).sqrt())


class VariancePreserving(SDE):
    """sigma^2 = 1 - alpha^2: `level` has the formulas, and the rest reads it."""

    def level(self, t: Time) -> Level:
        log_alpha = self.log_alpha(t)
        return Level(log_alpha.exp(), torch.expm1(2 * log_alpha).neg().sqrt())

    def sigma(self, t: Time) -> Coef:
        return self.level(t).sigma

    def log_snr(self, t: Time) -> Coef:
        return self.level(t).log_snr


class VPSDE(VariancePreserving, LinearBeta):
    r"""Variance preserving: dx = -beta(t) x / 2 dt + sqrt(beta(t)) dw.

        alpha(t) = exp(-B(t) / 2),    sigma(t)^2 = 1 - alpha(t)^2,    g(t)^2 = beta(t)

    The defaults are the published constants of Song et al. (https://arxiv.org/abs/2011.13456, app. C)
    with sampling stopped at t = 1e-3.

    Args:
        beta_min: beta at t = 0, positive.
        beta_max: beta at t = 1, at least `beta_min`.
        t_min: end of sampling, positive.
        t_max: start of sampling.

    Raises:
        ValueError: if the betas or the time range are not ordered as said.
    """

    def g2(self, t: Time) -> Coef:
        return self.beta(t)

    def t_of_log_snr(self, log_snr: Coef) -> Time:
        # alpha^2 = sigmoid(log_snr)
        return self.t_of_log_alpha(0.5 * torch.nn.functional.logsigmoid(log_snr))


class SubVPSDE(LinearBeta):
    r"""Sub-VP: the drift of VP with less noise, so that x_t never has more variance than under VP.

        alpha(t) = exp(-B(t) / 2),    sigma(t) = 1 - alpha(t)^2,    g(t)^2 = beta(t) (1 - alpha(t)^4)

    Source: Song et al., https://arxiv.org/abs/2011.13456, eqs. 13-14 and app. B. Arguments and errors as for `VPSDE`.
    """

    def sigma(self, t: Time) -> Coef:
        return -torch.expm1(2 * self.log_alpha(t))

    def g2(self, t: Time) -> Coef:
        return -self.beta(t) * torch.expm1(4 * self.log_alpha(t))

    def t_of_log_snr(self, log_snr: Coef) -> Time:
        # With r = alpha / (1 - alpha^2), alpha is the positive root of r alpha^2 + alpha - r = 0.
        ratio = (0.5 * log_snr).exp()
        return self.t_of_log_alpha((2 * ratio / (1 + (1 + 4 * ratio**2).sqrt())).log())
