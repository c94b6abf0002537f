"""Reverse diffusion: the forward discretisation, reversed."""

from __future__ import annotations

import dataclasses

from fastsde.batching import expand_like
from fastsde.noise import StepNoise
from fastsde.score.base import BoundModel
from fastsde.sde.base import SDE
from fastsde.solvers.base import Solver, Step
from fastsde.types import Carry, State, Time


@dataclasses.dataclass(frozen=True)
class ReverseDiffusion(Solver):
    r"""The reverse-diffusion predictor, on any linear SDE.

        x_s = (2 - a) x_t + b^2 score(x_t, t) + b z,    a = alpha_t / alpha_s,    b^2 = sigma_t^2 - a^2 sigma_s^2

    where x_t = a x_s + b z is the forward process's own transition. On VP, a = sqrt(1 - beta) and b^2 = beta, lines 3
    to 5 of Algorithm 3; on VE, b^2 = sigma_t^2 - sigma_s^2, those of Algorithm 2. Published codes take beta from a
    table made for 1000 steps; here it belongs to the step taken. Source: Song et al., https://arxiv.org/abs/2011.13456,
    app. E; thesis algorithms 2 and 3.

    Args:
        steps: number of uniform steps in t; or give `controller=Grid(...)` to `sample`.

    Raises:
        ValueError: if `steps` is below 1.
    """

    convergence = "strong 1, weak 1"
    calls_per_step = 1
    noise = "fresh"
    use = "predictor of PC sampling"

    steps: int | None = None

    def step(self, model: BoundModel, sde: SDE, x_t: State, t: Time, s: Time, noise: StepNoise, carry: Carry) -> Step:
        a, b2 = sde.transition(t, s)
        mean = expand_like(2 - a, x_t) * x_t + expand_like(b2, x_t) * model(x_t, t).score
        return Step(mean + expand_like(b2.sqrt(), x_t) * noise.z, {})
