"""Solvers made from another one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastsde.score.base import ScoreModel
from fastsde.sde.base import SDE
from fastsde.solvers.base import Solver
from fastsde.types import Carry, State


def of_inner(name: str) -> Any:
    """A property that is the inner solver's."""
    return property(lambda self: getattr(self.inner, name), doc="That of the other solver.")


class WrappedSolver(Solver):
    """A solver whose step is made of another one's: its traits and memory are the other's, but for what it says."""

    calls_per_step = of_inner("calls_per_step")
    adaptive = of_inner("adaptive")
    steps = of_inner("steps")
    warm_up = of_inner("warm_up")
    keep_path = of_inner("keep_path")
    log_snr_steps = of_inner("log_snr_steps")

    solver: Solver

    @property
    def inner(self) -> Solver:
        """The other solver."""
        return self.solver

    def check(self, sde: SDE, times: Tensor | None) -> None:
        self.inner.check(sde, times)

    def check_model(self, model: ScoreModel) -> None:
        self.inner.check_model(model)

    def init(self, x_t: State) -> Carry:
        return self.inner.init(x_t)
