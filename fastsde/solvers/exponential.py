"""Our own solver: an exponential predictor-corrector with one network call a step."""

from __future__ import annotations

import dataclasses

import torch

from fastsde.batching import expand_like
from fastsde.score.base import BoundModel
from fastsde.sde.base import SDE
from fastsde.solvers.base import Solver, Step, check_steps, unit_normal
from fastsde.types import Carry, State, Time


@dataclasses.dataclass(frozen=True)
class ExponentialPC(Solver):
    r"""Exponential predictor-corrector: predict, evaluate once, correct. The linear part of the SDE is exact.

    In y = x / alpha, rho = sigma / alpha and lam = -log rho, the backward dynamics with noise eta are
    dy = c (D - y) dlam + eta sqrt(2) rho dW, with c = 1 + eta^2 and D = E[x_0 | x_t]. Over h = lam_s - lam_t,
    with k = 1 - e^{-c h}:

        base      = e^{-c h} y_n + k D_n + rho_s sqrt(1 - e^{-2 eta^2 h}) z
        predicted = base + (k / 2) (h / h_prev) (D_n - D_{n-1})
        D_{n+1}   = D(predicted, s)                                 (the one call, which serves the next step too)
        corrected = base + (k / 2) (D_{n+1} - D_n)

    The state is `corrected`; the last D is the denoised sample, so N steps cost N + 1 calls: the first gives D_0. The
    predictor is that of DPM-Solver++ 2M (Lu et al., https://arxiv.org/abs/2211.01095), of its SDE form for eta = 1;
    a corrector that reuses the next step's call is UniPC's idea (Zhao et al., https://arxiv.org/abs/2302.04867).

    Args:
        steps: number of steps, uniform in log-SNR; or give `controller=Grid(...)` to `sample`.
        eta: 0 for the probability flow, 1 for the reverse-time SDE, anything not negative.
        order: 2, or 1 for `base` alone (for eta = 0 that is DDIM).

    Raises:
        ValueError: naming the argument that is out of range.
    """

    convergence = "2 (eta = 0), weak 1"
    calls_per_step = 1
    adaptive = False
    use = "few calls: 10 to 30 for a whole sample"
    warm_up = True
    log_snr_steps = True
    keep_path = False

    steps: int | None = None
    eta: float = 0.0
    order: int = 2

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if not 0 <= self.eta < float("inf"):
            raise ValueError(f"eta must be finite and not negative; got {self.eta}.")
        if self.order not in (1, 2):
            raise ValueError(f"order must be 1 or 2; got {self.order}.")

    def init(self, x_t: State) -> Carry:
        # h_prev = infinity stands for "no step before": the predictor's difference then has weight 0.
        h_prev = torch.full((len(x_t),), torch.inf, dtype=torch.float64, device=x_t.device)
        return {"x_0": torch.zeros_like(x_t), "change": torch.zeros_like(x_t), "h_prev": h_prev}

    def step(self, model: BoundModel, sde: SDE, x_t: State, t: Time, s: Time, dw: State, carry: Carry) -> Step:
        h = (sde.log_snr(s) - sde.log_snr(t)) / 2
        decay = (-(1 + self.eta**2) * h).exp()
        scale = expand_like(sde.alpha(s) / sde.alpha(t) * decay, x_t)
        gain = expand_like(sde.alpha(s) * (1 - decay), x_t)
        noise = expand_like(sde.sigma(s) * (-torch.expm1(-2 * self.eta**2 * h)).sqrt(), x_t)
        base = scale * x_t + gain * carry["x_0"] + noise * unit_normal(dw, t, s)

        half = gain / 2 if self.order == 2 else torch.zeros_like(gain)
        x_0 = model(base + half * expand_like(h / carry["h_prev"], x_t) * carry["change"], s).x_0
        # In the warm-up turn t = s: the call gives D_0, there is no change yet and no step before.
        first = h == 0
        change = torch.where(expand_like(first, x_t), torch.zeros_like(x_0), x_0 - carry["x_0"])
        h_prev = torch.where(first, torch.inf, h)
        return Step(base + half * change, {"x_0": x_0, "change": change, "h_prev": h_prev})
