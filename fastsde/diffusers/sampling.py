"""`sample_pipeline`: any pipeline of diffusers in its own loop, with our engine behind its scheduler."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastsde.arguments import check_index, resolve_dtype
from fastsde.checks import check_count, check_instance, check_kind
from fastsde.control import Controller
from fastsde.diffusers.adapter import scheduler_config
from fastsde.diffusers.networks import check_distilled, config_of
from fastsde.diffusers.requests import Request, number_of, own_generator, streams
from fastsde.diffusers.schedules import Reading, filled, read_loop, unread
from fastsde.engine import Engine
from fastsde.job import EngineState, Job, Options, Samples, fewest_calls, make_job
from fastsde.result import Interrupted, SampleResult, SamplingError, Status
from fastsde.score.network import weights_hash
from fastsde.sde.base import SDE
from fastsde.solvers import ExponentialPC, FittedSolver, Solver
from fastsde.steps import resolve_controller
from fastsde.types import Index

if TYPE_CHECKING:  # which needs greenlet
    from fastsde.diffusers.pipeline_model import Forwards, PipelineModel


@dataclasses.dataclass(frozen=True)
class PipelineResult:
    """What a pipeline made, and what each sample cost.

    Attributes:
        outputs: for each sample, what the pipeline's call returned, or None where it did not come to that.
        result: the `SampleResult`: last states, calls, steps, status of each.
        forwards: forwards of the networks that were made; fewer than the calls where those of several samples were one.
        separate: why calls of samples were not joined; None if nothing stood in the way.
        errors: what samples failed with, by their place.
        process: the process that was walked, from where the pipeline's list starts; for grids of its times.
    """

    outputs: list[Any]
    result: SampleResult
    forwards: int = 0
    separate: str | None = None
    errors: Mapping[int, BaseException] = dataclasses.field(default_factory=dict)
    process: SDE | None = None

    def gather(self, name: str) -> Any:
        """One field of all outputs, such as "images", in the order of the samples.

        Returns:
            A list, with None for samples without output; or an array or tensor with leading axis n, with NaN for those.
        """
        parts = [None if out is None else _field(out, name) for out in self.outputs]
        some = next((part for part in parts if part is not None), None)
        if isinstance(some, (np.ndarray, Tensor)):
            kind: Any = torch if isinstance(some, Tensor) else np
            whole = [kind.full_like(some, np.nan) if part is None else part for part in parts]
            return torch.cat(whole) if isinstance(some, Tensor) else np.concatenate(whole)
        flat: list[Any] = []
        for part in parts:
            flat.extend([None] if part is None else part if isinstance(part, (list, tuple)) else [part])
        return flat

    def __repr__(self) -> str:
        kinds = sorted({type(out).__name__ for out in self.outputs if out is not None})
        return f"PipelineResult(outputs={len(self.outputs)} of {kinds}, {self.result}, forwards={self.forwards})"

    @property
    def images(self) -> Any:
        """The images of all samples; the like for videos, `frames`, and for sound, `audios`."""
        return self.gather("images")

    @property
    def frames(self) -> Any:
        """The frames of all samples."""
        return self.gather("frames")

    @property
    def audios(self) -> Any:
        """The sound of all samples."""
        return self.gather("audios")


def _field(output: Any, name: str) -> Any:
    if isinstance(output, tuple):
        return output[0]
    found = getattr(output, name, None)
    if found is None:
        raise AttributeError(f"{type(output).__name__} has no {name}; it has {', '.join(vars(output))}.")
    return found


def sample_pipeline(
    pipe: Any,
    prompt: Any = None,
    *,
    n: int | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    nfe: int | None = None,
    solver: Solver | None = None,
    controller: Controller | None = None,
    seed: int | None = None,
    index: Sequence[int] | Tensor | None = None,
    batch_size: int = 8,
    per_sample: Mapping[str, Sequence[Any]] | None = None,
    max_nfe: int | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    callback: Callable[[EngineState], None] | None = None,
    allow_distilled: bool = False,
    **arguments: Any,
) -> PipelineResult:
    r"""Samples with a pipeline of diffusers: its own loop runs unchanged, with our solver in place of its scheduler.

        r = fastsde.sample_pipeline(pipe, "a lighthouse in fog", n=4, rtol=0.05, seed=0)
        r.images, r.result.nfe

    Everything but the steps is the pipeline's: prompts, guidance, control images, masks, strength, adapters, experts,
    decoding. The pipeline is called once for each sample, and each sample takes its own steps. The network calls of
    several samples are joined into one forward if the shapes of their tensors allow it, also at different times and
    with different prompts.

    `num_inference_steps` is the length of the pipeline's own list of times. If none of rtol, nfe, controller and the
    solver's steps is given, it also sets the cost: there are as many evaluations as in the pipeline's own loop, with
    the same numbers. Otherwise it only sets to which times `strength` is rounded, and where a share of the steps ends,
    as in `control_guidance_end`. The number of a step, for example in `callback_on_step_end`, is then the place of its
    time in the list. Some numbers may be skipped.

    Args:
        pipe: a pipeline whose loop makes one step of one scheduler in each turn.
        prompt: as for the pipeline. A list gives one sample for each prompt.
        n: number of samples, if there is one prompt or none.
        rtol: as for `sample`, like atol, solver, controller, index, max_nfe, dtype, progress and callback. 0.05 if no
            argument sets the number of steps. For a fitted solver the network's weights are checked, its guidance is
            not.
        nfe: no sample makes more network calls than this. Guidance makes two calls in each evaluation. All evaluations
            are assumed to cost as much as the first one. If later ones make more calls, samples cost more.
        seed: in [0, 2^64). By default it is drawn by torch; `.result.seed` has it. Sample i, with its start and all
            noise of its pipeline, is a function of (seed, i), at any batch size.
        batch_size: number of samples that run at the same time.
        per_sample: arguments of the pipeline with one value for each sample, such as `{"image": [a, b]}`. Lists of
            prompts, embeddings (by their leading axis), class labels, latents, generators and guidance scales need not
            be given here.
        allow_distilled: do not refuse checkpoints that look distilled.
        arguments: those of the pipeline's call. With `generator=` (a list for several samples) the pipeline draws from
            it, and its state determines the solver's noise.

    Returns:
        A `PipelineResult`.

    Raises:
        ValueError, TypeError: before the first network call, naming the argument. After the first call if only then the
            loop turns out to be one that is not supported.
        SamplingError: if the pipeline or a callback fails after samples were finished, or if a decoder fails. `.result`
            is a `PipelineResult` with what was finished.
        Interrupted: at Ctrl-C; likewise.
    """
    which: dict[str, Any] = {"n": n, "seed": seed, "index": index, "per_sample": per_sample, "arguments": arguments}
    how: dict[str, Any] = {"rtol": rtol, "atol": atol, "nfe": nfe, "solver": solver, "controller": controller}
    how |= {"batch_size": batch_size, "max_nfe": max_nfe, "dtype": dtype, "progress": progress, "callback": callback}
    run = PipelineRun(pipe, prompt, allow_distilled=allow_distilled, **which, **how)
    try:
        with running(pipe):
            whole = run.whole(Engine(run.begin()).run())
    except (Interrupted, SamplingError) as stopped:
        stopped.result = run.whole(stopped.result)
        raise
    finally:
        run.model.close()
    raise_late(whole)
    return whole


class PipelineRun:
    """A call of `sample_pipeline`, between what it is asked and what the engine is given; arguments as there.

    `forwards` calls the networks, for other runs too.
    """

    def __init__(
        self,
        pipe: Any,
        prompt: Any,
        *,
        n: int | None,
        rtol: float | None,
        atol: float | None,
        nfe: int | None,
        solver: Solver | None,
        controller: Controller | None,
        seed: int | None,
        index: Sequence[int] | Tensor | None,
        batch_size: int,
        per_sample: Mapping[str, Sequence[Any]] | None,
        max_nfe: int | None,
        allow_distilled: bool,
        arguments: dict[str, Any],
        dtype: torch.dtype | None = None,
        progress: bool = False,
        callback: Callable[[EngineState], None] | None = None,
        forwards: Forwards | None = None,
    ) -> None:
        from fastsde.diffusers.pipeline_model import PipelineModel

        reading = _reading(pipe)
        if not allow_distilled:
            _check_distilled(pipe, reading)
        check_kind("per_sample", per_sample, Mapping, "a dict of lists")
        if arguments.get("eta") and hasattr(pipe, "prepare_extra_step_kwargs"):
            raise ValueError(
                f"eta={arguments['eta']} is for the pipeline's own scheduler, which does not run here: give "
                f"solver=fastsde.ExponentialPC(eta={arguments['eta']})."
            )
        parameter = inspect.signature(type(pipe).__call__).parameters.get("prompt")
        needed = parameter is not None and parameter.default is parameter.empty
        if prompt is not None or (needed and "prompt" not in (per_sample or {})):
            arguments["prompt"] = prompt
        request = Request(pipe, arguments, per_sample or {}, n, index)
        solver = ExponentialPC() if solver is None else solver
        check_instance("solver", solver, Solver, "an object such as fastsde.DDIM(steps=50)")
        self._listed = arguments.get("num_inference_steps")
        others = (rtol, nfe, controller, solver.steps, solver.times)
        self._counted = self._listed is not None and all(v is None for v in others)
        self._how: dict[str, Any] = {"controller": controller, "rtol": rtol, "atol": atol}
        self._nfe = nfe
        seed, numbers, generators = _noise(request, seed, index)
        batch = min(check_count("batch_size", batch_size, 1), request.n)
        self.pipe = pipe
        self.model = PipelineModel(
            pipe,
            request,
            _started(reading, controller),
            generators,
            batch,
            counts_turns=self._counted,
            forwards=forwards,
        )
        self.solver = _for_network(solver, self.model) if isinstance(solver, FittedSolver) else solver
        self._planned(self.model.sde)  # what cannot work is refused before the pipeline starts
        self.samples = Samples(numbers, (), resolve_dtype(dtype, None), seed, {})
        self.options = Options(batch, max_nfe, progress=progress, callback=callback)

    def begin(self) -> Job:
        """Lets the pipelines begin; the job takes their samples from there to the end of their loops.

        A loop that turns out not to be supported, or to start elsewhere than the controller, is refused.
        """
        model = self.model
        model.begin()
        process = model.process = _between(self.pipe, model)
        denoise = model.ends_denoised = model.t_end <= model.reading.sde.t_min
        if isinstance(self.solver, FittedSolver) and process.t_max < self.solver.times[0] * (1 - 1e-6):
            raise ValueError(
                f"a fitted solver starts from noise; this call starts at t = {process.t_max:.4g}. Leave solver= out."
            )
        chosen, span = self._planned(process, denoise=denoise)
        if not math.isclose(span[0], process.t_max, rel_tol=1e-6):
            raise ValueError(
                f"controller starts at t = {span[0]:.6g}, the pipeline at {process.t_max:.6g}. Its times are in "
                ".process of a result: fastsde.Grid.log_snr(r.process, 20)."
            )
        samples = dataclasses.replace(
            self.samples,
            index=self.samples.index.to(model.device),
            event=model.event_shape or (),
            cond={"sample": torch.arange(len(self.samples.index), device=model.device)},
            start=model.start,
            finished=model.finished,
        )
        options = dataclasses.replace(self.options, batch_size=model.batch_size)
        return make_job(model, process, self.solver, chosen, span, samples, options, denoise=denoise)

    def whole(self, result: SampleResult) -> PipelineResult:
        """The result with the pipeline's outputs."""
        model, status = self.model, result.status.clone()
        status[sorted(model.stopped)] = int(Status.STOPPED)
        status[[i for i in model.errors if not torch.isfinite(result.samples[i]).all()]] = int(Status.FAILED)
        result = dataclasses.replace(result, status=status)
        forwards = model.forwards
        return PipelineResult(model.outputs, result, forwards.made, forwards.separate, model.errors, model.process)

    def _planned(self, process: SDE, *, denoise: bool = True) -> tuple[Controller, tuple[float, float]]:
        """Controller and span; as many evaluations as its own loop makes, if that says: of an image a share of them."""
        model, budget = self.model, self._nfe
        if self._counted:
            least = fewest_calls(model, self.solver, denoise)
            budget = max((model.listed or self._listed or 1) * model.calls, least)
        found = resolve_controller(model, process, self.solver, nfe=budget, denoise=denoise, **self._how)
        return found, found.span(process.t_min, process.t_max)


