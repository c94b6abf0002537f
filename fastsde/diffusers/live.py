"""`PipelineSampler`: a live queue for pipelines, whose networks are called for the samples of all requests together."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fastsde.checks import check_count
from fastsde.control import Controller
from fastsde.diffusers.joining import Call
from fastsde.diffusers.loop import Loop
from fastsde.diffusers.pipeline_model import Forwards, PipelineModel
from fastsde.diffusers.sampling import PipelineResult, PipelineRun, check_pipeline, raise_late, running
from fastsde.engine import Engine
from fastsde.job import EngineState, Job
from fastsde.lane import Lane, Request
from fastsde.live import RequestQueue
from fastsde.score.base import ScoreModel
from fastsde.solvers import Solver
from fastsde.types import Cond, Index, State, Time


class PipelineSampler(RequestQueue):
    r"""`Sampler` for a pipeline of diffusers: each sample runs in the pipeline's own loop.

        with fastsde.PipelineSampler(pipe, batch_size=8, rtol=0.05) as sampler:
            request = sampler.submit("a lighthouse in fog", seed=1)
            image = request.result().images[0]

    The network calls of samples of several requests are joined into one forward, as in `sample_pipeline`. Each sample
    is the one that `sample_pipeline` makes with the same arguments, up to the rounding of joined forwards.

    Args:
        pipe: the pipeline. Nobody else may run it meanwhile.
        batch_size: number of slots: the most samples that run at a time.
        max_waiting: the most samples that wait for a slot.
        max_nfe: as for `sample_pipeline`, for all requests.
        rtol, atol, nfe, solver: what requests take if they say none of rtol, atol, nfe, solver and controller.
        allow_distilled: as for `sample_pipeline`.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        batch_size: int = 8,
        max_waiting: int = 256,
        max_nfe: int | None = None,
        rtol: float | None = None,
        atol: float | None = None,
        nfe: int | None = None,
        solver: Solver | None = None,
        allow_distilled: bool = False,
    ) -> None:
        check_pipeline(pipe)
        self.pipe, self._allow = pipe, allow_distilled
        self.max_nfe = None if max_nfe is None else check_count("max_nfe", max_nfe, 1)
        self._default: dict[str, Any] = {"rtol": rtol, "atol": atol, "nfe": nfe, "solver": solver}
        self._forwards, self._models = _SeparateErrors(pipe), dict[int, PipelineModel]()
        super().__init__(batch_size, max_waiting)

    def submit(
        self,
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
        per_sample: Mapping[str, Sequence[Any]] | None = None,
        callback: Callable[[EngineState], None] | None = None,
        timeout: float | None = 0.0,
        **arguments: Any,
    ) -> Request:
        """Asks for samples.

        Args:
            prompt, n, rtol, atol, nfe, solver, controller, seed, index, per_sample, arguments: as for
                `sample_pipeline`.
            callback, timeout: as for `Sampler.submit`. `x_0` is in the space of the latents.

        Returns:
            A future of the `PipelineResult`, with `cancel()`. It has a `SamplingError` if the pipeline fails.

        Raises:
            ValueError, TypeError, SamplerFullError, RuntimeError: as `Sampler.submit` and `sample_pipeline`.
        """
        how: dict[str, Any] = {"rtol": rtol, "atol": atol, "nfe": nfe, "solver": solver, "controller": controller}
        if all(value is None for value in how.values()) and "num_inference_steps" not in arguments:
            how |= self._default
        run = PipelineRun(
            self.pipe,
            prompt,
            n=n,
            seed=seed,
            index=index,
            batch_size=self.batch_size,
            per_sample=per_sample,
            max_nfe=self.max_nfe,
            allow_distilled=self._allow,
            arguments=arguments,
            forwards=self._forwards,
            **how,
        )
        request = _PipelineRequest(run, self._models, callback)
        self.enqueue(request, timeout)
        return request

    def running(self) -> AbstractContextManager[None]:
        return running(self.pipe)

    def lane(self, job: Job) -> Lane:
        assert isinstance(job.model, PipelineModel)
        joint = dataclasses.replace(job, model=_Joint(job.model, self._models, self._forwards))
        return Lane(joint, self.batch_size, self._ended, self._failed, any_model=True)


