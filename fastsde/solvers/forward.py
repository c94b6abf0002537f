"""Any deterministic solver, from data to noise."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from fastsde.noise import StepNoise
from fastsde.score.base import BoundModel
from fastsde.sde.base import SDE
from fastsde.solvers.base import Solver, Step
from fastsde.types import Carry, State, Time


@dataclasses.dataclass(frozen=True)
class Forward(Solver):
    """Runs a solver forward in time, on a clock u = -t that runs down as the engine's does.

    Args:
        solver: a deterministic one, whose formulas hold for s > t.

    Raises:
        ValueError: if the solver uses noise.
    """

    noise = "none"
    use = "encoding"
    convergence = "that of the solver"

    solver: Solver

    def __post_init__(self) -> None:
        if not self.solver.deterministic:
            raise ValueError(f"{self.solver} uses noise; only a deterministic solver, such as DDIM(), has an inverse.")

    @property
    def calls_per_step(self) -> int:
        return self.solver.calls_per_step

    @property
    def adaptive(self) -> bool:
        return self.solver.adaptive

    @property
    def warm_up(self) -> bool:  # type: ignore[override]
        return self.solver.warm_up

    def init(self, x_t: State) -> Carry:
        return self.solver.init(x_t)

    def plan(self, sde: SDE, times: Tensor, *, errors: bool = False) -> Carry:
        return self.solver.plan(sde, -times, errors=errors)

    def step(self, model: BoundModel, sde: SDE, x_t: State, t: Time, s: Time, noise: StepNoise, carry: Carry) -> Step:
        return self.solver.step(model, sde, x_t, -t, -s, noise, carry)
