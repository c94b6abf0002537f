"""The sigma-space process of EDM."""

from __future__ import annotations

import torch

from fastsde.sde.base import SDE
from fastsde.types import Coef, Time


class EDM(SDE):
    r"""EDM's process, whose time is its noise scale: dx = sqrt(2 t) dw.

        alpha(t) = 1,    sigma(t) = t,    g(t)^2 = 2 t

    Source: Karras et al., https://arxiv.org/abs/2206.00364, table 1 (defaults: their sampling range).

    Args:
        t_min: smallest noise scale, positive, in units of the data.
        t_max: largest noise scale.

    Raises:
        ValueError: if the range is not ordered as said.
    """

    def __init__(self, *, t_min: float = 0.002, t_max: float = 80.0) -> None:
        self._set_range(t_min, t_max)

    def log_alpha(self, t: Time) -> Coef:
        return torch.zeros_like(t)

    def sigma(self, t: Time) -> Coef:
        return t.clone()

    def f(self, t: Time) -> Coef:
        return torch.zeros_like(t)

    def g2(self, t: Time) -> Coef:
        return 2 * t

    def t_of_log_snr(self, log_snr: Coef) -> Time:
        return (-0.5 * log_snr).exp()
