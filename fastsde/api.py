"""`sample` and `encode`: check the arguments, choose the defaults, build the parts, run the engine."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fastsde.arguments import (
    as_model,
    check_start,
    fewest_calls,
    resolve_cond,
    resolve_controller,
    resolve_device,
    resolve_dtype,
    resolve_shape,
    started,
    warn,
)
from fastsde.checks import check_count, check_flags, check_states
from fastsde.control import Adaptive, AdaptiveGrid, Controller, Grid
from fastsde.engine import Engine
from fastsde.job import EngineState, Job
from fastsde.noise import BrownianPath, FreshNoise, Noise
from fastsde.result import DataRangeWarning, RepeatedSeedWarning, SampleResult
from fastsde.score.base import ScoreModel
from fastsde.sde.base import SDE
from fastsde.solvers import ExponentialPC, ProbabilityFlow, Solver
from fastsde.solvers.forward import Forward
from fastsde.trajectory import Recorder
from fastsde.types import Carry, Cond, ScoreFn


def sample(
    score_fn: ScoreModel | ScoreFn,
    sde: SDE | None = None,
    *,
    n: int | None = None,
    shape: Sequence[int] | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    nfe: int | None = None,
    solver: Solver | None = None,
    controller: Controller | None = None,
    seed: int | None = None,
    index: Sequence[int] | Tensor | None = None,
    batch_size: int | None = None,
    cond: Cond | None = None,
    x_init: Tensor | None = None,
    x_data: Tensor | None = None,
    strength: float | None = None,
    t_start: float | None = None,
    denoise: bool = True,
    max_nfe: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    trajectory: bool | Iterable[float] | Tensor = False,
    progress: bool = False,
    callback: Callable[[EngineState], None] | None = None,
) -> SampleResult:
    r"""Draws samples by solving the reverse-time SDE from `sde.t_max`, or a start below it, to `sde.t_min`.

    By default `ExponentialPC` walks a grid along the probability flow, of as many steps as `rtol` asks for; with
    `solver=ExponentialPC(eta=1.0)` along the reverse-time SDE. No sample starts again on a finer grid unless
    `controller=AdaptiveGrid(...)` says so: that pays where few samples are far harder than the others, and on trained
    networks it was never nearer than the plain grid at equal mean calls. Steps per sample from errors alone are those
    of `solver=ExtrapolatedEM()`, nearly Algorithm 1 of "Gotta Go Fast" (docs/sources.md), and of `ProbabilityFlow()`.
    Sample i depends on (seed, i) and on nothing else: not on n, the batch size or its neighbours.
    The grid ends at t_min; on a flow or a table of up to 250 levels it ends at more noise the fewer steps it has
    (`Grid.central`), unless `denoise=False` asks for the state at t_min.
    The result is denoised, E[x_0 | x_t] = (x_t + sigma^2 score) / alpha at `t_min`, with one more call where the solver
    does not end with it.

    Args:
        score_fn: `score_fn(x, t)`, with x of shape (B, *event) and t of shape (B,), returning the score with the shape
            of x; or a `ScoreModel`, which reads other kinds of networks. A torch module runs in evaluation mode.
        sde: the forward process the score belongs to; a `ScoreModel` brings its own.
        n: number of samples, if the model knows its event shape (or with `shape` or `index`, which must then agree).
        shape: (n, *event).
        rtol: relative tolerance, positive; 0.05 by default. For adaptive solvers; it sets the number of steps of
            `ExponentialPC`.
        atol: absolute tolerance in units of the data, where steps follow errors; by default one 8-bit level of the
            model's data range, that is (high - low) / 256: 1/128 for a plain function, taken to be for data in [-1, 1].
        nfe: budget: network calls that no sample exceeds, in place of rtol and atol. The solver walks its own grid.
        solver: the stepping method, `ExponentialPC()` by default; one that `fit` made for this network needs the
            fewest calls, and says how many itself.
        controller: overrides what rtol, atol and the solver's `steps` say: a `Grid`, an `AdaptiveGrid` or `Adaptive`.
        seed: in [0, 2^64); 0 by default, so that a program gives the same samples again. A loop must say another seed
            or other numbers in each turn: without it the same samples come again, and a warning.
        index: draw these sample numbers of the seed, rather than 0 .. n - 1.
        batch_size: rows evaluated at a time; at most 64 by default.
        cond: keyword arguments of the network, each with leading axis n; they travel with their sample.
        x_init: start states with shape (n, *event), rather than draws from the prior; no gradient goes to them.
        x_data: data with shape (n, *event), to be edited: sampling starts at alpha x_data + sigma z, with each sample's
            own noise z, at the time that `strength`, `t_start` or a `Grid` says.
        strength: in (0, 1], with x_data or x_init: starts at the time t_min + strength (t_max - t_min), as a share of
            the network's time as in diffusers. 1 forgets the data. Not for `EDM`, whose time is the noise.
        t_start: the time to start at, in its place; in (t_min, t_max].
        denoise: whether to return the denoised sample rather than the state at `t_min`.
        max_nfe: a sample that would need more calls ends with `Status.MAX_NFE`, and none starts again on a grid which
            they do not pay for; 10,000, or what grids need. One call of a batch of b rows counts for each of them.
        dtype: floating dtype of the state; float32 by default, float64 for start states in float64.
        device: that of `x_init` or of the network by default.
        trajectory: True to keep every accepted state of every sample, in `.trajectory` of the result; or the times to
            keep, which adaptive solvers then step on exactly and a grid must contain.
        progress: show a bar over finished samples, with their mean NFE.
        callback: called with an `EngineState` after every turn of the engine.

    Returns:
        A `SampleResult` with samples of shape (n, *event) and the cost of each. A failure of single samples is data:
        their `status` says so and the others finish.

    Raises:
        ValueError, TypeError: before the first network call, naming the argument, what came and what is allowed.
        SamplingError: if the network fails after the first sample was finished; the finished ones are in `.result`.
        Interrupted: at Ctrl-C, a `KeyboardInterrupt`; what is finished is in `.result`.

    Warns:
        DataRangeWarning: if samples leave the range of the data (`.outside` of the result), which as a rule means that
            the network is read in a wrong way.
        RepeatedSeedWarning: if the same samples are drawn again because no seed was given.
    """
    for given, name in ((x_init, "x_init"), (x_data, "x_data")):
        if given is not None:
            check_states(name, given)
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable; got {type(callback).__name__}.")
    if x_init is not None and x_data is not None:
        raise ValueError("give either x_init or x_data, not both.")
    given, name = (x_data, "x_data") if x_init is None else (x_init, "x_init")
    model = as_model(score_fn, sde)
    process = model.sde if sde is None else sde
    _, event, numbers = resolve_shape(model, n, shape, given, index, name)
    dtype = resolve_dtype(dtype, given)
    solver = ExponentialPC() if solver is None else solver
    check_flags(denoise=denoise)
    process = started(process, given, strength, t_start, controller)
    if seed is None:
        seed = 0
        asked = (
            event,
            tuple(numbers.tolist()),
            process.t_max,
            repr(solver),
            rtol,
            atol,
            nfe,
            id(controller),
            id(given),
        )
        _warn_of_repetition(model.network, asked)
    controller = resolve_controller(model, process, solver, controller, rtol, atol, nfe, denoise)
    solver.check_model(model)
    first, last = controller.span(process.t_min, process.t_max)
    if given is None:
        check_start(process, first)
    result = run(
        model,
        process,
        solver,
        controller,
        t_start=first,
        t_end=last,
        event=event,
        index=numbers,
        x_init=x_init,
        x_data=x_data,
        seed=seed,
        batch_size=batch_size,
        cond=cond,
        denoise=denoise,
        max_nfe=max_nfe,
        dtype=dtype,
        device=resolve_device(model, device, given),
        trajectory=trajectory,
        progress=progress,
        callback=callback,
    )
    return _with_range(result, model) if denoise else result


def _with_range(result: SampleResult, model: ScoreModel) -> SampleResult:
    """The result with who left the range of the data, and a warning if anybody did.

    Of a range that nobody said, only if a tenth of all values are outside: data of variance 1 do not make that many.
    """
    low, high = model.data_range
    far = ((result.samples - (low + high) / 2).abs() > high - low).reshape(len(result.samples), -1)
    outside = far.sum(1) > 0.01 * far.shape[1]  # NaN is not far
    if outside.any() and (model.knows_range or far.double().mean() > 0.1):
        warn(
            f"{int(outside.sum())} of {len(outside)} samples left the range of the data: values beyond "
            f"{1.5 * low - high / 2:g} .. {1.5 * high - low / 2:g}, twice the width of data_range=({low:g}, {high:g}). "
            "Either the model's data_range is not that of the data; or the network is read in a wrong way (prediction, "
            "timestep=, sign), which fastsde.diagnose(model) tells; or its predictions need clipping, "
            "fastsde.score.Clipped(model), noise, ExponentialPC(eta=1.0), or a start at less noise, t_max of the SDE.",
            DataRangeWarning,
        )
    return dataclasses.replace(result, outside=outside)


_last_draw: tuple[Callable[[], object], tuple[object, ...]] = (lambda: None, ())
"""The network of the last call without a seed, while it lives, and what was asked for."""


def _warn_of_repetition(network: ScoreFn, asked: tuple[object, ...]) -> None:
    """Warns if the last call without a seed drew the same samples: a loop that forgot its seed.

    Conditioning is not compared: the start states and the noise are the same for any.
    """
    global _last_draw
    repeated = _last_draw[0]() is network and _last_draw[1] == asked
    try:
        _last_draw = weakref.ref(network), asked
    except TypeError:  # bound methods and some callables of other languages
        _last_draw = (lambda: None), ()
    if repeated:
        warn(
            "no seed was given, so this call has the start states and the noise of the last one (seed 0). Give seed=, "
            "or index= with other sample numbers, in each turn of a loop.",
            RepeatedSeedWarning,
        )


def encode(
    score_fn: ScoreModel | ScoreFn,
    sde: SDE | None = None,
    *,
    x: Tensor,
    rtol: float | None = None,
    atol: float | None = None,
    solver: Solver | None = None,
    controller: Controller | None = None,
    batch_size: int | None = None,
    cond: Cond | None = None,
    max_nfe: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    trajectory: bool | Iterable[float] | Tensor = False,
    progress: bool = False,
) -> SampleResult:
    r"""The inverse of deterministic sampling: from the state at t_min, along the probability flow, to noise at t_max.

    `sample(..., x_init=encode(..., x=x).samples, denoise=False)` with the same solver gives x back, up to the error of
    the solver. With `solver=fastsde.DDIM(steps=50)` this is DDIM inversion. Source: Song, Meng and Ermon,
    https://arxiv.org/abs/2010.02502, sec. 4.3; Song et al., https://arxiv.org/abs/2011.13456, sec. 4.3.

    Args:
        score_fn: as for `sample`.
        sde: as for `sample`.
        x: states at t_min (data, for practical purposes), with shape (n, *event).
        rtol: relative tolerance of an adaptive solver, 1e-3 by default: what is lost here, sampling cannot bring back.
        atol: absolute tolerance in units of the data, 1e-3 by default.
        solver: a deterministic one; adaptive `ProbabilityFlow()` by default.
        controller: as for `sample`; a `Grid` is walked from its last time to its first.
        batch_size: rows evaluated at a time; at most 64 by default.
        cond: keyword arguments of the network, each with leading axis n.
        max_nfe: as for `sample`.
        dtype: floating dtype of the state; float32 by default, float64 for x in float64.
        device: that of `x` by default.
        trajectory: as for `sample`.
        progress: show a bar.

    Returns:
        A `SampleResult` whose samples are the states at t_max, with shape (n, *event).

    Raises:
        ValueError, TypeError: before the first network call; also if the solver uses noise.
        SamplingError, Interrupted: as `sample`.
    """
    check_states("x", x)
    model = as_model(score_fn, sde)
    process = model.sde if sde is None else sde
    _, event, numbers = resolve_shape(model, None, None, x, None, "x")
    solver = ProbabilityFlow() if solver is None else solver
    if controller is None and isinstance(solver, Solver) and solver.adaptive:
        rtol, atol = 1e-3 if rtol is None else rtol, 1e-3 if atol is None else atol
    if isinstance(solver, Solver) and solver.times is not None:
        raise ValueError(f"{type(solver).__name__} goes from noise to data only; encode with another solver.")
    controller = resolve_controller(model, process, solver, controller, rtol, atol, denoise=False)
    t_start, t_end = controller.span(process.t_min, process.t_max)
    solver.check(process, controller.times if isinstance(controller, Grid) else None)
    return run(
        model,
        process,
        Forward(solver),
        controller.reversed(),
        t_start=t_end,
        t_end=t_start,
        event=event,
        index=numbers,
        x_init=x,
        seed=0,
        batch_size=batch_size,
        cond=cond,
        max_nfe=max_nfe,
        dtype=resolve_dtype(dtype, x),
        device=resolve_device(model, device, x),
        trajectory=trajectory,
        progress=progress,
    )


def run(
    model: ScoreModel,
    sde: SDE,
    solver: Solver,
    controller: Controller,
    *,
    t_start: float,
    t_end: float,
    event: tuple[int, ...],
    index: Tensor,
    x_init: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    batch_size: int | None,
    cond: Cond | None,
    max_nfe: int | None,
    x_data: Tensor | None = None,
    denoise: bool = False,
    trajectory: bool | Iterable[float] | Tensor = False,
    progress: bool = False,
    callback: Callable[[EngineState], None] | None = None,
    saved_by: str = "trajectory",
    start: Callable[[Tensor], Tensor] | None = None,
    finished: Callable[[Tensor, Tensor, Tensor], None] | None = None,
    noise: Noise | None = None,
) -> SampleResult:
    """Builds the noise, the recorder and the job, and runs the engine; for `sample` and its relatives.

    Arguments are those of `sample`, resolved; `saved_by` is what the caller calls `trajectory`; `start` and `finished`
    are the job's, where start states are no tensor of all of them; `noise` is used rather than the seed's. From
    `t_start` up to `t_end`, the engine's clock, which always falls, is u = -t, and solver and controller must be made
    for it: see `Forward` and `Controller.reversed`.
    """
    solver.check(sde, controller.times if isinstance(controller, Grid) else None)
    count, batch = len(index), 64 if batch_size is None else check_count("batch_size", batch_size, 1)
    seed = check_count("seed", seed, 0)
    least = fewest_calls(model, solver, denoise)
    sign = 1.0 if t_end < t_start else -1.0
    t_start, t_end = sign * t_start, sign * t_end
    recorder, controller = _recorder(trajectory, saved_by, controller, count, t_start, t_end, sign)
    each = model.calls * solver.calls_per_step
    walks = controller.walks if isinstance(controller, (Grid, AdaptiveGrid)) else ()
    paid = list(itertools.accumulate(least + (walk.steps - 1) * each for walk in walks))  # at the end of each walk
    max_nfe = max([10_000, *paid]) if max_nfe is None else check_count("max_nfe", max_nfe, least)
    if isinstance(controller, AdaptiveGrid):
        affordable = max(1, sum(calls <= max_nfe for calls in paid))
        if affordable < len(walks):
            controller = dataclasses.replace(controller, grids=controller.grids[:affordable])
    noise = noise or noise_of(seed, event, dtype, solver, sde, (t_end, t_start) if sign < 0 else (sde.t_min, sde.t_max))
    index = index.to(device)
    if x_data is not None:
        times = torch.full((count,), t_start, dtype=torch.float64, device=device)
        x_init = sde.marginal(x_data.to(device, dtype), times, noise.prior(index))
    if x_init is not None:
        start = x_init.to(device, dtype).__getitem__
    elif start is None:
        start = functools.partial(_from_prior, sde, noise, index, t_start)
    job = Job(
        model=model,
        sde=sde,
        solver=solver,
        controller=controller,
        noise=noise,
        t_start=t_start,
        t_end=t_end,
        index=index,
        cond=resolve_cond(model, cond, count, device),
        start=start,
        denoise=denoise,
        max_nfe=max_nfe,
        batch_size=min(batch, count),
        progress=progress,
        callback=callback,
        lag=1 if device.type == "cuda" and not model.per_row else 0,
        plan=_plan(solver, sde, controller, device, dtype),
        recorder=recorder,
        finished=finished,
    )
    with torch.no_grad(), model.sampling():
        return Engine(job).run()


def _from_prior(sde: SDE, noise: Noise, index: Tensor, t_start: float, slots: Tensor) -> Tensor:
    """Draws from the prior, of the samples at the given places of the queue."""
    return sde.prior(noise.prior(index[slots]), t_start)


def _plan(solver: Solver, sde: SDE, controller: Controller, device: torch.device, dtype: torch.dtype) -> Carry:
    """What the solver can work out for a grid, or several, if they alone say where steps go."""
    if not isinstance(controller, (Grid, AdaptiveGrid)):
        return {}
    known, kind = AdaptiveGrid if isinstance(controller, AdaptiveGrid) else Grid, type(controller)
    if (kind.target, kind.update) != (known.target, known.update):
        return {}
    with torch.no_grad():
        # Hundreds of small operations, on the host: a device would take longer to start them than to do them.
        plans = [solver.plan(sde, grid.times.cpu(), errors=controller.adaptive) for grid in controller.walks]
    # The last row twice: a sample that has ended, in a slot that nobody took, still reads a row.
    plan = {key: torch.cat([*(plan[key] for plan in plans), plans[-1][key][-1:]]) for key in plans[0]}
    # Rounded here, because it is used beside states, rather than once a step; but for what a prediction is read with.
    kept = torch.promote_types(dtype, torch.float32)
    return {k: v.to(device, kept if v.is_floating_point() and k != "level" else v.dtype) for k, v in plan.items()}


def noise_of(
    seed: int, event: tuple[int, ...], dtype: torch.dtype, solver: Solver, sde: SDE, span: tuple[float, float]
) -> Noise:
    """Fresh noise, or a path in the solver's clock over the whole range of the process."""
    if not solver.keep_path:
        return FreshNoise(seed, event, dtype)
    low, high = span
    if solver.clock_power is None:
        return BrownianPath(seed, event, dtype, t_min=low, t_max=high)
    return BrownianPath(seed, event, dtype, t_min=low, t_max=high, log_snr=sde.log_snr, power=solver.clock_power)


