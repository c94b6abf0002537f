"""Rectified flow, read as a diffusion."""

from __future__ import annotations

import torch

from fastsde.sde.base import SDE
from fastsde.types import Coef, Time


class RectifiedFlow(SDE):
    r"""The straight path between data and noise, x_t = (1 - t) x_0 + t eps, as a linear SDE.

        alpha(t) = 1 - t,    sigma(t) = t,    f(t) = -1 / (1 - t),    g(t)^2 = 2 t / (1 - t)

    Source: Lipman et al., https://arxiv.org/abs/2210.02747; Liu et al., https://arxiv.org/abs/2209.03003. The
    coefficients are infinite at t = 1. So sampling starts a little below it, where the share of the data is
    alpha(t_max).

    Args:
        t_min: end of sampling, positive.
        t_max: start of sampling, below 1.

    Raises:
        ValueError: if the range is not ordered as said.
    """

    def __init__(self, *, t_min: float = 1e-3, t_max: float = 0.999) -> None:
        self._set_range(t_min, t_max, upper=1 - 1e-6)

    def log_alpha(self, t: Time) -> Coef:
        return torch.log1p(-t)

    def sigma(self, t: Time) -> Coef:
        return t.clone()

    def f(self, t: Time) -> Coef:
        return -1 / (1 - t)

    def g2(self, t: Time) -> Coef:
        return 2 * t / (1 - t)

    def t_of_log_snr(self, log_snr: Coef) -> Time:
        return torch.sigmoid(-0.5 * log_snr)
