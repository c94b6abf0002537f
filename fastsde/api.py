"""`sample` and `encode`: check the arguments, choose the defaults, build the parts, run the engine."""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsde.arguments import as_model, resolve_samples, started, warn
from fastsde.checks import check_flags, check_kind, check_states
from fastsde.control import Controller
from fastsde.engine import Engine
from fastsde.job import EngineState, Job, Options, make_job
from fastsde.noise import FreshNoise
from fastsde.result import DataRangeWarning, RepeatedSeedWarning, SampleResult
from fastsde.score.base import Model, ScoreModel
from fastsde.sde.base import SDE
from fastsde.solvers import ExponentialPC, ProbabilityFlow, Solver
from fastsde.solvers.forward import Forward
from fastsde.steps import check_start, resolve_controller
from fastsde.types import Cond, ScoreFn


def sample(
    score_fn: Model | ScoreFn,
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
    differentiable: bool = False,
    progress: bool = False,
    callback: Callable[[EngineState], None] | None = None,
) -> SampleResult:
    r"""Draws samples by solving the reverse-time SDE from `sde.t_max`, or a start below it, to `sde.t_min`.

    By default `ExponentialPC` solves the probability flow on a fixed grid of times. `rtol` or `nfe` says how many steps
    the grid has. `solver=ExponentialPC(eta=1.0)` solves the reverse-time SDE. `solver=ExtrapolatedEM()` (nearly
    Algorithm 1 of "Gotta Go Fast") and `solver=ProbabilityFlow()` choose the steps of each sample from estimated
    errors. With `controller=AdaptiveGrid(...)` a sample with a large error starts again on a finer grid.

    Sample i depends on (seed, i) and on nothing else: not on n, and not on the batch.

    The result is denoised: E[x_0 | x_t] = (x_t + sigma^2 score) / alpha at the last time. Some solvers need one more
    call for it. The grid ends at `t_min`. There is one exception: on a flow or a table of up to 250 levels, a grid of
    few steps ends at more noise (`Grid.central`). With `denoise=False` it ends at `t_min`.

    Args:
        score_fn: a `ScoreModel`; or a function `score_fn(x, t)` that returns the score with the shape of x, for x with
            shape (B, *event) and t with shape (B,). A torch module runs in evaluation mode. Or a `fastsde.tokens`
            model, with that package's solvers; the manual has a page on them.
        sde: the forward process that the score belongs to. A `ScoreModel` has its own.
        n: number of samples, if the model knows its event shape. If `shape` or `index` is also given, it must agree.
        shape: (n, *event).
        rtol: relative tolerance of adaptive solvers, positive; 0.05 by default. For `ExponentialPC` it sets the number
            of steps.
        atol: absolute tolerance in units of the data, for adaptive solvers. By default one 8-bit level of the model's
            data range: (high - low) / 256. A plain function is taken to be for data in [-1, 1], which gives 1/128.
        nfe: budget, instead of rtol and atol: no sample makes more network calls. The solver takes its own grid.
        solver: the method that makes the steps; `ExponentialPC()` by default. A solver from `fit` needs the fewest
            calls, and has a fixed number of them.
        controller: a `Grid`, an `AdaptiveGrid` or `Adaptive`, instead of rtol, atol, nfe and the solver's `steps`.
        seed: in [0, 2^64); 0 by default. So a program gives the same samples when it runs again. In a loop give another
            seed, or other sample numbers, in each turn. Otherwise the same samples come again, with a warning.
        index: draw the samples with these numbers, instead of 0 .. n - 1.
        batch_size: rows evaluated at a time; at most 64 by default.
        cond: keyword arguments of the network, each with leading axis n: one row for each sample.
        x_init: start states with shape (n, *event), instead of draws from the prior.
            Of tokens: ids, with the model's mask id at the positions to draw.
        x_data: data to edit, with shape (n, *event). Sampling starts at alpha x_data + sigma z, with the sample's own
            noise z. `strength`, `t_start` or a `Grid` says at which time.
        strength: in (0, 1], with x_data or x_init: sampling starts at the time t_min + strength (t_max - t_min), as in
            diffusers. With 1 nothing is left of the data. Not for `EDM`, because its time is the noise.
        t_start: the time to start at, instead of `strength`; in (t_min, t_max].
        denoise: True to return the denoised sample, False to return the state at `t_min`, or at the last level of a
            `FittedSolver`.
        max_nfe: a sample that would need more calls ends with `Status.MAX_NFE`. By default 10,000, or more if the grid
            needs more. No sample starts again on a finer grid if it would need more calls than this.
        dtype: floating dtype of the state; float32 by default, float64 for start states in float64.
        device: by default that of `x_init` or of the network.
        trajectory: True to keep every accepted state of every sample, in `.trajectory` of the result. Or the times to
            keep: adaptive solvers step on them exactly, and a grid must contain them.
        differentiable: True to let gradients go through sampling, from the samples to `x_init`, `x_data`, `cond` and
            the network's parameters. For steps on one fixed grid. The noise of a solver is a constant. The network is
            called again in the backward pass, one step at a time. So memory is that of one step and of the states; the
            calls of the backward pass are not in `.nfe`. The trajectory carries no gradient.
        progress: show a bar over finished samples, with their mean NFE.
        callback: called with an `EngineState` after every turn of the engine.

    Returns:
        A `SampleResult` with samples of shape (n, *event) and the cost of each. If single samples fail, their `status`
        says so, and the others finish.

    Raises:
        ValueError, TypeError: before the first network call. The message names the argument, what came and what is
            allowed.
        SamplingError: if the network fails after the first sample was finished. Finished samples are in `.result`.
        Interrupted: at Ctrl-C; it is a `KeyboardInterrupt`. Finished samples are in `.result`.

    Warns:
        DataRangeWarning: if samples leave the range of the data (`.outside` of the result). It usually means that the
            network is read in a wrong way.
        RepeatedSeedWarning: if the same samples are drawn again because no seed was given.
    """
    options = Options(batch_size, max_nfe, trajectory, progress, callback, differentiable)
    which: dict[str, Any] = {"n": n, "shape": shape, "index": index, "cond": cond, "dtype": dtype, "device": device}
    how: dict[str, Any] = {"rtol": rtol, "atol": atol, "nfe": nfe, "solver": solver, "controller": controller}
    start: dict[str, Any] = {"x_init": x_init, "x_data": x_data, "strength": strength, "t_start": t_start}
    number = 0 if seed is None else seed
    job = job_of(score_fn, sde, options=options, seed=number, denoise=denoise, **which, **how, **start)
    if seed is None and not differentiable:  # optimisation draws the same samples again, of changed inputs
        asked = (job.noise.event_shape, job.t_start, repr(job.solver), rtol, atol, nfe)
        given = x_data if x_init is None else x_init
        _warn_of_repetition(job.model.network, (tuple(job.index.tolist()), *asked, id(controller), id(given)))
    result = Engine(job).run()
    if differentiable and torch.is_grad_enabled() and not result.samples.requires_grad:
        warn(
            "differentiable=True, but the samples carry no gradient: nothing that they depend on requires one (x_init, "
            "x_data, cond, parameters of the network).",
            UserWarning,
        )
    result = with_range(result, job)
    if result.outside is not None and result.outside.any() and isinstance(job.model, ScoreModel):
        warn_of_range(result.samples, job.model)
    return result


