"""Sub-variance-preserving diffusion."""

from __future__ import annotations

import torch

from fastsde.sde.vp import LinearBeta
from fastsde.types import Coef, Time


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
