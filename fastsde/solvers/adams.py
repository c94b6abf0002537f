"""Exponential Adams methods in the log-SNR: what the multistep solvers share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fastsde.batching import expand_like
from fastsde.checks import check_order
from fastsde.noise import StepNoise
from fastsde.score.base import BoundModel, Prediction
from fastsde.sde.base import SDE, Level
from fastsde.solvers.adams_weights import add_weighted, columns, stage_weights
from fastsde.solvers.base import Plan, Solver, Step
from fastsde.types import Carry, Coef, Index, State, Time


class Predicted(NamedTuple):
    """A step before its network call.

    Attributes:
        base: the exact linear part and the noise, with shape (B, *event).
        x: the predicted state, where the network is called, with shape (B, *event).
        weights: of the correction, each broadcasting against the state; none without a corrector.
    """

    base: State
    x: State
    weights: tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class AdamsPlan(Plan):
    """What steps need beside states, with leading axis B.

    Attributes:
        keep: factor of the state, with shape (B,).
        std: standard deviation of the noise, with shape (B,).
        weights: of the last predictions: the predictor's, and the corrector's if there is one, with shape (B, 1 or 2,
            values).
        a: c h, with shape (B,).
        h: length in half the log-SNR, with shape (B,).
        lam: half the log-SNR at the end, with shape (B,).
        alpha: at the end, with shape (B,).
        count: how many predictions there are before the step, with shape (B,).
    """

    keep: Tensor
    std: Tensor
    weights: Tensor
    a: Tensor
    h: Tensor
    lam: Tensor
    alpha: Tensor
    count: Tensor


@dataclasses.dataclass(frozen=True)
class ExponentialAdams(Solver):
    r"""An exponential Adams method with one network call a step: predict, evaluate, and, if asked, correct.

    In y = x / alpha, rho = sigma / alpha and lam = -log rho, the backward dynamics with noise eta are
    dy = c (D - y) dlam + eta sqrt(2) rho dW, with c = 1 + eta^2 and D = E[x_0 | x_t]. Over h = lam_s - lam_t,

        y_s = e^{-c h} y_t + sum_i w_i D_i + rho_s sqrt(1 - e^{-2 eta^2 h}) z

    where the weights integrate a polynomial through the values D_i exactly: with nodes u_i = (lam_i - lam_t) / h and
    a = c h, sum_i w_i u_i^j = m_j = integral over [0, 1] of a e^{-a (1 - u)} u^j du. The prediction uses the current
    and earlier D, the correction also D at the predicted state, whose call serves the next step. N steps cost N + 1
    calls, the last D being the denoised sample. In the first steps the order is lower.

    Args:
        steps: number of steps, uniform in log-SNR; or give `controller=Grid(...)` to `sample`.
        eta: 0 for the probability flow, 1 for the reverse-time SDE, up to 5; or an elementwise function of the rho
            where steps start, one or many. Noise of a constant eta comes from a Brownian path in the clock
            rho^(-2 eta^2), and steps end on borders of its cells, a 32nd of the mean step away at most.
    """

    calls_per_step = 1
    noise = "none, or path (eta)"
    warm_up = True
    keeps_x_0 = True
    log_snr_steps = True
    orders: ClassVar[tuple[int, ...]] = ()  # what `order` may be, where there is one
    midpoint: ClassVar[bool] = True  # a polynomial of degree 1 gets m_0 / 2 rather than m_1: better at few calls
    interpolates_noise: ClassVar[bool] = False  # interpolate eps rather than D: y / rho then grows, c = -1
    most_eta = 5.0

    steps: int | None = None
    eta: float | Callable[[Coef], Coef] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.orders:
            check_order("order", getattr(self, "order", None), self.orders)

    @property
    def values(self) -> tuple[int, int]:
        """How many predictions the predictor and the corrector (0: none) read."""
        raise NotImplementedError

    @property
    def keep_path(self) -> bool:  # type: ignore[override]
        return not self.deterministic and not callable(self.eta)

    @property
    def clock_power(self) -> float | None:
        return None if callable(self.eta) else 2 * self.eta**2

    def combine_moments(self, m_0: Coef, m: Tensor) -> Tensor:
        """The right-hand sides of the weights for as many differences as `m` has columns, with shape (B, q)."""
        return m_0[:, None] / 2 if self.midpoint and m.shape[1] == 1 else m

    def share(self, a: Coef) -> Coef | None:
        """The share of the highest order, the rest being the order below, with shape (B,); None for all of it.

        For solvers whose predictor and corrector read equally many values.
        """
        return None

    def coefficients(self, now: Level, end: Level, lams: Tensor, count: Index) -> AdamsPlan:
        """The coefficients of steps between two levels of the process.

        `lams` are where the last predictions were made, the newest first, with shape (B, values kept); `count` is how
        many of them there are, with shape (B,).
        """
        lam, lam_s = now.log_snr / 2, end.log_snr / 2
        h = lam_s - lam
        eta = torch.as_tensor(self.eta((-lam).exp()) if callable(self.eta) else self.eta, dtype=h.dtype)
        a = -h if self.interpolates_noise else (1 + eta**2) * h
        ratio = end.alpha / now.alpha
        keep, gain = (ratio, end.sigma) if self.interpolates_noise else (ratio * (-a).exp(), end.alpha)
        std = end.sigma * (-torch.expm1(-2 * eta**2 * h)).sqrt()
        nodes = (lams[:, 1:] - lam[:, None]) / torch.where(h == 0, 1.0, h)[:, None]  # warm-up: all weights vanish
        weights = gain[:, None, None] * stage_weights(a, nodes, count, self.values, self.combine_moments, self.share(a))
        return AdamsPlan(keep, std, weights, a, h, lam_s, end.alpha, count)

    def estimate(self, difference: State, x_0: State, c: AdamsPlan) -> tuple[State | None, State | None]:
        """Error of a step and its scale, with shape (B, *event), from corrected less predicted y; None if unknown."""
        return None, None

    def revised(self, before: State, after: State, c: AdamsPlan) -> State:
        """The prediction at the step's start as the corrector reads it, given that at its end; shapes (B, *event)."""
        return before

    def init(self, x_t: State) -> Carry:
        lam = torch.zeros(len(x_t), max(*self.values, 1), dtype=torch.float64, device=x_t.device)
        count = torch.zeros(len(x_t), dtype=torch.int64, device=x_t.device)
        nothing = torch.zeros_like(x_t)
        return {"x_0": nothing, "lam": lam, "count": count} | _past([nothing] * lam.shape[1])

    def plan(self, sde: SDE, times: Tensor) -> AdamsPlan:
        count = torch.arange(len(times), device=times.device)
        before = (count[:, None] - 1 - torch.arange(max(*self.values, 1), device=times.device)).clamp(min=0)
        end, start = sde.level(times), before[:, 0]
        now = Level(end.alpha[start], end.sigma[start])
        return self.coefficients(now, end, end.log_snr[before] / 2, count)

    def predict(self, x_t: State, c: AdamsPlan, carry: Carry, z: State | None = None) -> Predicted:
        """The first half of a step with coefficients `c`, up to the network call.

        `z` is noise of variance 1 with shape (B, *event), for eta > 0; None adds none.
        """
        base = expand_like(c.keep, x_t) * x_t
        if z is not None:
            base = base + expand_like(c.std, x_t) * z
        weights, past = columns(c.weights, x_t), self._past(carry)
        return Predicted(base, add_weighted(base, weights[: len(past)], past), weights[len(past) :])

    def correct(self, ahead: Predicted, prediction: Prediction, c: AdamsPlan, carry: Carry) -> tuple[State, Carry]:
        """The second half: the state at the end of the step, with shape (B, *event), and the memory there.

        `ahead` is what `predict` gave for the same `c` and `carry`; `prediction` is at `ahead.x` and the step's end.
        """
        past = self._past(carry)
        new = prediction.epsilon if self.interpolates_noise else prediction.x_0
        x_s = ahead.x
        if self.values[1]:
            x_s = add_weighted(ahead.base, ahead.weights, [self.revised(past[0], new, c), new, *past[1:-1]])
        return x_s, {**carry, "x_0": prediction.x_0} | _past([new, *past[:-1]])

    def step(self, model: BoundModel, sde: SDE, x_t: State, t: Time, s: Time, noise: StepNoise, carry: Carry) -> Step:
        lam, count = carry["lam"], carry["count"]
        c = self.coefficients(sde.level(t), sde.level(s), lam, count)
        step = self.planned_step(model, sde, x_t, t, s, noise, carry, c)
        memory = {"lam": torch.cat([c.lam[:, None], lam[:, :-1]], 1), "count": count + 1}
        return dataclasses.replace(step, carry=step.carry | memory)

    def planned_step(
        self, model: BoundModel, sde: SDE, x_t: State, t: Time, s: Time, noise: StepNoise, carry: Carry, plan: Plan
    ) -> Step:
        assert isinstance(plan, AdamsPlan)  # for the types
        ahead = self.predict(x_t, plan, carry, None if self.deterministic else noise.z)
        prediction = model(ahead.x, s)
        x_s, kept = self.correct(ahead, prediction, plan, carry)
        difference = (x_s - ahead.x) / expand_like(plan.alpha, x_t)
        return Step(x_s, kept, *self.estimate(difference, prediction.x_0, plan))

    def _past(self, carry: Carry) -> list[Tensor]:
        return [carry[f"past_{i}"] for i in range(max(*self.values, 1))]


def _past(values: Sequence[Tensor]) -> Carry:
    """The last values, the newest first, by the names that they have in the solver's memory."""
    return {f"past_{i}": value for i, value in enumerate(values)}
