"""What a solver is: one pure step."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from fastsde.batching import expand_like
from fastsde.score.base import BoundModel
from fastsde.sde.base import SDE
from fastsde.types import Carry, State, Time


@dataclasses.dataclass(frozen=True)
class Step:
    """The outcome of one step, for every row.

    Attributes:
        x: the proposed state at s, with shape (B, *event).
        carry: the solver's memory if the step is accepted.
        error: elementwise estimate of the step's error, with shape (B, *event); None if the solver has none.
        scale: elementwise magnitude that a relative tolerance refers to, with shape (B, *event).
    """

    x: State
    carry: Carry
    error: State | None = None
    scale: State | None = None


class Solver(ABC):
    """One step from t to s < t, for every row. A pure function: no loop, no random numbers, no batch statistics.

    Class attributes are traits, checked before the first network call and listed in the solver table.

    Attributes:
        convergence: the order of convergence, in words.
        calls_per_step: network calls of one attempted step.
        adaptive: whether a step comes with an error estimate.
        use: when to choose it.
        warm_up: whether the first turn of a sample has t = s, so that a solver with one call a step, made at its end,
            gets the prediction it starts from. Such a solver keeps the last prediction as `carry["x_0"]`, which serves
            as the denoised sample without another call.
        log_snr_steps: whether `steps` are uniform in log-SNR rather than in t.
        steps: number of steps, if the solver walks a grid and the caller gives no other.
        keep_path: take noise from a Brownian path that is a function of time, rather than fresh for each step.
    """

    convergence: ClassVar[str]
    calls_per_step: ClassVar[int]
    adaptive: ClassVar[bool]
    use: ClassVar[str]
    warm_up: ClassVar[bool] = False
    log_snr_steps: ClassVar[bool] = False
    steps: int | None = None
    keep_path: bool = True

    def init(self, x_t: State) -> Carry:
        """The solver's memory at the start, from the start state: tensors with leading axis B."""
        return {}

    @abstractmethod
    def step(self, model: BoundModel, sde: SDE, x_t: State, t: Time, s: Time, dw: State, carry: Carry) -> Step:
        """One step.

        Args:
            model: the score model, already bound to these rows; each call is counted.
            sde: the forward process.
            x_t: with shape (B, *event).
            t: now, with shape (B,).
            s: target, with shape (B,), at most t.
            dw: Brownian increment over [s, t], with shape (B, *event) and variance t - s.
            carry: the memory of the last accepted step.
        """


def check_steps(steps: int | None) -> None:
    """Refuses a number of steps below 1; None is no number yet.

    Raises:
        ValueError: naming what came.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}.")


def unit_normal(dw: State, t: Time, s: Time) -> State:
    """The Brownian increment over [s, t] scaled to variance 1, with shape (B, *event); 0 where t = s."""
    return dw / expand_like((t - s).clamp(min=torch.finfo(torch.float32).tiny).sqrt(), dw)
