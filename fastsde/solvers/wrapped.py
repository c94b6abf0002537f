"""Solvers made from another one."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from fastsde.score.base import ScoreModel
from fastsde.sde.base import SDE
from fastsde.solvers.base import Solver
from fastsde.types import Carry, State


class WrappedSolver(Solver):
    """A solver whose step is made of another one's: its traits and memory are the other's, but for what it says."""

    @property
    @abstractmethod
    def inner(self) -> Solver:
        """The other solver."""

    @property
    def calls_per_step(self) -> int:
        return self.inner.calls_per_step

    @property
    def adaptive(self) -> bool:
        return self.inner.adaptive

    @property
    def steps(self) -> int | None:
        return self.inner.steps

    @property
    def warm_up(self) -> bool:  # type: ignore[override]
        return self.inner.warm_up

    @property
    def keep_path(self) -> bool:  # type: ignore[override]
        return self.inner.keep_path

    @property
    def log_snr_steps(self) -> bool:  # type: ignore[override]
        return self.inner.log_snr_steps

    def check(self, sde: SDE, times: Tensor | None) -> None:
        self.inner.check(sde, times)

    def check_model(self, model: ScoreModel) -> None:
        self.inner.check_model(model)

    def init(self, x_t: State) -> Carry:
        return self.inner.init(x_t)
