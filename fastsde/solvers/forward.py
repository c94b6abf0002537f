"""Any deterministic solver, from data to noise."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from fastsde.noise import StepNoise
from fastsde.score.base import BoundModel
from fastsde.sde.base import SDE
from fastsde.solvers.base import Plan, Solver, Step
from fastsde.solvers.wrapped import WrappedSolver
from fastsde.types import Carry, State, Time


@dataclasses.dataclass(frozen=True)
class Forward(WrappedSolver):
    """Runs a solver forward in time, on a clock u = -t that runs down as the engine's does.

    Args:
        solver: a deterministic one, whose formulas hold for s > t.

    Raises:
        ValueError: if the solver uses noise.
    """

    deterministic = True

    solver: Solver

    def __post_init__(self) -> None:
        if not self.solver.deterministic:
            raise ValueError(f"{self.solver} uses noise; only a deterministic solver, such as DDIM(), has an inverse.")

    def check(self, sde: SDE, times: Tensor | None) -> None:
        self.solver.check(sde, None if times is None else -times)

    def plan(self, sde: SDE, times: Tensor) -> Plan | None:
        return self.solver.plan(sde, -times)

    def step(self, model: BoundModel, sde: SDE, x_t: State, t: Time, s: Time, noise: StepNoise, carry: Carry) -> Step:
        return self.solver.step(model, sde, x_t, -t, -s, noise, carry)

    def planned_step(
        self, model: BoundModel, sde: SDE, x_t: State, t: Time, s: Time, noise: StepNoise, carry: Carry, plan: Plan
    ) -> Step:
        return self.solver.planned_step(model, sde, x_t, -t, -s, noise, carry, plan)
