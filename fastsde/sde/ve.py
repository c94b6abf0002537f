"""Variance-exploding diffusion."""

from __future__ import annotations

import math

import torch

from fastsde.checks import check_real
from fastsde.sde.base import SDE
from fastsde.types import Coef, Time


class VESDE(SDE):
    r"""Variance exploding: dx = g(t) dw with geometrically growing noise.

        alpha(t) = 1,    sigma(t) = sigma_min R^t,    g(t)^2 = 2 log(R) sigma(t)^2,    R = sigma_max / sigma_min

    The transition kernel of this SDE has variance sigma(t)^2 - sigma(0)^2. Like all published models and their
    networks, we take sigma(t)^2. This means that the data already have noise sigma_min. The defaults are the constants
    of Song et al. (https://arxiv.org/abs/2011.13456, app. C) for CIFAR-10 scaled to [0, 1].

    Args:
        sigma_min: noise scale at t = 0, positive, in units of the data.
        sigma_max: noise scale at t = 1; about the largest distance between two data points.
        t_min: end of sampling, positive.
        t_max: start of sampling.

    Raises:
        ValueError: if the scales or the time range are not ordered as said.
    """

    def __init__(
        self, sigma_min: float = 0.01, sigma_max: float = 50.0, *, t_min: float = 1e-5, t_max: float = 1.0
    ) -> None:
        for key, value in (("sigma_min", sigma_min), ("sigma_max", sigma_max)):
            check_real(f"{key} of VESDE", value)
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(f"VESDE needs 0 < sigma_min < sigma_max; got {sigma_min} and {sigma_max}.")
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self._set_range(t_min, t_max)
        self._log_ratio = math.log(sigma_max / sigma_min)

    def log_alpha(self, t: Time) -> Coef:
        return torch.zeros_like(t)

    def sigma(self, t: Time) -> Coef:
        return self.sigma_min * (self._log_ratio * t).exp()

    def f(self, t: Time) -> Coef:
        return torch.zeros_like(t)

    def g2(self, t: Time) -> Coef:
        return 2 * self._log_ratio * self.sigma(t) ** 2

    def t_of_log_snr(self, log_snr: Coef) -> Time:
        return (-0.5 * log_snr - math.log(self.sigma_min)) / self._log_ratio
