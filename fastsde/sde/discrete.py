"""Any table of discrete betas, read as a continuous variance-preserving process."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastsde.sde.vp import VariancePreserving
from fastsde.types import Coef, Time

_MOST_NOISE = 160.0
"""sigma / alpha of the default start: a little above that of DDPM's linear table, 157."""


class DiscreteVPSDE(VariancePreserving):
    r"""The continuous VP process through a table of N noise levels, as diffusion checkpoints store it.

        alpha(t_k)^2 = alpha_bar_k at t_k = (k + 1) / N,    log alpha linear between levels and 0 at t = 0,
        sigma^2 = 1 - alpha^2,    f = d log alpha / dt,    g^2 = -2 f

    Level k of the table belongs to t = (k + 1) / N. So the network's timestep is `N t - 1`. With `N t` the noise near
    the data would be wrong by a whole level. Interpolating log alpha is the choice of Lu et al.,
    https://arxiv.org/abs/2206.00927, app. D.4.

    Args:
        betas: the N betas, each in (0, 1). Give these or `alphas_cumprod`.
        alphas_cumprod: the N cumulative products of 1 - beta, strictly decreasing inside (0, 1).
        t_min: end of sampling; level k = 0, that is 1 / N, by default.
        t_max: start of sampling, at most 1. By default 1, or where sigma / alpha is 160 if the table goes on to more
            noise. (Cosine tables reach 20,000, zero terminal SNR infinity.) There the denoised sample is only the mean
            of the data, and an error of the network's epsilon is multiplied by sigma / alpha.

    Raises:
        ValueError: if not exactly one table is given, or it is not as said.
    """

    def __init__(
        self,
        betas: Sequence[float] | Tensor | None = None,
        *,
        alphas_cumprod: Sequence[float] | Tensor | None = None,
        t_min: float | None = None,
        t_max: float | None = None,
    ) -> None:
        if (betas is None) == (alphas_cumprod is None):
            raise ValueError("DiscreteVPSDE needs exactly one of betas and alphas_cumprod.")
        name, given = ("betas", betas) if betas is not None else ("alphas_cumprod", alphas_cumprod)
        try:
            table = torch.as_tensor(given, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(f"{name} must be a vector of numbers; got {str(given)[:80]}.") from error
        inside = table.ndim == 1 and len(table) > 0 and bool(((table > 0) & (table < 1)).all())
        if betas is not None:
            if not inside:
                raise ValueError(f"betas must be one-dimensional with every value in (0, 1); got {str(given)[:80]}.")
            log_alpha_bar = torch.log1p(-table).cumsum(0)
        else:
            if not inside or not (table.diff() < 0).all():
                raise ValueError(
                    "alphas_cumprod must be one-dimensional and strictly decreasing inside (0, 1); a last value of 0 "
                    "(zero terminal SNR) has no finite score."
                )
            log_alpha_bar = table.log()
        self.levels = len(log_alpha_bar)
        table = torch.cat([torch.zeros(1, dtype=torch.float64), 0.5 * log_alpha_bar])
        self._tables = {torch.device("cpu"): table}
        if t_max is None:
            all_noise = torch.tensor([-2 * math.log(_MOST_NOISE)], dtype=torch.float64)
            t_max = min(1.0, float(self.t_of_log_snr(all_noise)))
        self._set_range(1 / self.levels if t_min is None else t_min, t_max, upper=1.0)

    def _table(self, device: torch.device) -> Tensor:
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device)
        return self._tables[device]

    def _slope(self, cell: Tensor) -> Tensor:
        table = self._table(cell.device)
        return table[cell + 1] - table[cell]

    def log_alpha(self, t: Time) -> Coef:
        position = t * self.levels
        cell = position.long().clamp(0, self.levels - 1)
        table = self._table(t.device)
        return torch.lerp(table.take(cell), table.take(cell + 1), (position - cell).to(table.dtype))

    def f(self, t: Time) -> Coef:
        # On a level itself the slope is that of the cell below, where a backward step goes.
        cell = (t * self.levels).ceil().long() - 1
        return self._slope(cell.clamp(0, self.levels - 1)) * self.levels

    def g2(self, t: Time) -> Coef:
        return -2 * self.f(t)

    def t_of_log_snr(self, log_snr: Coef) -> Time:
        log_alpha = 0.5 * torch.nn.functional.logsigmoid(log_snr)
        table = self._table(log_snr.device)
        cell = (torch.searchsorted(-table, -log_alpha) - 1).clamp(0, self.levels - 1)
        return (cell + (log_alpha - table[cell]) / self._slope(cell)) / self.levels