def job_of(
    score_fn: Model | ScoreFn,
    sde: SDE | None = None,
    *,
    options: Options,
    rtol: float | None = None,
    atol: float | None = None,
    nfe: int | None = None,
    solver: Solver | None = None,
    controller: Controller | None = None,
    x_init: Tensor | None = None,
    x_data: Tensor | None = None,
    strength: float | None = None,
    t_start: float | None = None,
    denoise: bool = True,
    dtype: torch.dtype | None = None,
    **which: Any,
) -> Job:
    """What `sample` runs; arguments and errors as there, `which` being those that `resolve_samples` takes."""
    check_flags(denoise=denoise, differentiable=options.differentiable)
    check_kind("callback", options.callback, Callable, "callable")
    if isinstance(score_fn, Model) and not isinstance(score_fn, ScoreModel):
        others = {"sde": sde, "atol": atol, "x_data": x_data, "strength": strength, "t_start": t_start, "dtype": dtype}
        others["differentiable"] = options.differentiable or None
        if refused := [name for name, value in others.items() if value is not None]:
            raise ValueError(f"sampling of tokens takes no {', '.join(refused)}.")
        how = {"solver": solver, "controller": controller, "rtol": rtol, "nfe": nfe}
        return _job_of_tokens(score_fn, x_init, which, how, options)
    if x_init is not None and x_data is not None:
        raise ValueError("give either x_init or x_data, not both.")
    given, name = (x_data, "x_data") if x_init is None else (x_init, "x_init")
    if given is not None:
        check_states(name, given, gradient=options.differentiable)
    model = as_model(score_fn, sde)
    process = model.sde if sde is None else sde
    samples = resolve_samples(model, given=given, name=name, dtype=dtype, **which)
    solver = ExponentialPC() if solver is None else solver
    process = started(process, given, strength, t_start, controller)
    steps = resolve_controller(model, process, solver, controller, rtol, atol, nfe, denoise)
    solver.check_model(model)
    span = steps.span(process.t_min, process.t_max)
    if given is None:
        check_start(process, span[0])
    if x_data is not None:
        # Where it starts, with the noise that is each sample's start.
        z = FreshNoise(samples.seed, samples.event, samples.dtype).prior(samples.index)
        times = torch.full(samples.index.shape, span[0], dtype=torch.float64, device=samples.device)
        start = process.marginal(x_data.to(samples.device, samples.dtype), times, z)
        samples = dataclasses.replace(samples, start=start)
    return make_job(model, process, solver, steps, span, samples, options, denoise=denoise)