@contextlib.contextmanager
def running(pipe: Any) -> Iterator[None]:
    """What runs of a pipeline need around them."""
    from fastsde.diffusers.loop import counting
    from fastsde.diffusers.pipeline_model import evaluating

    if "_interrupt" in vars(pipe):
        vars(pipe)["_interrupt"] = False
    with torch.no_grad(), evaluating(pipe), counting(pipe):
        yield


def _noise(
    request: Request, seed: int | None, index: Sequence[int] | Tensor | None
) -> tuple[int, Index, list[torch.Generator]]:
    """The seed, the sample numbers with shape (n,), and what each pipeline draws from."""
    if index is not None and seed is None and request.generator is None:
        raise ValueError("index= names samples of a seed; give seed=, too.")
    if index is not None and len(index) == 0:
        raise ValueError("index must name at least one sample; got an empty list.")
    seed, own = streams(request.generator, seed, request.n, index)
    if any(g is not None for g in own):
        index = [number_of(g) for g in own]
    numbers = check_index(index)
    if numbers is None:
        numbers = torch.arange(request.n)
    elif len(numbers) != request.n:
        raise ValueError(f"the number of samples disagrees: index says {len(numbers)}, the call {request.n}.")
    return seed, numbers, [g or own_generator(seed, i) for g, i in zip(own, numbers.tolist(), strict=True)]


