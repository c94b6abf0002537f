"""Euler-Maruyama on a fixed grid."""

from __future__ import annotations

import dataclasses

from fastsde.batching import expand_like
from fastsde.noise import StepNoise
from fastsde.score.base import BoundModel
from fastsde.sde.base import SDE
from fastsde.solvers.base import Solver, Step
from fastsde.types import Carry, State, Time


@dataclasses.dataclass(frozen=True)
class EulerMaruyama(Solver):
    r"""Euler-Maruyama for the reverse-time SDE.

        x_s = x_t - h [f(t) x_t - g(t)^2 score(x_t, t)] + g(t) dW,    h = t - s

    Strong order 1 here, because the noise is additive (1/2 for multiplicative noise); weak order 1.
    Source: Kloeden and Platen 1992, sec. 10.2; Song et al., https://arxiv.org/abs/2011.13456, sec. 4.1.

    Args:
        steps: number of uniform steps in t; or give `controller=Grid(...)` to `sample`.
        keep_path: walk the sample's Brownian path, so that other step counts give nearby samples. By default
            each step draws its own noise, which is cheaper.

    Raises:
        ValueError: if `steps` is below 1.
    """

    convergence = "strong 1, weak 1"
    calls_per_step = 1
    noise = "fresh, or a path"
    use = "baseline; safe with many steps"

    steps: int | None = None
    keep_path: bool = False

    def step(self, model: BoundModel, sde: SDE, x_t: State, t: Time, s: Time, noise: StepNoise, carry: Carry) -> Step:
        drift = sde.reverse_drift(x_t, t, model(x_t, t).score)
        return Step(x_t - expand_like(t - s, x_t) * drift + expand_like(sde.g2(t).sqrt(), x_t) * noise.dw, {})
