"""Our own solver: an exponential predictor-corrector with one network call a step."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from fastsde.batching import expand_like, row_norm
from fastsde.noise import ALL_NOISE
from fastsde.sde.base import Level
from fastsde.solvers.adams import AdamsPlan, ExponentialAdams
from fastsde.types import Coef, Index, Mask, State

_LONG, _POWER = 0.8, 3.2
"""Where c h is 0.8, the third order has half its share, and the first correction leans as far as it may."""
_STEP, _PER_NOISE = 0.65, 0.6
"""Mean step of the base grid at rtol 0.05 and eta 0, about, and how much denser the grid is for eta = 1."""
_AT_NOISE, _LEAST_NOISE = 0.25, 0.1
"""An error counts by their ratio, with sigma / alpha in quadrature: as it is at 0.23, 2.5 times at the end."""
_NOISE_SHARE = 0.6
"""Noise-driven part of the correction over the prediction, per unit of fresh noise: above 99 % of ordinary samples, if
larger by 1 + 2 / sqrt(d), since norms in few dimensions are chance."""


@dataclasses.dataclass(frozen=True)
class ExponentialPC(ExponentialAdams):
    r"""Exponential predictor-corrector: predict, evaluate once, correct. The linear part of the SDE is exact.

    In the terms of `ExponentialAdams`, with k = 1 - e^{-c h}, order 2 is

        base      = e^{-c h} y_n + k D_n + rho_s sqrt(1 - e^{-2 eta^2 h}) z
        predicted = base + (k / 2) (h / h_prev) (D_n - D_{n-1})
        D_{n+1}   = D(predicted, s)                                 (the one call, which serves the next step too)
        corrected = base + (k / 2) (D_{n+1} - D_n)

    and order 3 mixes it with the exact weights w of the parabola through three values, in both stages: q w + (1 - q)
    (weights of order 2) with q = 1 / (1 + (c h / 0.8)^3.2). For short steps the parabola is better. For long ones it
    overshoots the sigmoid D(lam). The first correction is larger, because the first prediction has only order 1. In
    nearly pure noise g is close to 0:

        corrected = base + (k / 2) (1 + g) (D_1 - D_0),    g = min(1, c h / 0.8) min(1, 10 / rho_1)^2,

    It also replaces D_0, a trained network's worst value, by D_0 + j (D_1 - D_0), j = || D_0 ||^2 / || D_1 ||^2 - 1,
    kept within [0, 1]. On average the norm of D can only grow while noise falls. So if D_0 is larger than D_1, the
    difference is an error.

    The state is `corrected`; the last D is the denoised sample. N steps cost N + 1 calls: the first gives D_0.

    Without `steps`, `rtol` sets the number of steps. With `controller=AdaptiveGrid(...)` a sample starts again on a
    finer grid, with the same Brownian path, if at one of its steps, in y and with || . || the root mean square over the
    elements,

        || corrected - predicted || / max(atol, rtol || D_{n+1} ||)  0.25 / sqrt(rho_s^2 + 0.1^2)  >  1.

    The density at noise rho is smooth over a length rho. So the less noise is left, the more samples an error moves
    over a border between two modes. For eta > 0 the part of the difference that comes from noise alone is subtracted.

    The predictor of order 2 is DPM-Solver++ 2M's (Lu et al., https://arxiv.org/abs/2211.01095; SDE form for eta = 1);
    a corrector that reuses the next call is UniPC's idea (Zhao et al., https://arxiv.org/abs/2302.04867).

    Args:
        steps: number of steps of its own grid; None with `rtol`, `nfe` or a controller.
        eta: 0 (probability flow) to 5; 1 is the reverse-time SDE. On a grid it can also be an elementwise function of
            rho. With noise, times differ from those of `Grid.tapered` by up to a 32nd of the mean step. There the path
            is cheaper.
        order: 3, 2, or 1 for `base` alone (for eta = 0 that is DDIM), on a grid only.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    convergence = "3 (eta = 0), weak 2 on Gaussian data"
    orders = (1, 2, 3)
    use = "the default: few calls, 8 to 30 for a whole sample; as many as rtol or nfe say"
    tapered_steps = True

    order: int = 3

    @property
    def values(self) -> tuple[int, int]:
        return (self.order, self.order) if self.order > 1 else (1, 0)

    @property
    def adaptive(self) -> bool:
        # Noise that is a function of rho has no path to look up again after a rejection.
        return self.steps is None and self.order > 1 and (self.deterministic or self.keep_path)

    def base_step(self, rtol: float) -> float | None:
        if callable(self.eta) or not self.adaptive:
            return None
        return _STEP * math.sqrt(rtol / 0.05) / (1 + _PER_NOISE * self.eta**2)

    def share(self, a: Coef) -> Coef:
        return 1 / (1 + (a.abs() / _LONG) ** _POWER)  # a < 0 on the way back to noise

    def coefficients(self, now: Level, end: Level, lams: Tensor, count: Index) -> AdamsPlan:
        c = super().coefficients(now, end, lams, count)
        if self.order > 1:
            lean = (c.a / _LONG).clamp(max=1) * (ALL_NOISE * c.lam.exp()).clamp(max=1) ** 2
            moved = torch.where(_doubted(c), lean, 0.0) * c.weights[:, 1, 0]
            c.weights[:, 1, :2] += torch.stack([-moved, moved], 1)
        return c

    def revised(self, before: State, after: State, c: AdamsPlan) -> State:
        doubted = _doubted(c)
        if doubted.is_cpu and not doubted.any():  # a device would have to be waited for
            return before
        was, now = row_norm(before), row_norm(after)
        share = ((was / now.clamp(min=1e-15)).square() - 1).clamp(0, 1) * doubted
        return torch.lerp(before, after, expand_like(share, before))

    def estimate(self, difference: State, x_0: State, c: AdamsPlan) -> tuple[State | None, State | None]:
        if not self.adaptive:
            return None, None
        scale = row_norm(x_0)
        if not self.deterministic:
            # Noise moves D over any step: that part no step size removes, and it is no error of the law.
            share = _NOISE_SHARE * (1 + 2 / math.sqrt(x_0[0].numel()))
            driven = share * scale * (-torch.expm1(-2 * float(self.eta) ** 2 * c.h)).sqrt()  # type: ignore[arg-type]
            rest = (1 - (driven / row_norm(difference).clamp(min=1e-30)) ** 2).clamp(min=0)
            difference = expand_like(rest.sqrt(), difference) * difference
        weight = _AT_NOISE / (torch.exp(-2 * c.lam) + _LEAST_NOISE**2).sqrt()
        return expand_like(weight, difference) * difference, expand_like(scale, x_0).expand(x_0.shape)


def _doubted(c: AdamsPlan) -> Mask:
    """Which steps have a first prediction alone; not on the way back to noise, where that is the best of all."""
    return (c.count == 1) & (c.a > 0)
