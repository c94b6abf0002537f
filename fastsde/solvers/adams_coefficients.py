"""What of an exponential Adams step depends on times alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from fastsde.sde.base import Level
from fastsde.solvers.adams_weights import stage_weights
from fastsde.solvers.base import Solver
from fastsde.types import Carry, Coef, Index


class AdamsCoefficients(Solver):
    """The coefficients of `ExponentialAdams`, whose formulas and terms these are."""

    midpoint: ClassVar[bool] = True  # a polynomial of degree 1 gets m_0 / 2 rather than m_1: better at few calls
    interpolates_noise: ClassVar[bool] = False  # interpolate eps rather than D: y / rho then grows, c = -1

    eta: float | Callable[[Coef], Coef]

    @property
    def values(self) -> tuple[int, int]:
        """How many predictions the predictor and the corrector (0: none) read."""
        raise NotImplementedError

    def combine_moments(self, m_0: Coef, m: Tensor) -> Tensor:
        """The right-hand sides of the weights for as many differences as `m` has columns, with shape (B, q)."""
        return m_0[:, None] / 2 if self.midpoint and m.shape[1] == 1 else m

    def share(self, a: Coef) -> Coef | None:
        """The share of the highest order, the rest being the order below, with shape (B,); None for all of it.

        For solvers whose predictor and corrector read equally many values.
        """
        return None

    def coefficients(self, now: Level, end: Level, lams: Tensor, count: Index) -> Carry:
        """What steps need beside states, each with leading axis B.

        Args:
            now, end: of the process, where the steps start and where they end.
            lams: where the last predictions were made, the newest first, with shape (B, values kept).
            count: how many of them there are, with shape (B,).
        """
        lam, lam_s = now.log_snr / 2, end.log_snr / 2
        h = lam_s - lam
        eta = torch.as_tensor(self.eta((-lam).exp()) if callable(self.eta) else self.eta, dtype=h.dtype)
        a = -h if self.interpolates_noise else (1 + eta**2) * h
        ratio = end.alpha / now.alpha
        keep, gain = (ratio, end.sigma) if self.interpolates_noise else (ratio * (-a).exp(), end.alpha)
        std = end.sigma * (-torch.expm1(-2 * eta**2 * h)).sqrt()
        nodes = (lams[:, 1:] - lam[:, None]) / torch.where(h == 0, 1.0, h)[:, None]  # warm-up: all weights vanish
        weights = gain[:, None, None] * stage_weights(a, nodes, count, self.values, self.combine_moments, self.share(a))
        level = torch.stack([end.alpha, end.sigma], 1)
        return {"keep": keep, "std": std, "weights": weights, "a": a, "h": h, "level": level, "lam_s": lam_s}
