"""Ancestral sampling."""

from __future__ import annotations

import dataclasses

from fastsde.batching import expand_like
from fastsde.noise import StepNoise
from fastsde.score.base import BoundModel
from fastsde.sde.base import SDE
from fastsde.solvers.base import Solver, Step
from fastsde.types import Carry, State, Time


@dataclasses.dataclass(frozen=True)
class Ancestral(Solver):
    r"""Ancestral sampling, on any linear SDE, with either of the two published variances.

        x_s = (x_t + b^2 score(x_t, t)) / a + sqrt(v) z,    a = alpha_t / alpha_s,    b^2 = sigma_t^2 - a^2 sigma_s^2
        v = sigma_s^2 b^2 / sigma_t^2      (posterior: that of x_s given x_t and x_0; DDPM's "small", SMLD's)
        v = b^2                            (forward: that of x_t given x_s; DDPM's "large", score_sde's for VP)

    The mean is E[x_s | x_t]. The posterior variance is right for a single point, and equals DDIM with eta = 1; the
    forward variance is right for white noise. Source: Ho et al., https://arxiv.org/abs/2006.11239, sec. 3.2; Song et
    al., https://arxiv.org/abs/2011.13456, app. F.

    Args:
        steps: number of uniform steps in t; or give `controller=Grid(...)` to `sample`.
        posterior: whether to use the posterior variance rather than the forward one.

    Raises:
        ValueError: if `steps` is below 1.
    """

    convergence = "weak 1"
    calls_per_step = 1
    noise = "fresh"
    use = "DDPM's sampler; predictor of PC sampling"

    steps: int | None = None
    posterior: bool = True

    def step(self, model: BoundModel, sde: SDE, x_t: State, t: Time, s: Time, noise: StepNoise, carry: Carry) -> Step:
        a, b2 = sde.transition(t, s)
        variance = b2 * (sde.sigma(s) / sde.sigma(t)) ** 2 if self.posterior else b2
        mean = (x_t + expand_like(b2, x_t) * model(x_t, t).score) / expand_like(a, x_t)
        return Step(mean + expand_like(variance.sqrt(), x_t) * noise.z, {})
