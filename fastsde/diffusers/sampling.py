"""`sample_pipeline`: any pipeline of diffusers in its own loop, with our engine behind its scheduler."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastsde import api
from fastsde.arguments import resolve_controller, resolve_dtype, resolve_shape
from fastsde.batching import expand_like
from fastsde.checks import check_count, check_kind
from fastsde.control import Controller
from fastsde.diffusers.networks import LATENT_RANGE, check_distilled, config_of
from fastsde.diffusers.requests import Request, own_generator, streams
from fastsde.diffusers.schedules import CLASSES, Reading, filled, read_loop, unread
from fastsde.job import EngineState
from fastsde.result import Interrupted, SampleResult, SamplingError, Status
from fastsde.score.base import ScoreModel
from fastsde.score.network import evaluation_mode, weights_hash
from fastsde.sde.base import SDE
from fastsde.solvers import ExponentialPC, FittedSolver, Solver
from fastsde.types import Cond, Index, State, Time


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


class PipelineModel(ScoreModel):
    """The denoised prediction of a pipeline for samples that each stand in a loop of their own.

    Args:
        pipe: the pipeline.
        request: what it is asked for.
        reading: how its schedule is read.
        generators: for each sample.
        batch_size: samples in flight.
    """

    per_row = True

    def __init__(
        self, pipe: Any, request: Request, reading: Reading, generators: Sequence[torch.Generator], batch_size: int
    ) -> None:
        from fastsde.diffusers.loop import denoisers, processors

        networks = denoisers(pipe)
        latent = any(getattr(pipe, name, None) is not None for name in ("vae", "vqvae", "movq"))
        super().__init__(
            next(iter(networks.values())) if len(networks) == 1 else nn.ModuleList(networks.values()),
            reading.sde,
            "sample",
            data_range=LATENT_RANGE if latent else None,
        )
        self.pipe, self.request, self.reading, self.generators = pipe, request, reading, generators
        self.batch_size, self.ends_denoised = batch_size, True
        self.loops: dict[int, Any] = {}
        self.outputs: list[Any] = [None] * request.n
        self.errors: dict[int, BaseException] = {}
        self.stopped: set[int] = set()
        self.forwards = 0
        self._apart: set[int] = set()
        self._hooks: dict[int, list[Any]] = {}
        self._place = torch.device(pipe._execution_device) if hasattr(pipe, "_execution_device") else super().device
        self.separate: str | None = None
        self.process: SDE = reading.sde
        self.t_start, self.t_end = reading.sde.t_max, reading.sde.t_min
        self._costs: Tensor = torch.empty(0, dtype=torch.int64)
        self._memo: dict[Any, Any] = {}
        self.processors = processors(pipe)

    @property
    def device(self) -> torch.device:
        return self._place

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for part in self.pipe.components.values():
                if isinstance(part, nn.Module):
                    stack.enter_context(evaluation_mode(part))
            yield

    def check_cond(self, cond: Cond) -> None:
        """Conditioning is the pipeline's own."""

    def begin(self) -> None:
        """Runs the first samples to their first step, which tells shape, start and cost of a sample."""
        from fastsde.diffusers.loop import SharedNetworkError

        try:
            self.prepare(range(self.batch_size))
        except SharedNetworkError:  # before the first network call: nothing is lost
            for loop in self.loops.values():
                loop.close()
            self.loops.clear()
            for part in self.pipe.components.values():
                if self.processors.get(id(part)):
                    part.set_attn_processor(dict(self.processors[id(part)]))
            self.batch_size = 1
            self.separate = "the pipeline changes its network while it runs, so that samples ran one after another"
            self.prepare([0])

    def start(self, slots: Tensor) -> State:
        """The states that samples start from, or start from again."""
        numbers = slots.tolist()
        self.prepare(numbers)
        for i in numbers:
            loop = self.loops[i]
            if loop.begun:
                loop.memory.reset()  # which knows what came later
            # The first prediction is known, and costs nothing again; but caches are to see the first call once more.
            loop.again = loop.begun and any(self._hooks.values())
            loop.begun, loop.ready = True, None if loop.again else loop.first
        return torch.stack([self.loops[i].begin for i in numbers])

    def prepare(self, numbers: Sequence[int]) -> None:
        """Runs the pipelines of samples that have none yet to their first step."""
        from fastsde.diffusers.loop import Loop

        new = [i for i in numbers if i not in self.loops]
        for i in new:
            arguments = dict(self.request.arguments[i])
            if "generator" in self.request.takes:
                arguments["generator"] = self.generators[i]
            self.loops[i] = Loop(
                self.pipe,
                arguments,
                self.reading,
                self._memo,
                processors=self.processors,
                alone=self.batch_size == 1,
                seed=self.generators[i].initial_seed(),
                device=self._place,
            )
        self._advance([self.loops[i] for i in new])
        for i in new:
            self._begin(i, self.loops[i])

    def _begin(self, i: int, loop: Any) -> None:
        """Reads where a sample starts off its first evaluation."""
        if i in self.errors or loop.stopped:
            loop.begin = torch.zeros(self.event_shape or (1,), device=self.device)
            return
        if loop.ended:
            raise ValueError(
                f"{type(self.pipe).__name__} came to its end without a step of its scheduler; it is not sampled by a "
                "loop over scheduler.timesteps. Run it with its own scheduler."
            )
        shape, sde = loop.sample.shape, self.sde
        event = tuple(shape[1:]) if len(shape) > 1 and shape[0] == 1 else tuple(shape)
        given, end = self._ends(loop)
        start = min(given, sde.t_max)
        if self.event_shape is None:
            self.event_shape, self.t_start, self.t_end = event, start, end
            self.calls = max(1, loop.cost)
        if (event, start, end) != (self.event_shape, self.t_start, self.t_end):
            raise ValueError(
                f"samples of one call must have one shape and one start; one has {self.event_shape} from t = "
                f"{self.t_start:.4g}, another {event} from {start:.4g}. Give other sizes or strengths a call of their "
                "own."
            )
        self.calls = max(self.calls, loop.cost)
        loop.note_start(given)
        loop.first = self._denoised([loop], torch.tensor([given], dtype=torch.float64))[0]
        x = loop.sample.reshape(event).to(loop.first.dtype) * self._alpha(given)
        if given > start:
            # The end of a flow cannot be stepped from: along the first prediction to the first level below it.
            at, to = (sde.level(torch.tensor([t], dtype=torch.float64)) for t in (given, start))
            keep = float(to.sigma / at.sigma)
            x = keep * x + float(to.alpha - keep * at.alpha) * loop.first
        loop.begin = x

    def _ends(self, loop: Any) -> tuple[float, float]:
        """The process's times at which a loop begins and ends: where its list was cut, else the process's own."""
        first, end = loop.span
        given = max(min(first, 1.0) if self.reading.is_flow else first, self.sde.t_min)
        return given, self.sde.t_min if end is None else max(end, self.sde.t_min)

    def output(self, x_t: State, t: Time, cond: Cond | None = None) -> State:
        numbers = (cond or {})["sample"].tolist()
        x_0, edit = torch.full_like(x_t, torch.nan), None
        asked = []
        for k, i in enumerate(numbers):
            loop = self.loops[i]
            ready, loop.ready = loop.ready, None
            if ready is not None and float(t[k]) == self.t_start and torch.equal(x_t[k], loop.begin.to(x_t)):
                x_0[k] = ready
            elif not loop.ended:
                asked.append(k)
        if asked:
            times = self.reading.timestep(t[asked]).float()
            for k, timestep in zip(asked, times, strict=True):
                loop, now = self.loops[numbers[k]], float(t[k])
                if loop.again and torch.equal(x_t[k], loop.begin.to(x_t)):
                    loop.give_again()
                else:
                    loop.give(x_t[k] / self._alpha(now), now, timestep)
            self._advance([self.loops[numbers[k]] for k in asked])
            there = [k for k in asked if not self.loops[numbers[k]].ended]
            if there:
                loops = [self.loops[numbers[k]] for k in there]
                x_0[there] = self._denoised(loops, torch.tensor([loop.at for loop in loops]).double()).to(x_t)
                edits = {k: e for k, loop in zip(there, loops, strict=True) if (e := loop.edit) is not None}
                if edits:
                    edit = torch.zeros_like(x_t)
                    for k, value in edits.items():
                        edit[k] = value.reshape(x_t[k].shape).to(x_t) * self._alpha(float(t[k]))
        self.edit = edit
        self._costs = torch.tensor([self.loops[i].take_cost() for i in numbers], device=t.device)
        return x_0

    def _alpha(self, t: float) -> float:
        """What a loop's state is to be multiplied by."""
        return float(self.sde.alpha(torch.tensor([t], dtype=torch.float64))) if self.reading.exploding else 1.0

    def cost(self, t: Time, cond: Cond) -> Index | int:
        return self._costs if len(self._costs) == len(t) else self.calls

    def _denoised(self, loops: Sequence[Any], t: Time) -> State:
        """The denoised predictions of loops that stand at their step, with shape (B, *event)."""
        sample = torch.stack([loop.sample.reshape(self.event_shape) for loop in loops])
        out = torch.stack([loop.out.reshape(self.event_shape) for loop in loops])
        dtype = torch.promote_types(sample.dtype, torch.float32)
        level, sample = self.sde.level(t.to(sample.device)), sample.to(dtype)
        if self.reading.exploding:
            sample = expand_like(level.alpha, sample) * sample
        x_0 = self.reading.clip(self.reading.read(out.to(dtype), sample, level).x_0)
        for loop, row in zip(loops, x_0, strict=True):
            if loop.given_x_0 is not None:
                row.copy_(loop.given_x_0.reshape(row.shape))
        for loop, one in zip(loops, x_0, strict=True):
            loop.denoised = one.to(loop.sample.dtype).reshape(loop.sample.shape)
        return x_0

    def _advance(self, loops: Sequence[Any]) -> None:
        """Runs loops to their next step or their end, and serves their networks' calls together."""
        from fastsde.diffusers.joining import answered, cache_hooks

        waiting = [(loop, None) for loop in loops]
        while waiting:
            for loop, answer in waiting:
                loop.resume(answer)
            calls = [loop.call for loop, _ in waiting if loop.call is not None]
            for call in calls:
                if id(call.module) not in self._hooks:
                    self._hooks[id(call.module)] = cache_hooks(call.module)
            remembering = {key: hooks for key, hooks in self._hooks.items() if hooks}
            if remembering:
                self.separate = "its network has cache hooks, which remember each sample's earlier calls"
            answers, forwards, why = answered(calls, remembering, self._apart, self._failed)
            self.forwards += forwards
            self.separate = why or self.separate
            waiting = [(c.loop, a) for c, a in zip(calls, answers, strict=True) if not c.loop.ended]

    def _failed(self, call: Any, error: Exception) -> None:
        """Ends a sample for which memory did not suffice."""
        i = next(i for i, loop in self.loops.items() if loop is call.loop)
        if self.event_shape is None:  # nothing runs yet
            raise error
        self.errors[i] = error
        call.loop.close()

    def finished(self, slots: Tensor, x: State, status: Tensor) -> None:
        """Lets the pipelines of samples that have ended go on from their last states, to their outputs."""
        for i, last, how in zip(slots.tolist(), x, status.tolist(), strict=True):
            loop = self.loops.pop(i, None)
            if loop is None:
                continue
            if loop.stopped:
                self.stopped.add(i)
            elif loop.ended or how == Status.NON_FINITE:
                loop.close()
                continue
            else:
                # The last state is denoised as a rule, and then it is data.
                loop.finish(last if self.ends_denoised else last / self._alpha(self.t_end))
                try:
                    while not loop.ended:
                        self._advance([loop])
                        if not loop.ended:
                            raise ValueError(
                                "this pipeline takes another step after its loop; it is not known for what."
                            )
                except Exception as error:  # noqa: BLE001 - its last state is in the result, and others go on
                    self.errors[i] = error
                    loop.close()
                    continue
            self.outputs[i] = loop.output

    def close(self) -> None:
        """Ends what still runs, and lets the pipeline put its models where they belong."""
        for loop in self.loops.values():
            loop.close()
        self.loops.clear()
        if hasattr(self.pipe, "maybe_free_model_hooks"):
            self.pipe.maybe_free_model_hooks()

    def whole(self, result: SampleResult) -> PipelineResult:
        """The result with the pipeline's outputs."""
        status = result.status.clone()
        status[sorted(self.stopped)] = int(Status.STOPPED)
        failed = [i for i in self.errors if not torch.isfinite(result.samples[i]).all()]
        status[failed] = int(Status.FAILED)
        result = dataclasses.replace(result, status=status)
        return PipelineResult(self.outputs, result, self.forwards, self.separate, self.errors, self.process)


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
    r"""Samples with any diffusers pipeline in its own loop: its call runs unchanged, our engine answers its scheduler.

        r = fastsde.sample_pipeline(pipe, "a lighthouse in fog", n=4, rtol=0.05, seed=0)
        r.images, r.result.nfe

    Everything but the steps is the pipeline's: prompts, guidance, control images, masks, strength, adapters, experts,
    decoding. Each sample runs in a call of its own and takes its own steps. Network calls of the samples in flight are
    one forward where their tensors can be joined, at different times and prompts; those that are done leave.

    The pipeline's number of steps, its default or `num_inference_steps`, is the length of its own list of times. It
    says how finely `strength` cuts, and what a share of the steps is, as in `control_guidance_end`; what counts steps,
    such as `callback_on_step_end`, sees the place of the time in that list. It does not say how many steps are taken,
    unless it is given without rtol, nfe, solver and controller: then there are as many evaluations.

    Args:
        pipe: a pipeline whose loop takes one step of one scheduler a turn.
        prompt: as the pipeline's; a list for several samples.
        n: number of samples, where there is one prompt or none.
        rtol: as for `sample`, like atol, solver, controller, index, max_nfe, dtype, progress and callback.
        nfe: network calls that no sample exceeds; both halves of guidance count. Known by the first evaluation.
        seed: in [0, 2^64); drawn by torch by default, and then in `.result.seed`. Sample i, its start and all noise of
            its pipeline, is a function of (seed, i), at any batch size.
        batch_size: samples in flight.
        per_sample: arguments of the pipeline with one value for each sample, such as `{"image": [a, b]}`. Lists of
            prompts, of embeddings (by their leading axis), class labels, latents, generators, and of numbers where the
            pipeline takes a number, need not stand here.
        allow_distilled: do not refuse checkpoints that look distilled.
        arguments: those of the pipeline's call. With `generator=` of one sample, or a list, its pipeline draws from
            that one.

    Returns:
        A `PipelineResult`.

    Raises:
        ValueError, TypeError: before the first network call, naming the argument; after one, if the loop then turns out
            to be none that can be answered.
        SamplingError: if the pipeline or a callback fails after samples were finished, or a decoder at the end; a
            `PipelineResult` with what there is is in `.result`.
        Interrupted: at Ctrl-C; likewise.
    """
    reading = _reading(pipe)
    if not allow_distilled:
        _check_distilled(pipe, reading)
    check_kind("per_sample", per_sample, Mapping, "a dict of lists")
    if prompt is not None:
        arguments["prompt"] = prompt
    request = Request(pipe, arguments, per_sample or {}, n, index)
    solver = ExponentialPC() if solver is None else solver
    steps = arguments.get("num_inference_steps")
    counted = steps is not None and all(v is None for v in (rtol, nfe, controller)) and _takes_grid(solver)
    seed, own = streams(request.generator, seed, request.n, index)
    _, _, numbers = resolve_shape(ScoreModel(pipe, reading.sde), None, (request.n, 1), None, index)
    generators = [g or own_generator(seed, i) for g, i in zip(own, numbers.tolist(), strict=True)]
    batch = min(check_count("batch_size", batch_size, 1), request.n)
    reading = _started(reading, controller)
    model = PipelineModel(pipe, request, reading, generators, batch)
    if isinstance(solver, FittedSolver):
        solver = _for_network(solver, model)

    def parts(process: SDE) -> tuple[Controller, float, float]:
        budget = steps * model.calls if steps is not None and counted else nfe
        made = resolve_controller(model, process, solver, controller, rtol, atol, budget, denoise)
        return made, *made.span(process.t_min, process.t_max)

    denoise = True
    parts(reading.sde)  # what cannot work is refused before the pipeline starts
    try:
        with torch.no_grad(), model.sampling():
            model.begin()
            process = model.process = _between(pipe, model)
            denoise = model.ends_denoised = model.t_end <= reading.sde.t_min
            chosen, first, last = parts(process)
            if not math.isclose(first, process.t_max, rel_tol=1e-6):
                raise ValueError(
                    f"controller starts at t = {first:.6g}, the pipeline at {process.t_max:.6g}. Its times are in "
                    ".process of a result: fastsde.Grid.log_snr(r.process, 20)."
                )
            result = api.run(
                model,
                process,
                solver,
                chosen,
                t_start=first,
                t_end=last,
                event=model.event_shape or (),
                index=numbers,
                x_init=None,
                start=model.start,
                finished=model.finished,
                seed=seed,
                batch_size=model.batch_size,
                cond={"sample": torch.arange(request.n)},
                denoise=denoise,
                max_nfe=max_nfe,
                dtype=resolve_dtype(dtype, None),
                device=model.device,
                progress=progress,
                callback=callback,
            )
        whole = model.whole(result)
    except (Interrupted, SamplingError) as stopped:
        stopped.result = model.whole(stopped.result)
        raise
    finally:
        model.close()
    if whole.errors and not any(s == Status.FAILED for s in whole.result.status.tolist()):
        place, error = next(iter(whole.errors.items()))
        raise SamplingError(
            f"the pipeline failed after its loop for {len(whole.errors)} of {request.n} samples, sample {place} with "
            f"{type(error).__name__}: {error}; their last states are in .result of this exception.",
            whole,
        ) from error
    return whole


def _takes_grid(solver: Solver) -> bool:
    """Whether somebody else says how many steps a solver takes."""
    return isinstance(solver, Solver) and solver.steps is None and solver.times is None


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


def _reading(pipe: Any) -> Reading:
    """How the pipeline's schedule is read.

    Raises:
        TypeError, ValueError: for what has no loop that can be answered, as far as that is seen from outside.
    """
    if not hasattr(pipe, "components") or not callable(pipe):
        raise TypeError(f"pipe must be a pipeline of diffusers; got {type(pipe).__name__}.")
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
    bases = [kind.__name__ for kind in type(scheduler).__mro__]
    config = {**scheduler.config, "_class_name": next((b for b in bases if b in CLASSES), bases[0])}
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
        check_distilled(config_of(network), reading)


def _between(pipe: Any, model: PipelineModel) -> SDE:
    """The process from where the pipeline's list starts to where it ends."""
    process = copy.copy(model.sde)
    process.t_max, process.t_min = model.t_start, model.t_end
    terminal = pipe.scheduler.config.get("shift_terminal")
    if model.reading.is_flow and terminal and model.t_end <= model.sde.t_min:
        process.t_min = min(float(terminal), process.t_max / 2)
    return process
