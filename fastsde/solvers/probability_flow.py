"""The probability-flow ODE, by any explicit Runge-Kutta method."""

from __future__ import annotations

import dataclasses

import torch

from fastsde.batching import expand_like, row_norm
from fastsde.checks import check_instance
from fastsde.noise import StepNoise
from fastsde.score.base import BoundModel
from fastsde.sde.base import SDE
from fastsde.solvers.base import Solver, Step
from fastsde.solvers.runge_kutta import noise_level, runge_kutta_step
from fastsde.solvers.tableaus import DORMAND_PRINCE, Tableau
from fastsde.types import Carry, State, Time


@dataclasses.dataclass(frozen=True)
class ProbabilityFlow(Solver):
    r"""Runge-Kutta method for the probability-flow ODE, with a step size for each sample.

    The ODE dx = [f x - g^2 score / 2] dt has the marginals of the SDE. In y = x / alpha and rho = sigma / alpha its
    linear part is gone and its slope is the predicted noise:

        dy / drho = eps(alpha y, t(rho))

    So Euler's method is DDIM, and Heun's method is EDM's sampler. Without `steps`, rtol, atol and the tableau's error
    estimate in x decide the steps. rtol refers to the root mean square of the sample. Source: Song et al.,
    https://arxiv.org/abs/2011.13456, sec. 4.3; Karras et al., https://arxiv.org/abs/2206.00364, sec. 3.
    `fastsde.ProbabilityFlowODE` is the same ODE in t, for other libraries' solvers.

    Args:
        steps: number of steps, uniform in log-SNR; None for adaptive steps, or with `controller=Grid(...)`.
        tableau: `DORMAND_PRINCE` or `HEUN`, which can be adaptive, `RK4`, `EULER`, or your own.

    Raises:
        ValueError: if `steps` is below 1.
        TypeError: if the tableau is none.
    """

    convergence = "that of the tableau: 5, 4, 2, 1"
    cost = "6 (and 6 to start), 4, 2, 1"
    noise = "none"
    deterministic = True
    use = "precise, reversible; likelihoods; 5(4) or 2(1) with rtol"
    log_snr_steps = True
    resolution = 2.0**-40

    steps: int | None = None
    tableau: Tableau = DORMAND_PRINCE

    def __post_init__(self) -> None:
        super().__post_init__()
        check_instance("tableau", self.tableau, Tableau, "a fastsde.Tableau such as fastsde.HEUN")

    @property
    def calls_per_step(self) -> int:
        return len(self.tableau.c) - self.warm_up

    @property
    def adaptive(self) -> bool:
        return self.steps is None and self.tableau.error is not None

    @property
    def error_power(self) -> float:  # type: ignore[override]
        return 1 / self.tableau.error_order if self.tableau.error else super().error_power

    @property
    def warm_up(self) -> bool:  # type: ignore[override]
        return self.tableau.first_same_as_last

    keeps_x_0 = warm_up  # the last slope is that at the state reached

    def init(self, x_t: State) -> Carry:
        return {"slope": torch.zeros_like(x_t), "x_0": torch.zeros_like(x_t)} if self.warm_up else {}

    def step(self, model: BoundModel, sde: SDE, x_t: State, t: Time, s: Time, noise: StepNoise, carry: Carry) -> Step:
        def slope(y: State, at: Time) -> State:
            return model(expand_like(sde.alpha(at), y) * y, at).epsilon

        alpha_t, alpha_s = expand_like(sde.alpha(t), x_t), expand_like(sde.alpha(s), x_t)
        y, error, last = runge_kutta_step(self.tableau, slope, sde, x_t / alpha_t, t, s, carry.get("slope"))
        x_s = alpha_s * y
        # That of the smaller end: the larger would let a step from much noise to none be wrong by a share of the noise,
        # and a step that leaves the data be judged by where it went.
        scale = expand_like(torch.minimum(row_norm(x_t), row_norm(x_s)), x_t).expand(x_t.shape)
        if self.warm_up:
            carry = {"slope": last, "x_0": y - expand_like(noise_level(sde, s), y) * last}
        return Step(x_s, carry, None if error is None else alpha_s * error, scale)
