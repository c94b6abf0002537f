"""From what was asked to what the engine is given."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastsde.checks import check_count
from fastsde.control.base import Controller
from fastsde.noise import BrownianPath, FreshNoise, Noise
from fastsde.score.base import Model
from fastsde.sde.base import SDE
from fastsde.solvers.base import Plan, Solver
from fastsde.trajectory import Recorder
from fastsde.types import Carry

_LEAST_MAX_NFE = 10_000
"""`max_nfe` where nobody says, or what the grids need."""


@dataclasses.dataclass(frozen=True)
class EngineState:
    """What a callback gets after every turn. All values are copies, so it cannot change the run.

    Attributes:
        turn: turns so far.
        finished: samples that have ended.
        index: sample number in each slot, with shape (B,); a slot whose sample has left keeps its last number.
        x: current states, with shape (B, *event).
        t: current times, with shape (B,); back at the start for a sample that starts again.
        nfe: calls so far of the sample in each slot, with shape (B,).
        x_0: the denoised predictions, with shape (B, *event), of solvers that keep them, such as `ExponentialPC`;
            else None.
    """

    turn: int
    finished: int
    index: Tensor
    x: Tensor
    t: Tensor
    nfe: Tensor
    x_0: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Samples:
    """Which samples to draw, and where they start.

    Attributes:
        index: sample numbers, with shape (n,), in the order of the queue and of the result; on the device of the run.
        event: shape of one sample.
        dtype: of the states.
        seed: of the noise.
        cond: conditioning, each tensor with leading axis n, on the device.
        start: start states with shape (n, *event); or a function that gives them, with shape (B, *event), for places in
            `index`; None for draws from the prior.
        noise: what to take increments from, in place of the seed's.
        finished: told of samples that have ended: their places, final states and statuses.
    """

    index: Tensor
    event: tuple[int, ...]
    dtype: torch.dtype
    seed: int
    cond: Carry
    start: Tensor | Callable[[Tensor], Tensor] | None = None
    noise: Noise | None = None
    finished: Callable[[Tensor, Tensor, Tensor], None] | None = None

    @property
    def device(self) -> torch.device:
        """Where states are."""
        return self.index.device


@dataclasses.dataclass(frozen=True)
class Options:
    """What does not change samples, as callers gave it: arguments of `sample`; `saved_by` names `trajectory`."""

    batch_size: int | None = None
    max_nfe: int | None = None
    trajectory: bool | Iterable[float] | Tensor = False
    progress: bool = False
    callback: Callable[[EngineState], None] | None = None
    differentiable: bool = False
    saved_by: str = "trajectory"


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that stays fixed while sampling; `make_job` has checked it.

    Attributes:
        t_start: where every sample starts, on the engine's clock, which runs down.
        t_end: where it ends, below `t_start`.
        start: start states by places in the queue; None for draws from the prior.
        lag: turns by which the host reads the "who is done" flags late; 1 hides the wait on a GPU.
        recorder: keeps the states on the way, if anyone wants them.
        differentiable: whether gradients go through the samples, where torch records them.
    """

    model: Model
    sde: Any  # an SDE, or another process that the solver knows
    solver: Solver
    controller: Controller
    noise: Noise
    t_start: float
    t_end: float
    index: Tensor
    cond: Carry
    start: Callable[[Tensor], Tensor] | None
    denoise: bool
    max_nfe: int
    batch_size: int
    progress: bool = False
    callback: Callable[[EngineState], None] | None = None
    lag: int = 0
    recorder: Recorder | None = None
    finished: Callable[[Tensor, Tensor, Tensor], None] | None = None
    differentiable: bool = False

    def plan(self) -> Plan | None:
        """Coefficients of the steps of all grids of the controller, one after another, and of one step more.

        The last is for rows that have ended. None if steps are not known beforehand.
        """
        device, dtype = self.index.device, self.noise.dtype
        with torch.no_grad():
            # Hundreds of small operations, on the host: a device would take longer to start them than to do them.
            grids = [grid.times.cpu() for grid in self.controller.all_grids()]
            plans = [plan for times in grids if (plan := self.solver.plan(self.sde, times)) is not None]
        if not plans:
            return None
        # The last row twice: a sample that has ended, in a slot that nobody took, still reads a row.
        plan = Plan.joined([*plans, plans[-1].map(lambda value: value[-1:])])
        # Rounded here, because it is used beside states, rather than once a step.
        kept = torch.promote_types(dtype, torch.float32)
        return plan.map(lambda value: value.to(device, kept if value.is_floating_point() else value.dtype))