class _PipelineRequest(Request):
    """A request whose job is known when its pipelines have begun; `models` are those of all that run, by number."""

    _numbers = itertools.count()

    def __init__(
        self, run: PipelineRun, models: dict[int, PipelineModel], callback: Callable[[EngineState], None] | None
    ) -> None:
        super().__init__(len(run.samples.index), run.samples.seed, callback)
        self.run, self.models, self.number = run, models, next(self._numbers)
        self.batch = run.model.batch_size

    def begin(self) -> Engine:
        model = self.run.model
        job = self.run.begin()
        if model.batch_size == 1 < self.batch:
            raise ValueError(
                "this pipeline changes its network while it runs, so that samples cannot run at the same time: use "
                "PipelineSampler(pipe, batch_size=1)."
            )
        self.models[self.number] = model
        cond = {**job.cond, "of": torch.full_like(job.cond["sample"], self.number)}
        return Engine(dataclasses.replace(job, cond=cond))

    def whole(self) -> PipelineResult:
        whole = self.run.whole(self.engine._result(self.since))
        raise_late(whole)
        return whole

    def close(self, *, others: bool) -> None:
        self.models.pop(self.number, None)
        if "engine" not in vars(self) and not self.run.model.loops:
            return  # it never began; it may be another thread that says so
        self.run.model.close(others=others)


class _SeparateErrors(Forwards):
    """Forwards for requests that have nothing to do with each other: what fails ends one sample alone."""

    def resume(self, loop: Loop, answer: Any) -> None:
        try:
            loop.resume(answer)
        except BaseException as error:  # noqa: BLE001 - it goes to whoever waits for the sample
            loop.failed(error)

    def answers(self, calls: Sequence[Call]) -> list[Any]:
        apart = set(self.apart)
        try:
            return super().answers(calls)
        except BaseException:  # noqa: BLE001 - each call alone says whose it is
            self.apart.intersection_update(apart)  # whether calls can be joined, a wrong one does not say
            return [self._alone(call) for call in calls]

    def _alone(self, call: Call) -> Any:
        try:
            return super().answers([call])[0]
        except BaseException as error:  # noqa: BLE001 - likewise
            call.loop.failed(error)
            return None


class _Joint(ScoreModel):
    """The models of several requests as one. `cond` says the request, "of", and the number of the sample in it."""

    per_row = True

    def __init__(self, first: PipelineModel, models: dict[int, PipelineModel], forwards: Forwards) -> None:
        super().__init__(first.network, first.sde, "sample", event_shape=first.event_shape, data_range=first.data_range)
        self.calls, self.models, self.forwards = first.calls, models, forwards
        self._costs = torch.empty(0, dtype=torch.int64)

    def output(self, x_t: State, t: Time, cond: Cond | None = None) -> State:
        assert cond is not None
        of, numbers = cond["of"].tolist(), cond["sample"].tolist()
        rows = {k: [row for row, number in enumerate(of) if number == k] for k in dict.fromkeys(of) if k in self.models}
        turns = {k: self.models[k].ask(x_t[ids], t[ids], [numbers[row] for row in ids]) for k, ids in rows.items()}
        self.forwards.advance([loop for turn in turns.values() for loop in turn.loops])
        x_0, edit = torch.full_like(x_t, torch.nan), None
        self._costs = torch.zeros(len(of), dtype=torch.int64, device=t.device)
        for k, turn in turns.items():
            model, ids = self.models[k], rows[k]
            x_0[ids] = model.answer(turn)
            self._costs[ids] = model.cost(turn.t, {})
            if model.edit is not None:
                edit = torch.zeros_like(x_t) if edit is None else edit
                edit[ids] = model.edit
        self.edit = edit
        return x_0

    def cost(self, t: Time, cond: Cond) -> Index | int:
        return self._costs
