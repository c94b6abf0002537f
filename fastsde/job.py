"""What the engine is given, and what it shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from fastsde.control.base import Controller
from fastsde.noise import Noise
from fastsde.score.base import ScoreModel
from fastsde.sde.base import SDE
from fastsde.solvers.base import Solver
from fastsde.trajectory import Recorder
from fastsde.types import Carry


@dataclasses.dataclass(frozen=True)
class EngineState:
    """What a callback sees after every turn: copies, so that it cannot disturb the run.

    Attributes:
        turn: turns so far.
        finished: samples that have ended.
        index: sample number in each slot, with shape (B,); a slot whose sample has left keeps its last number.
        x: current states, with shape (B, *event).
        t: current times, with shape (B,); back at the start for a sample that starts again.
        nfe: calls so far of the sample in each slot, with shape (B,).
    """

    turn: int
    finished: int
    index: Tensor
    x: Tensor
    t: Tensor
    nfe: Tensor


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that stays fixed while sampling; `api.sample` has checked it.

    Attributes:
        t_start: where every sample starts, on the engine's clock, which runs down.
        t_end: where it ends, below `t_start`.
        index: sample numbers, with shape (n,), in the order of the queue and of the result.
        cond: conditioning, each tensor with leading axis n.
        start: gives the start states of samples, by their places in `index`, with shape (B, *event).
        lag: turns by which the host reads the "who is done" flags late; 1 hides the wait on a GPU.
        plan: what the solver has worked out for the steps of a grid (`Solver.plan`), with leading axis N + 1, or of
            several, one after another; and one row more, for rows that have ended.
        recorder: keeps the states on the way, if anyone wants them.
        finished: told of samples that have ended: their places, final states and statuses.
    """

    model: ScoreModel
    sde: SDE
    solver: Solver
    controller: Controller
    noise: Noise
    t_start: float
    t_end: float
    index: Tensor
    cond: Carry
    start: Callable[[Tensor], Tensor]
    denoise: bool
    max_nfe: int
    batch_size: int
    progress: bool
    callback: Callable[[EngineState], None] | None
    lag: int
    plan: Carry
    recorder: Recorder | None = None
    finished: Callable[[Tensor, Tensor, Tensor], None] | None = None