def make_job(
    model: Model,
    sde: Any,
    solver: Solver,
    controller: Controller,
    span: tuple[float, float],
    samples: Samples,
    options: Options,
    *,
    denoise: bool = False,
) -> Job:
    """The job of `sample` and its relatives.

    Args:
        model, sde, solver, controller: the parts, which fit each other.
        span: where samples start and end. From a smaller time to a larger one the engine's clock, which always falls,
            is u = -t, and solver and controller must be made for it: see `Forward` and `Controller.reversed`.
        samples, options: what to draw, and how to run.
        denoise: whether the result is the denoised sample.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is allowed.
    """
    sign = 1.0 if span[1] < span[0] else -1.0
    t_start, t_end = sign * span[0], sign * span[1]
    count, device, start = len(samples.index), samples.device, samples.start
    batch = 64 if options.batch_size is None else check_count("batch_size", options.batch_size, 1)
    controller, saved = _stopping(controller, options, sign, span)
    grids = controller.all_grids()
    if options.differentiable and len(grids) != 1:
        raise ValueError(
            f"differentiable=True needs one fixed grid of steps, such as nfe=12 or steps of a solver; {controller!r} "
            "chooses steps by errors."
        )
    solver.check(sde, grids[0].times if grids else None)
    least, each = fewest_calls(model, solver, denoise), model.calls * solver.calls_per_step
    # Of a sample that walks one grid after the other, at the end of each.
    paid = list(itertools.accumulate(least + (grid.steps - 1) * each for grid in grids))
    if options.max_nfe is None:
        max_nfe = max([_LEAST_MAX_NFE, *paid])
    else:
        max_nfe = check_count("max_nfe", options.max_nfe, least)
        controller = controller.coarsest(sum(calls <= max_nfe for calls in paid))
    ends = (t_end, t_start) if sign < 0 else (sde.t_min, sde.t_max)
    noise = samples.noise or noise_of(samples, solver, sde, ends)
    return Job(
        model=model,
        sde=sde,
        solver=solver,
        controller=controller.to(device),
        noise=noise,
        t_start=t_start,
        t_end=t_end,
        index=samples.index,
        cond=samples.cond,
        start=start.to(device, samples.dtype).__getitem__ if isinstance(start, Tensor) else start,
        denoise=denoise,
        max_nfe=max_nfe,
        batch_size=min(batch, count),
        progress=options.progress,
        callback=options.callback,
        lag=1 if device.type == "cuda" and not model.per_row else 0,
        recorder=None if saved is None else Recorder(count, saved or None, sign=sign),
        finished=samples.finished,
        differentiable=options.differentiable,
    )


def fewest_calls(model: Model, solver: Solver, denoise: bool) -> int:
    """Network calls of a sample that takes one step, the first and the last call included."""
    return model.calls * (solver.calls_per_step * (1 + solver.warm_up) + (denoise and not solver.keeps_x_0))


def noise_of(samples: Samples, solver: Solver, sde: SDE, ends: tuple[float, float]) -> Noise:
    """Fresh noise, or a path in the solver's clock between the ends of the process."""
    seed, event, dtype = samples.seed, samples.event, samples.dtype
    if not solver.keep_path:
        return FreshNoise(seed, event, dtype)
    clock: dict[str, Any] = {"t_min": ends[0], "t_max": ends[1]}
    if solver.clock_power is not None:
        clock |= {"log_snr": sde.log_snr, "power": solver.clock_power}
    return BrownianPath(seed, event, dtype, **clock)


def _stopping(
    controller: Controller, options: Options, sign: float, span: tuple[float, float]
) -> tuple[Controller, list[float] | None]:
    """The controller, which stops at the times to be kept; and these times: none for all, None for no trajectory."""
    given, name = options.trajectory, options.saved_by
    if isinstance(given, bool):
        return controller, [] if given else None
    try:
        times = [float(t) for t in given]
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be True, False or a sequence of times; got {given!r}.") from error
    low, high = sorted(span)
    outside = [t for t in times if not low <= t <= high]
    if outside or not times:
        raise ValueError(f"{name} must hold times from {low} to {high}; got {outside or times}.")
    controller, stops = controller.stopping_at([sign * t for t in times])
    # Times that went through a rounding or a single precision are still meant.
    missing = [t for t, stop in zip(times, stops, strict=True) if abs(sign * t - stop) > 1e-6 * (high - low)]
    if missing:
        raise ValueError(f"{name} has times that are not on the grid: {missing[:5]}.")
    return controller, stops