def _job_of_tokens(
    model: Model, x_init: Tensor | None, which: dict[str, Any], how: dict[str, Any], options: Options
) -> Job:
    """`job_of` for a token model."""
    from fastsde import tokens  # when it is used: most callers have no tokens

    if not isinstance(model, tokens.TokenModel):
        raise TypeError(f"{type(model).__name__} draws no samples.")
    given = None if x_init is None else tokens.check_tokens("x_init", x_init, model)
    if given is not None:
        which["cond"] = {**(which.get("cond") or {}), **model.prompt_cond(given != tokens.MASK)}
    samples = resolve_samples(model, given=given, **which)
    solver, grid = tokens.resolve(model, event=samples.event, **how)
    start = torch.full((len(samples.index), *samples.event), tokens.MASK) if given is None else given
    noise = FreshNoise(samples.seed, samples.event, torch.int64)
    samples = dataclasses.replace(samples, dtype=torch.int64, start=start, noise=noise)
    if options.max_nfe is None:  # of a sample that draws one token at a time
        most = max(10_000, model.calls * solver.calls_per_step * math.prod(samples.event))
        options = dataclasses.replace(options, max_nfe=most)
    return make_job(model, model.process, solver, grid, (1.0, 0.0), samples, options)


def with_range(result: SampleResult, job: Job) -> SampleResult:
    """The result with who left the range of the data, if the samples are denoised data."""
    if not job.denoise or not isinstance(job.model, ScoreModel):
        return result
    return dataclasses.replace(result, outside=_outside(result.samples, job.model)[1])


def _outside(x: Tensor, model: ScoreModel) -> tuple[Tensor, Tensor]:
    """Which elements are far out of the range of the data, with shape (n, elements), and which samples, (n,)."""
    low, high = model.data_range
    far = ((x - (low + high) / 2).abs() > high - low).reshape(len(x), -1)
    return far, far.sum(1) > 0.01 * far.shape[1]  # NaN is not far


def warn_of_range(x: Tensor, model: ScoreModel) -> None:
    """Warns if samples, with shape (n, *event), left the range of the data.

    Of a range that nobody said, only if a tenth of all values are outside: data of variance 1 do not make that many.
    """
    far, outside = _outside(x, model)
    if outside.any() and (model.knows_range or far.double().mean() > 0.1):
        low, high = model.data_range
        warn(
            f"{int(outside.sum())} of {len(far)} samples left the range of the data: values beyond "
            f"{1.5 * low - high / 2:g} .. {1.5 * high - low / 2:g}, twice the width of data_range=({low:g}, {high:g}). "
            "With fewer than 10 calls, try 20: few steps may be the reason. Else the network is probably read in a "
            "wrong way (prediction, timestep=, sign): run fastsde.diagnose(model). Or the model's data_range is not "
            "that of the data. If all of these are right, clip the predictions "
            "(fastsde.score.Clipped), add noise (ExponentialPC(eta=1.0)), or start at less noise (t_max of the SDE).",
            DataRangeWarning,
        )


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
    r"""The inverse of deterministic sampling: it solves the probability flow from t_min up to noise at t_max.

    `sample(..., x_init=encode(..., x=x).samples, denoise=False)` with the same solver returns x, up to the error of the
    solver. With `solver=fastsde.DDIM(steps=50)` this is DDIM inversion. Source: Song, Meng and Ermon,
    https://arxiv.org/abs/2010.02502, sec. 4.3; Song et al., https://arxiv.org/abs/2011.13456, sec. 4.3.

    Args:
        score_fn, sde: as for `sample`.
        x: states at t_min, with shape (n, *event). In practice these are data.
        rtol: relative tolerance of an adaptive solver, 1e-3 by default. Sampling cannot repair an error made here.
        atol: absolute tolerance in units of the data, 1e-3 by default.
        solver: a deterministic one; adaptive `ProbabilityFlow()` by default.
        controller: as for `sample`. A `Grid` is used from its last time to its first.
        batch_size, cond, max_nfe, dtype, trajectory, progress: as for `sample`.
        device: that of `x` by default.

    Returns:
        A `SampleResult` whose samples are the states at t_max, with shape (n, *event).

    Raises:
        ValueError, TypeError, SamplingError, Interrupted: as `sample`; ValueError also if the solver uses noise.
    """
    check_states("x", x)
    model = as_model(score_fn, sde)
    process = model.sde if sde is None else sde
    samples = resolve_samples(model, given=x, name="x", cond=cond, dtype=dtype, device=device)
    solver = ProbabilityFlow() if solver is None else solver
    if controller is None and isinstance(solver, Solver) and solver.adaptive:
        rtol, atol = 1e-3 if rtol is None else rtol, 1e-3 if atol is None else atol
    if isinstance(solver, Solver) and solver.times is not None:
        raise ValueError(f"{type(solver).__name__} goes from noise to data only; encode with another solver.")
    controller = resolve_controller(model, process, solver, controller, rtol, atol, denoise=False)
    t_start, t_end = controller.span(process.t_min, process.t_max)
    options = Options(batch_size, max_nfe, trajectory, progress)
    solver, controller = Forward(solver), controller.reversed()
    return Engine(make_job(model, process, solver, controller, (t_end, t_start), samples, options)).run()
