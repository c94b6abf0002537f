"""EDM's sampler: Heun's method with churn."""

from __future__ import annotations

import dataclasses
import math

import torch

from fastsde.batching import expand_like
from fastsde.checks import check_number
from fastsde.noise import StepNoise
from fastsde.score.base import BoundModel
from fastsde.sde.base import SDE
from fastsde.solvers.base import Solver, Step
from fastsde.solvers.runge_kutta import noise_level, runge_kutta_step
from fastsde.solvers.tableaus import HEUN
from fastsde.types import Carry, State, Time


@dataclasses.dataclass(frozen=True)
class Heun(Solver):
    r"""Heun's method for the probability flow, after raising the noise level a little with fresh noise.

        rho^ = (1 + churn) rho_t,    y^ = y_t + s_noise sqrt(rho^2 - rho_t^2) z
        y'   = y^ + (rho_s - rho^) eps(y^, rho^)
        y_s  = y^ + (rho_s - rho^) (eps(y^, rho^) + eps(y', rho_s)) / 2

    in y = x / alpha and rho = sigma / alpha. Without churn it is Heun's method of order 2. The published last step, to
    rho = 0, is the denoising call of `sample`. The level is not raised above that of `sde.t_max`. Source: Karras et
    al., https://arxiv.org/abs/2206.00364, algorithms 1 and 2.

    Args:
        steps: number of steps, uniform in log-SNR; or `controller=Grid.karras(sde, steps)`, as published.
        churn: share gamma by which the level is raised before each step, in [0, sqrt(2) - 1]: the paper's S_churn
            divided by the number of steps.
        s_min: lower end of the levels rho that are raised.
        s_max: upper end.
        s_noise: scale of the added noise, positive; a little above 1 makes up for detail lost by the network.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    convergence = "2 (churn = 0)"
    calls_per_step = 2
    noise = "none, or fresh (churn)"
    use = "EDM's sampler, with `Grid.karras`"
    log_snr_steps = True

    steps: int | None = None
    churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("churn (S_churn / steps)", self.churn, 0.0, math.sqrt(2) - 1)
        check_number("s_min", self.s_min, 0.0)
        check_number("s_max", self.s_max, self.s_min)
        check_number("s_noise", self.s_noise, 0.0, ends="()")

    @property
    def deterministic(self) -> bool:
        return self.churn == 0

    def step(self, model: BoundModel, sde: SDE, x_t: State, t: Time, s: Time, noise: StepNoise, carry: Carry) -> Step:
        def slope(y: State, at: Time) -> State:
            return model(expand_like(sde.alpha(at), y) * y, at).epsilon

        y = x_t / expand_like(sde.alpha(t), x_t)
        if self.churn:
            rho, top = noise_level(sde, t), noise_level(sde, torch.full_like(t, sde.t_max))
            inside = (self.s_min <= rho) & (rho <= self.s_max)
            raised = torch.where(inside, torch.minimum((1 + self.churn) * rho, top), rho).maximum(rho)
            y = y + self.s_noise * expand_like((raised**2 - rho**2).sqrt(), y) * noise.normal()
            t = torch.where(raised > rho, sde.t_of_log_snr(-2 * raised.log()), t)
        y, _, _ = runge_kutta_step(HEUN, slope, sde, y, t, s)
        return Step(expand_like(sde.alpha(s), y) * y, {})
