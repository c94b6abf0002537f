"""What a solver is: one pure step."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from fastsde.checks import check_flags, check_number, check_steps
from fastsde.noise import RESOLUTION, StepNoise
from fastsde.score.base import BoundModel, ScoreModel
from fastsde.sde.base import SDE
from fastsde.types import AnyState, Carry, Index, State, Time


@dataclasses.dataclass(frozen=True)
class Step:
    """The outcome of one step, for every row.

    Attributes:
        x: the proposed state at s, with shape (B, *event).
        carry: the solver's memory if the step is accepted.
        error: elementwise estimate of the step's error, with shape (B, *event); None if there is none.
        scale: elementwise magnitude that a relative tolerance refers to, with shape (B, *event).
        s: the time reached, with shape (B,), where the solver decides it; NaN in a row that failed.
    """

    x: AnyState
    carry: Carry
    error: State | None = None
    scale: State | None = None
    s: Time | None = None


P = TypeVar("P", bound="Plan")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Coefficients of steps that depend on times alone: tensors with leading axis B, a row for each step."""

    def map(self: P, change: Callable[[Tensor], Tensor]) -> P:
        """The same with every tensor changed."""
        return dataclasses.replace(self, **{f.name: change(getattr(self, f.name)) for f in dataclasses.fields(self)})

    def rows(self: P, index: Index) -> P:
        """The given rows."""
        return self.map(lambda value: value.index_select(0, index))

    @staticmethod
    def joined(plans: Sequence[P]) -> P:
        """The rows of several, one after another."""
        names = [f.name for f in dataclasses.fields(plans[0])]
        return dataclasses.replace(plans[0], **{k: torch.cat([getattr(plan, k) for plan in plans]) for k in names})


class Solver(ABC):
    """One step from t to s < t, for every row. A pure function: no loop, no generator, no batch statistics.

    Attributes (traits, checked before the first network call; those of the class make up the solver table):
        convergence: the order of convergence, in words.
        cost: network calls of one attempted step in terms of the arguments, where they decide.
        noise: which noise it uses, in words.
        sdes: which it takes.
        use: when to choose it.
        log_snr_steps, tapered_steps, grid_hint: steps uniform in log-SNR; tapered there; the argument that counts them.
        keep_path: take noise from a Brownian path that is a function of time, rather than fresh for each step.
        warm_up: the first turn has t = s, for a first prediction, or for work at the first level of noise.
        keeps_x_0: `carry["x_0"]` is the prediction at the state reached: the denoised sample without another call.
        resolution: smallest step of adaptive control, as a share of the time range.
        error_power: power of the scaled error in the rule for the next step size.
        times: the times that it was made for, the only ones that it walks; None if it takes any.
        reports: names in its memory, each with a float64 for every row, that go to the result.
        across_rows: whether a step reads other rows of the batch, as some published corrector does.
        most_eta: the largest value of an argument `eta`.
    """

    convergence: ClassVar[str]
    cost: ClassVar[str] = ""
    noise: ClassVar[str]
    sdes: ClassVar[str] = "any linear"
    use: ClassVar[str]
    log_snr_steps: ClassVar[bool] = False
    tapered_steps: ClassVar[bool] = False
    grid_hint: ClassVar[str] = "steps=..."
    keep_path: bool = False
    warm_up: bool = False
    keeps_x_0: bool = False
    resolution: float = RESOLUTION
    error_power: float = 0.9
    times: tuple[float, ...] | None = None
    reports: tuple[str, ...] = ()
    across_rows: bool = False
    most_eta: ClassVar[float] = 1.0

    def __init_subclass__(cls) -> None:
        if "step" in vars(cls) and "plan" not in vars(cls):
            cls.plan = Solver.plan  # type: ignore[method-assign] # an inherited one is for other steps

    def __post_init__(self) -> None:
        """Refuses arguments that are out of range: here the number of steps, eta and flags, where a solver has them."""
        check_steps(self.steps)
        if not callable(eta := getattr(self, "eta", 0.0)):
            check_number("eta", eta, 0.0, self.most_eta)
        check_flags(**{k: v for k, v in vars(self).items() if isinstance(getattr(type(self), k, None), bool)})

    @property
    def deterministic(self) -> bool:
        """Whether a step uses no noise at all: by default, where eta is 0."""
        return getattr(self, "eta", 1.0) == 0

    @property
    @abstractmethod
    def calls_per_step(self) -> int:
        """Network calls of one attempted step."""

    @property
    def adaptive(self) -> bool:
        """Whether a step comes with an error estimate."""
        return False

    def base_step(self, rtol: float) -> float | None:
        """Step of a base grid in half the log-SNR, for a tolerance; None if steps follow errors alone."""
        return None

    @property
    def steps(self) -> int | None:
        """Number of steps of the grid to walk, if the solver says."""
        return None

    @property
    def clock_power(self) -> float | None:
        """The power p of the clock (sigma / alpha)^-p in which a kept path runs; None for t."""
        return None

    def check(self, sde: SDE, times: Tensor | None) -> None:  # noqa: B027 - most solvers can walk anything
        """Refuses, with a ValueError, a process or a grid of times (None if adaptive) that it cannot walk."""

    def check_model(self, model: ScoreModel) -> None:  # noqa: B027 - most solvers walk any
        """Refuses, with a ValueError, a model that it was not made for."""

    def init(self, x_t: AnyState) -> Carry:
        """The solver's memory at the start, from the start state: tensors with leading axis B."""
        return {}

    def plan(self, sde: SDE, times: Tensor) -> Plan | None:
        """The coefficients of the steps of a grid, row k of the step to times[k]; None if there is nothing to plan."""
        return None

    @abstractmethod
    def step(self, model: BoundModel, sde: SDE, x_t: State, t: Time, s: Time, noise: StepNoise, carry: Carry) -> Step:
        """One step.

        Args:
            model: the score model, already bound to these rows; each call is counted.
            sde: the forward process.
            x_t, t, s: the state with shape (B, *event), now, and the target, at most t; times with shape (B,).
            noise: `noise.dw` over [s, t], `noise.z` with variance 1, `noise.normal(k)`; each with shape (B, *event).
            carry: memory of the last accepted step.
        """

    def planned_step(
        self, model: BoundModel, sde: SDE, x_t: State, t: Time, s: Time, noise: StepNoise, carry: Carry, plan: Plan
    ) -> Step:
        """`step` for a solver with a `plan`, of which it is given a row for each state."""
        raise NotImplementedError