def raise_late(whole: PipelineResult) -> None:
    """Raises a SamplingError, with the result, if pipelines failed after their loops; memory is a status."""
    status = whole.result.status
    late = {
        k: error
        for k, error in whole.errors.items()
        if status[k] != Status.FAILED or not isinstance(error, torch.OutOfMemoryError)
    }
    if not late:
        return
    place, error = next(iter(late.items()))
    when = "in" if status[place] == Status.FAILED else "after"
    raise SamplingError(
        f"the pipeline failed {when} its loop for {len(late)} of {len(whole.outputs)} samples, sample {place} with "
        f"{type(error).__name__}: {error}; their last states are in .result of this exception.",
        whole,
    ) from error


def _for_network(solver: FittedSolver, model: PipelineModel) -> FittedSolver:
    """A solver that was fitted to the pipeline's network; how the pipeline guides it is the pipeline's own."""
    wanted = solver.weights_sha256
    if wanted is not None and wanted != (found := weights_hash(model.network)):
        theirs, ours = (f"weights {v[:12]}" if v else "no weights" for v in (wanted, found))
        raise ValueError(
            f"this solver was fitted to a network with {theirs}; this pipeline's has {ours}. Fit it again, or say that "
            "it may walk any model: solver.for_any_model()."
        )
    return solver.for_any_model()


