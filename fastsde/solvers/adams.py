"""What the multistep solvers share: exponential Adams methods in the log-SNR."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastsde.batching import expand_like
from fastsde.checks import check_number, check_steps
from fastsde.noise import StepNoise
from fastsde.score.base import BoundModel, Prediction
from fastsde.sde.base import SDE, Level
from fastsde.solvers.adams_coefficients import AdamsCoefficients
from fastsde.solvers.adams_weights import add_weighted, columns, revised
from fastsde.solvers.base import Step
from fastsde.types import Carry, Coef, State, Time


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
class ExponentialAdams(AdamsCoefficients):
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

    steps: int | None = None
    eta: float | Callable[[Coef], Coef] = 0.0

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if not callable(self.eta):
            check_number("eta", self.eta, 0.0, 5.0)

    @property
    def deterministic(self) -> bool:
        return self.eta == 0

    @property
    def keep_path(self) -> bool:  # type: ignore[override]
        return not self.deterministic and not callable(self.eta)

    @property
    def clock_power(self) -> float | None:
        return None if callable(self.eta) else 2 * self.eta**2

    def estimate(self, difference: State, x_0: State, h: Coef, lam: Coef) -> tuple[State | None, State | None]:
        """Error of a step and its scale, with shape (B, *event), from corrected less predicted y; None if unknown."""
        return None, None

    def init(self, x_t: State) -> Carry:
        lam = torch.zeros(len(x_t), max(*self.values, 1), dtype=torch.float64, device=x_t.device)
        count = torch.zeros(len(x_t), dtype=torch.int64, device=x_t.device)
        nothing = torch.zeros_like(x_t)
        return {"x_0": nothing, "lam": lam, "count": count} | _past([nothing] * lam.shape[1])

    def plan(self, sde: SDE, times: Tensor, *, errors: bool = False) -> Carry:
        count = torch.arange(len(times), device=times.device)
        before = (count[:, None] - 1 - torch.arange(max(*self.values, 1), device=times.device)).clamp(min=0)
        end, start = sde.level(times), before[:, 0]
        now = Level(end.alpha[start], end.sigma[start])
        planned = self.coefficients(now, end, end.log_snr[before] / 2, count)
        unneeded = {"a"} | ({"std"} if self.deterministic else set()) | (set() if errors else _FOR_ERRORS)
        return {key: value for key, value in planned.items() if key not in unneeded}

    def predict(self, x_t: State, c: Carry, carry: Carry, z: State | None = None) -> Predicted:
        """The first half of a step, up to the network call.

        Args:
            x_t: the state, with shape (B, *event).
            c: the `coefficients` of the step, or a row of a `plan` for each state; each with leading axis B.
            carry: the memory.
            z: noise of variance 1 with shape (B, *event), for eta > 0; None adds none.
        """
        base = expand_like(c["keep"], x_t) * x_t
        if z is not None:
            base = base + expand_like(c["std"], x_t) * z
        weights, past = columns(c["weights"], x_t), self._past(carry)
        return Predicted(base, add_weighted(base, weights[: len(past)], past), weights[len(past) :])

    def correct(self, ahead: Predicted, prediction: Prediction, c: Carry, carry: Carry) -> tuple[State, Carry]:
        """The second half: the state at the end of the step, with shape (B, *event), and the memory there.

        Args:
            ahead: what `predict` gave, for the same `c` and `carry`.
            prediction: the network's, at `ahead.x` and the end of the step.
            c, carry: as for `predict`.
        """
        past = self._past(carry)
        new = prediction.epsilon if self.interpolates_noise else prediction.x_0
        x_s = ahead.x
        if self.values[1]:
            before = revised(past[0], new, c.get("first"))  # rows at a first step, of solvers that doubt its value
            x_s = add_weighted(ahead.base, ahead.weights, [before, new, *past[1:-1]])
        return x_s, {**carry, "x_0": prediction.x_0} | _past([new, *past[:-1]])

    def step(self, model: BoundModel, sde: SDE, x_t: State, t: Time, s: Time, noise: StepNoise, carry: Carry) -> Step:
        lam, count = carry["lam"], carry["count"]
        c = carry if "keep" in carry else self.coefficients(sde.level(t), sde.level(s), lam, count)
        ahead = self.predict(x_t, c, carry, None if self.deterministic else noise.z)
        prediction = model(ahead.x, s, Level(*c["level"].unbind(1)))
        x_s, kept = self.correct(ahead, prediction, c, carry)
        if not c.keys() >= _FOR_ERRORS:
            return Step(x_s, kept)  # a plan for a grid, where nobody asks for the error
        if c is not carry:  # a plan knows the times
            kept |= {"lam": torch.cat([c["lam_s"][:, None], lam[:, :-1]], 1), "count": count + 1}
        difference = (x_s - ahead.x) / expand_like(c["level"][:, 0], x_t)
        return Step(x_s, kept, *self.estimate(difference, prediction.x_0, c["h"], c["lam_s"]))

    def _past(self, carry: Carry) -> list[Tensor]:
        return [carry[f"past_{i}"] for i in range(max(*self.values, 1))]


_FOR_ERRORS = {"h", "lam_s"}


def _past(values: Sequence[Tensor]) -> Carry:
    """The last values, the newest first, by the names that they have in the solver's memory."""
    return {f"past_{i}": value for i, value in enumerate(values)}