def _recorder(
    trajectory: bool | Iterable[float] | Tensor,
    name: str,
    controller: Controller,
    n: int,
    t_start: float,
    t_end: float,
    sign: float,
) -> tuple[Recorder | None, Controller]:
    """The recorder that `trajectory` asks for, and the controller, which then stops at its times."""
    if isinstance(trajectory, bool):
        return (Recorder(n, sign=sign) if trajectory else None), controller
    try:
        given = [float(t) for t in trajectory]
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be True, False or a sequence of times; got {trajectory!r}.") from error
    low, high = sorted((sign * t_start, sign * t_end))
    outside = [t for t in given if not low <= t <= high]
    if outside or not given:
        raise ValueError(f"{name} must hold times from {low} to {high}; got {outside or given}.")
    times = [sign * t for t in given]
    if isinstance(controller, (Adaptive, AdaptiveGrid)):
        controller = dataclasses.replace(controller, stops=(*controller.stops, *times))
    elif isinstance(controller, Grid):
        # Times that went through a rounding or a single precision are still meant.
        grid = controller.times
        nearest = [int((grid - t).abs().argmin()) for t in times]
        missing = [
            t for t, k in zip(given, nearest, strict=True) if abs(float(grid[k]) - sign * t) > 1e-6 * (high - low)
        ]
        if missing:
            raise ValueError(f"{name} has times that are not on the grid: {missing[:5]}.")
        times = [float(grid[k]) for k in nearest]
    return Recorder(n, times, sign=sign), controller