def check_pipeline(pipe: Any) -> None:
    """Refuses, with a TypeError, what is no pipeline of diffusers."""
    if not hasattr(pipe, "components") or not callable(pipe):
        raise TypeError(f"pipe must be a pipeline of diffusers; got {type(pipe).__name__}.")


def _reading(pipe: Any) -> Reading:
    """How the pipeline's schedule is read; what has no loop that can be answered is refused, as far as it is seen."""
    check_pipeline(pipe)
    name = type(pipe).__name__
    schedulers = [key for key, part in pipe.components.items() if hasattr(part, "set_timesteps")]
    inner = [key for key, part in vars(pipe).items() if hasattr(part, "components")]
    if inner:
        raise TypeError(f"{name} runs other pipelines ({', '.join(inner)}); sample each of them.")
    if "scheduler" not in schedulers:
        found = f"it has {', '.join(schedulers)}" if schedulers else "it has none"
        raise TypeError(f"{name} must have one scheduler, named scheduler; {found}. Run it with its own loop.")
    scheduler = pipe.scheduler
    if not hasattr(scheduler, "step"):
        raise TypeError(f"{name} has a scheduler without step ({type(scheduler).__name__}). Run it with its own loop.")
    config = scheduler_config(scheduler)
    if config.get("fitted"):
        raise ValueError(
            f"the scheduler of {name} has a fitted solver, which runs in the pipeline's own call alone: call the "
            "pipeline, or give it a scheduler without fitted= and the solver here as solver=."
        )
    reading = read_loop({key: value for key, value in filled(config).items() if key not in unread(config)})
    exploding = hasattr(scheduler, "is_scale_input_called") and not reading.is_flow
    return dataclasses.replace(reading, exploding=exploding)


def _started(reading: Reading, controller: Controller | None) -> Reading:
    """The reading, from where a controller starts; a flow's loops start at t = 1, whatever comes."""
    if not isinstance(controller, Controller) or reading.is_flow:
        return reading
    first, _ = controller.span(reading.sde.t_min, reading.sde.t_max)
    sde = copy.copy(reading.sde)
    sde.t_max = min(max(first, sde.t_min), sde.t_max)
    return dataclasses.replace(reading, sde=sde) if sde.t_max > sde.t_min else reading


def _check_distilled(pipe: Any, reading: Reading) -> None:
    from fastsde.diffusers.loop import denoisers

    for network in denoisers(pipe).values():
        config = dict(config_of(network))
        if not hasattr(pipe, "get_guidance_scale_embedding"):  # then it is something else that joins the time
            config.pop("time_cond_proj_dim", None)
        check_distilled(config, reading)


def _between(pipe: Any, model: PipelineModel) -> SDE:
    """The process from where the pipeline's list starts to where it ends."""
    process = copy.copy(model.sde)
    process.t_max, process.t_min = model.t_start, model.t_end
    terminal = pipe.scheduler.config.get("shift_terminal")
    if model.reading.is_flow and terminal and model.t_end <= model.sde.t_min:
        process.t_min = min(float(terminal), process.t_max / 2)
    return process
