"""Consistent annealed sampling (CAS), on any linear SDE."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastsde.batching import expand_like
from fastsde.noise import StepNoise
from fastsde.score.base import BoundModel
from fastsde.sde.base import SDE
from fastsde.solvers.annealed_langevin import Annealed
from fastsde.solvers.base import Step
from fastsde.solvers.runge_kutta import noise_level
from fastsde.types import Carry, State, Time


@dataclasses.dataclass(frozen=True)
class ConsistentAnnealed(Annealed):
    r"""Algorithm 5: each step lands on the next level with exactly its noise, for any levels.

        y_{i+1} = (1 - eta) y_i + eta H(y_i, rho_i) + beta_i rho_{i+1} z,    eta = eps / sigma_L^2
        beta_i^2 = 1 - ((1 - eta) / gamma_i)^2,    gamma_i = rho_{i+1} / rho_i

    in y = x / alpha with level rho = sigma / alpha (VE: y = x, rho = sigma), H the expected denoised sample. gamma may
    differ from step to step (Proposition 2). beta is real for 1 - gamma_i <= eta <= 1 + gamma_i: at the lower end the
    step is DDIM's; at eta = 1 - gamma_i^2 it is the ancestral one. The result is the state at the last level, with
    exactly its noise: Algorithm 5 as printed takes one step more, towards a level L + 1 that does not exist.
    `denoise=True` of `sample` then takes H of it (the EDS), one more call. Start states as for `AnnealedLangevin`.
    Source: Jolicoeur-Martineau et al., https://arxiv.org/abs/2009.05475, algorithm 2 (thesis algorithm 5).

    Args:
        levels: L, uniform in log-SNR, that is geometric in rho; or `controller=Grid(...)`, whose times are the levels.
        n_sigma: dilates the levels to (levels - 1) n_sigma + 1.
        eta: step size eps / sigma_L^2; by default 1 - gamma_i^(3/2), between DDIM's and the ancestral one. (The
            thesis's tuned eps for CIFAR-10, with gamma 0.964, is 0.056: an exponent of 1.56.)

    Raises:
        ValueError: naming the argument that is out of range; before sampling, if `eta` is not admissible.
    """

    convergence = "weak 1"
    calls_per_step = 1
    use = "annealed sampling whose noise keeps to its schedule"
    most_eta = 2.0

    @property
    def steps(self) -> int | None:
        return None if self.levels is None else (self.levels - 1) * self.n_sigma

    def check(self, sde: SDE, times: Tensor | None) -> None:
        if self.eta is None or times is None:
            return
        rho = noise_level(sde, times)
        gamma = float((rho[1:] / rho[:-1]).min())
        # A relative rounding of the levels must not refuse the lower end itself.
        if abs(1 - self.eta) > gamma * (1 + 1e-12):
            raise ValueError(
                f"eta (= eps / sigma_L^2) must be in [1 - gamma, 1 + gamma] = [{1 - gamma:.4g}, {1 + gamma:.4g}] for "
                f"these levels, whose smallest ratio is gamma = {gamma:.4g}; got {self.eta}."
            )

    def step(self, model: BoundModel, sde: SDE, x_t: State, t: Time, s: Time, noise: StepNoise, carry: Carry) -> Step:
        gamma = (0.5 * (sde.log_snr(t) - sde.log_snr(s))).exp()
        kept = gamma**1.5 if self.eta is None else torch.full_like(gamma, 1 - self.eta)
        beta = (1 - (kept / gamma) ** 2).clamp(min=0).sqrt()
        mean = expand_like(kept / sde.alpha(t), x_t) * x_t + expand_like(1 - kept, x_t) * model(x_t, t).x_0
        x_s = expand_like(sde.alpha(s), x_t) * mean + expand_like(beta * sde.sigma(s), x_t) * noise.z
        return Step(x_s, {})
