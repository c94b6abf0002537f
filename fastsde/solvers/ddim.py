"""DDIM with any amount of noise, on any linear SDE."""

from __future__ import annotations

import dataclasses

import torch

from fastsde.batching import expand_like
from fastsde.noise import StepNoise
from fastsde.score.base import BoundModel
from fastsde.sde.base import SDE
from fastsde.solvers.base import Solver, Step
from fastsde.types import Carry, State, Time


@dataclasses.dataclass(frozen=True)
class DDIM(Solver):
    r"""DDIM: keep the predicted data and noise, and re-mix them for the next time.

        x_s = alpha_s x_0 + sqrt(sigma_s^2 - v) eps + sqrt(v) z,    v = eta^2 sigma_s^2 (1 - SNR_t / SNR_s)

    with x_0 and eps predicted at (x_t, t). eta = 0 is deterministic, the exponential Euler step of the probability
    flow; eta = 1 is the ancestral step with the posterior variance. alpha(t) is the process's own at any time, not a
    table remade for each number of steps. Source: Song, Meng and Ermon, https://arxiv.org/abs/2010.02502, eqs. 12, 16.

    Args:
        steps: number of uniform steps in t; or give `controller=Grid(...)` to `sample`.
        eta: share of the posterior's noise, in [0, 1].

    Raises:
        ValueError: if `eta` is outside [0, 1] or `steps` below 1.
    """

    convergence = "1 (eta = 0), weak 1"
    calls_per_step = 1
    noise = "none, or fresh (eta)"
    use = "baseline; exact for a single point"

    steps: int | None = None
    eta: float = 0.0

    def step(self, model: BoundModel, sde: SDE, x_t: State, t: Time, s: Time, noise: StepNoise, carry: Carry) -> Step:
        variance, prediction = sde.sigma(s) ** 2, model(x_t, t)
        fresh = -(self.eta**2) * variance * torch.expm1(sde.log_snr(t) - sde.log_snr(s))
        kept = (variance - fresh).sqrt()
        x_s = expand_like(sde.alpha(s), x_t) * prediction.x_0 + expand_like(kept, x_t) * prediction.epsilon
        return Step(x_s if self.deterministic else x_s + expand_like(fresh.sqrt(), x_t) * noise.z, {})
