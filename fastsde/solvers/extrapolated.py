"""Algorithm 1 of "Gotta Go Fast" (6 of the thesis): the adaptive extrapolating SDE solver."""

from __future__ import annotations

import dataclasses

import torch

from fastsde.batching import expand_like
from fastsde.checks import check_choice
from fastsde.noise import StepNoise
from fastsde.score.base import BoundModel
from fastsde.sde.base import SDE
from fastsde.solvers.base import Solver, Step
from fastsde.types import Carry, State, Time

_REFERENCES = ("previous", "current", "proposal")


@dataclasses.dataclass(frozen=True)
class ExtrapolatedEM(Solver):
    r"""Euler-Maruyama with the stochastic improved Euler step as error estimate and, extrapolating, as the result.

        x'  = x_t - h b(x_t, t) + g(t) dW                          (Euler-Maruyama)
        x~  = x_t - h b(x', s)  + g(s) dW
        x'' = (x' + x~) / 2                                        (improved Euler, stochastic)
        error = x' - x'',    scale = max(|x'|, |x'_prev|),    x_s = x''

    with h = t - s and b the reverse drift f x - g^2 score. Strong order 1 with a smaller constant than Euler-Maruyama,
    weak order 2 (1 with `lamba` or without `extrapolate`), and 2 where the noise vanishes. Source: Jolicoeur-Martineau
    et al., "Gotta Go Fast When Generating Data with Score-Based Models", https://arxiv.org/abs/2105.14080, algorithm 1
    (thesis: algorithm 6); Roberts, https://arxiv.org/abs/1210.0933, for x''. `fastsde.Adaptive` chooses its step sizes.
    By default the path is kept and the growth of steps is limited. The published rule is
    `ExtrapolatedEM(keep_path=False)` with `Adaptive(rtol, atol, growth=math.inf)`, apart from the rounding of steps.

    Args:
        extrapolate: return x'' (published), or x' with x'' as error estimate only.
        lamba: Lamba's estimate (2003, https://doi.org/10.1016/j.cam.2003.05.001): an improved Euler step only for the
            drift, with g(t) dW in both halves. So the error estimate does not contain the noise.
        reference: the relative tolerance refers to |x'| and to a second magnitude. "previous": |x'| of the last
            accepted step (eq. 10.5). "current": |x_t|, as in the released code. "proposal": none (eq. 10.4).
        keep_path: True: a rejected step sees the same Brownian path again. False: new noise is drawn, as published. In
            few dimensions rejections bias the samples in both cases (docs/explanation/sources.md).

    Raises:
        ValueError: for an unknown `reference`.
    """

    convergence = "strong 1, weak 2"
    calls_per_step = 2
    adaptive = True
    noise = "path"
    use = "no schedule to tune: a step size per sample from rtol"

    extrapolate: bool = True
    lamba: bool = False
    reference: str = "previous"
    keep_path: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("reference", self.reference, _REFERENCES)

    def init(self, x_t: State) -> Carry:
        return {"previous": x_t.clone()} if self.reference == "previous" else {}

    def step(self, model: BoundModel, sde: SDE, x_t: State, t: Time, s: Time, noise: StepNoise, carry: Carry) -> Step:
        h, dw = expand_like(t - s, x_t), noise.dw
        noise_t = expand_like(sde.g2(t).sqrt(), x_t) * dw
        noise_s = noise_t if self.lamba else expand_like(sde.g2(s).sqrt(), x_t) * dw
        low = x_t - h * sde.reverse_drift(x_t, t, model(x_t, t).score) + noise_t
        other = x_t - h * sde.reverse_drift(low, s, model(low, s).score) + noise_s
        high = (low + other) / 2
        scale = low.abs()
        if self.reference != "proposal":
            scale = torch.maximum(scale, (carry["previous"] if self.reference == "previous" else x_t).abs())
        carry = {"previous": low} if self.reference == "previous" else {}
        return Step(high if self.extrapolate else low, carry, low - high, scale)
