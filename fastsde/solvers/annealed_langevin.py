"""Annealed Langevin sampling (ALS), on any linear SDE."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from fastsde.batching import expand_like
from fastsde.checks import check_number, check_steps
from fastsde.noise import StepNoise
from fastsde.score.base import BoundModel
from fastsde.sde.base import SDE
from fastsde.solvers.base import Solver, Step
from fastsde.solvers.runge_kutta import noise_level
from fastsde.types import Carry, State, Time


@dataclasses.dataclass(frozen=True)
class Annealed(Solver):
    """Steps of size eta at falling levels of noise: what `AnnealedLangevin` and `ConsistentAnnealed` share."""

    grid_hint = "levels=..."
    noise = "fresh"
    log_snr_steps = True

    levels: int | None = None
    n_sigma: int = 1
    eta: float | None = None

    def __post_init__(self) -> None:
        check_steps(self.levels, "levels", 2)
        check_steps(self.n_sigma, "n_sigma")
        if self.eta is not None:
            check_number("eta (= eps / sigma_L^2)", self.eta, 0.0, self.most_eta, ends="()")


@dataclasses.dataclass(frozen=True)
class AnnealedLangevin(Annealed):
    r"""Algorithm 4: `n_sigma` Langevin steps at each of L falling noise levels.

        x <- x + eta sigma_i^2 score(x, sigma_i) + sqrt(2 eta) sigma_i z    (n_sigma times)
           = (1 - eta) x + eta alpha_i H(x, sigma_i) + sqrt(2 eta) sigma_i z,    eta = eps / sigma_L^2

    with H the expected denoised sample (Proposition 3). The thesis writes it for VE; on any linear SDE it is the same
    algorithm for y = x / alpha at the levels rho = sigma / alpha, so between levels x is only rescaled,
    x <- x alpha_{i+1} / alpha_i. The noise in x always exceeds the level it is taken for (Proposition 1). The result
    carries the noise of the last level; `denoise=True` of `sample` takes H of it (the EDS), one more call. Algorithm 4
    starts from data with noise (`x_data=` of `sample`), from noise (the default) or from anything (`x_init=`; the
    released code's is `torch.rand`). Source: Song and Ermon, https://arxiv.org/abs/1907.05600; thesis algorithms 1, 4.

    Args:
        levels: L, uniform in log-SNR, that is geometric in rho; or `controller=Grid(...)`, whose times are the levels.
        n_sigma: Langevin steps at each level.
        eta: step size eps / sigma_L^2 in (0, 1); by default the one that keeps the noise closest to its level along
            these levels (`closest_step`).

    Raises:
        ValueError: naming the argument that is out of range.
    """

    convergence = "none at fixed n_sigma"
    cost = "n_sigma (also at the first level)"
    use = "the original sampler of score matching"
    warm_up = True
    most_eta = 1.0

    @property
    def steps(self) -> int | None:
        return None if self.levels is None else self.levels - 1

    @property
    def calls_per_step(self) -> int:
        return self.n_sigma

    def check(self, sde: SDE, times: Tensor | None) -> None:
        if self.levels is None and self.eta is None:
            raise ValueError("AnnealedLangevin needs levels=..., or eta=... where a controller gives the levels.")

    def step(self, model: BoundModel, sde: SDE, x_t: State, t: Time, s: Time, noise: StepNoise, carry: Carry) -> Step:
        eta = self.eta
        if eta is None:
            ends = noise_level(sde, torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64))
            eta = closest_step(float(ends[1] / ends[0]) ** (1 / ((self.levels or 2) - 1)), self.n_sigma)
        x, sigma = expand_like(sde.alpha(s) / sde.alpha(t), x_t) * x_t, expand_like(sde.sigma(s), x_t)
        for k in range(self.n_sigma):
            x = x + eta * sigma**2 * model(x, s).score + (2 * eta) ** 0.5 * sigma * noise.normal(k)
        return Step(x, {})


@functools.cache
def closest_step(gamma: float, n_sigma: int) -> float:
    r"""The step size that keeps the noise closest to its level, along levels of ratio gamma.

    With q = (1 - eta)^(2 n_sigma), Proposition 1's recursion takes a noise of r rho_i to r' rho_{i+1} with
    r'^2 = q r^2 / gamma^2 + 2 (1 - q) / (2 - eta); this minimises its fixed point, 2 (1 - q) / (2 - eta) /
    (1 - q / gamma^2) > 1. (Song and Ermon's technique 4, https://arxiv.org/abs/2006.09011, starts each level from
    r = 1, which one step at a level never comes back to: it would rest at r^2 = 2.)
    """
    eta = torch.linspace(0, 1, 10_001, dtype=torch.float64)[1:-1]
    kept = (1 - eta) ** (2 * n_sigma)
    excess = 2 * (1 - kept) / (2 - eta) / (1 - kept / gamma**2)
    settles = kept < gamma**2
    return float(eta[excess.masked_fill(~settles, torch.inf).argmin()] if settles.any() else eta[-1])
