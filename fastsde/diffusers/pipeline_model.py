"""Samples in their pipelines' own loops, as a score model."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastsde.batching import expand_like
from fastsde.diffusers.joining import Call, answered, cache_hooks
from fastsde.diffusers.loop import Loop, SharedNetworkError, denoisers, processors_of, restore, touched
from fastsde.diffusers.networks import LATENT_RANGE
from fastsde.diffusers.requests import Request
from fastsde.diffusers.schedules import Reading
from fastsde.result import Status
from fastsde.score.base import ScoreModel
from fastsde.score.network import evaluation_mode
from fastsde.sde.base import SDE
from fastsde.types import Cond, Index, State, Time

_CHANGES = "the pipeline changes its network while it runs, so that samples ran one after another"


def evaluating(pipe: Any) -> contextlib.AbstractContextManager[None]:
    """All networks of a pipeline in evaluation mode."""
    return evaluation_mode(nn.ModuleList(part for part in pipe.components.values() if isinstance(part, nn.Module)))


class Forwards:
    """The forwards of a pipeline's networks, for the calls of all samples that run at the same time.

    Attributes:
        made: how many there were.
        separate: why calls of samples were not joined; None if nothing stood in the way.
        hooks: hooks that remember earlier calls, by the id of their network.
        apart: ids of networks whose calls are not joined.
        untouched: what `touched` says of the pipeline before any sample runs.
    """

    def __init__(self, pipe: Any) -> None:
        self.made = 0
        self.separate: str | None = None
        self.hooks: dict[int, list[Any]] = {}
        self.untouched = touched(pipe)
        self.apart = {
            id(network)
            for network in denoisers(pipe).values()
            if not all(type(p).__module__.startswith("diffusers.models") for p in processors_of(network).values())
        }

    def advance(self, loops: Sequence[Loop]) -> None:
        """Runs loops to their next step or their end, and serves their networks' calls together."""
        waiting: list[tuple[Loop, Any]] = [(loop, None) for loop in loops]
        while waiting:
            for loop, answer in waiting:
                self.resume(loop, answer)
            calls = [loop.call for loop, _ in waiting if loop.call is not None]
            for call in calls:
                if id(call.module) not in self.hooks:
                    self.hooks[id(call.module)] = cache_hooks(call.module)
            answers = self.answers(calls)
            waiting = [(c.loop, a) for c, a in zip(calls, answers, strict=True) if not c.loop.ended]

    def resume(self, loop: Loop, answer: Any) -> None:
        """Runs one loop to its next pause."""
        loop.resume(answer)

    def answers(self, calls: Sequence[Call]) -> list[Any]:
        """The outputs of networks' calls; None for one for which memory does not suffice."""
        remembering = {key: hooks for key, hooks in self.hooks.items() if hooks}
        if remembering:
            self.separate = "its network has cache hooks, which remember each sample's earlier calls"
        outputs, made, why = answered(calls, remembering, self.apart, lambda call, error: call.loop.failed(error))
        self.made += made
        self.separate = why or self.separate
        return outputs


@dataclasses.dataclass(frozen=True)
class Turn:
    """One evaluation of samples, `numbers`, at times `t`, between what they are asked and what they answer.

    Rows `asked` had their `loops` given a state. `x_0` has the predictions that are known already.
    """

    t: Time
    numbers: Sequence[int]
    asked: list[int]
    x_0: State
    loops: list[Loop]


class PipelineModel(ScoreModel):
    """The denoised prediction of a pipeline for samples that each stand in a loop of their own.

    Args:
        pipe, request, reading: the pipeline, what it is asked for, and how its schedule is read.
        generators: for each sample.
        batch_size: samples in flight.
        counts_turns: whether loops number their turns, of which there are then as many as in their own lists.
        forwards: what calls the networks, for the samples of other models, too; by default for these alone.
    """

    per_row = True

    def __init__(
        self,
        pipe: Any,
        request: Request,
        reading: Reading,
        generators: Sequence[torch.Generator],
        batch_size: int,
        *,
        counts_turns: bool = False,
        forwards: Forwards | None = None,
    ) -> None:
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
        self.forwards = forwards or Forwards(pipe)
        if any(_hangs_hooks(part) for part in pipe.components.values()):
            self.batch_size, self.forwards.separate = 1, _CHANGES
        self.loops: dict[int, Loop] = {}
        self.outputs: list[Any] = [None] * request.n
        self.errors: dict[int, BaseException] = {}
        self.stopped: set[int] = set()
        self._place = torch.device(pipe._execution_device) if hasattr(pipe, "_execution_device") else super().device
        self.process: SDE = reading.sde
        self.t_start, self.t_end = reading.sde.t_max, reading.sde.t_min
        self._costs: Tensor = torch.empty(0, dtype=torch.int64)
        self.memo: dict[Any, Any] = {}  # what `encode_prompt` returned before
        self.counts_turns, self.listed = counts_turns, 0

    @property
    def device(self) -> torch.device:
        return self._place

    def sampling(self) -> contextlib.AbstractContextManager[None]:
        return evaluating(self.pipe)

    def check_cond(self, cond: Cond) -> None:
        """Conditioning is the pipeline's own."""

    def begin(self) -> None:
        """Runs the first samples to their first step, which tells shape, start and cost of a sample."""
        before = [generator.get_state() for generator in self.generators]
        try:
            self.prepare(range(self.batch_size))
        except SharedNetworkError:  # before the first network call: nothing is lost
            self._drop()
            for generator, state in zip(self.generators, before, strict=True):
                generator.set_state(state)
            self.batch_size = 1
            self.forwards.separate = _CHANGES
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
            loop.again = loop.begun and any(self.forwards.hooks.values())
            loop.begun, loop.ready = True, None if loop.again else loop.first
        return torch.stack([self.loops[i].begin for i in numbers])

    def prepare(self, numbers: Sequence[int]) -> None:
        """Runs the pipelines of samples that have none yet to their first step."""
        new = [i for i in numbers if i not in self.loops]
        for i in new:
            arguments = dict(self.request.arguments[i])
            if "generator" in self.request.takes:
                arguments["generator"] = self.generators[i]
            self.loops[i] = Loop(self, arguments, self.generators[i].initial_seed())
            self.loops[i].failed = functools.partial(self._failed, i)
        self.forwards.advance([self.loops[i] for i in new])
        for i in new:
            self._begin(i, self.loops[i])

    def _begin(self, i: int, loop: Loop) -> None:
        """Reads where a sample starts off its first evaluation."""
        if self.event_shape is not None and (i in self.errors or loop.stopped):
            loop.begin = torch.zeros(self.event_shape, device=self.device)
            return
        if loop.ended:
            raise ValueError(
                f"{type(self.pipe).__name__} came to its end without a step of its scheduler; it is not sampled by a "
                "loop over scheduler.timesteps. Run it with its own scheduler."
            )
        shape, sde = loop.sample.shape, self.sde
        event = tuple(shape[1:]) if len(shape) > 1 and shape[0] == 1 else tuple(shape)
        # Where its list was cut, else the process's own ends.
        first, end = loop.span
        given = max(min(first, 1.0) if self.reading.is_flow else first, sde.t_min)
        start, end = min(given, sde.t_max), sde.t_min if end is None else max(end, sde.t_min)
        if self.event_shape is None:
            self.event_shape, self.t_start, self.t_end = event, start, end
            self.calls, self.listed = max(1, loop.cost), len(loop.walked)
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

    def output(self, x_t: State, t: Time, cond: Cond | None = None) -> State:
        turn = self.ask(x_t, t, (cond or {})["sample"].tolist())
        self.forwards.advance(turn.loops)
        return self.answer(turn)

    def ask(self, x_t: State, t: Time, numbers: Sequence[int]) -> Turn:
        """Gives the loops of the given samples their states; arguments as for `output`."""
        x_0, now = torch.full_like(x_t, torch.nan), t.tolist()
        asked = []
        for k, i in enumerate(numbers):
            loop = self.loops[i]
            ready, loop.ready = loop.ready, None
            if ready is not None and self._at_begin(loop, x_t[k], now[k]):
                x_0[k] = ready
            elif not loop.ended:
                asked.append(k)
        times = self.reading.timestep(t[asked]).float() if asked else ()
        for k, timestep in zip(asked, times, strict=True):
            loop = self.loops[numbers[k]]
            if loop.again and self._at_begin(loop, x_t[k], now[k]):
                loop.give_again()
            else:
                loop.give(x_t[k] / self._alpha(now[k]), now[k], timestep)
        return Turn(t, numbers, asked, x_0, [self.loops[numbers[k]] for k in asked])

    def answer(self, turn: Turn) -> State:
        """The denoised predictions of loops that were asked and have advanced, with shape (B, *event)."""
        x_0, now, numbers, edit = turn.x_0, turn.t.tolist(), turn.numbers, None
        there = [k for k in turn.asked if not self.loops[numbers[k]].ended]
        if there:
            loops = [self.loops[numbers[k]] for k in there]
            x_0[there] = self._denoised(loops, torch.tensor([loop.at for loop in loops]).double()).to(x_0)
            edits = {k: e for k, loop in zip(there, loops, strict=True) if (e := loop.edit) is not None}
            if edits:
                edit = torch.zeros_like(x_0)
                for k, value in edits.items():
                    edit[k] = value.reshape(x_0[k].shape).to(x_0) * self._alpha(now[k])
        self.edit = edit
        self._costs = torch.tensor([self.loops[i].take_cost() for i in numbers], device=turn.t.device)
        return x_0

    def _at_begin(self, loop: Loop, x: Tensor, t: float) -> bool:
        """Whether a state is that of the first evaluation, up to what a change of variables and back rounds off."""
        return math.isclose(t, self.t_start, rel_tol=1e-9) and torch.allclose(x, loop.begin.to(x), rtol=1e-5, atol=1e-6)

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
            loop.denoised = row.to(loop.sample.dtype).reshape(loop.sample.shape)
        return x_0

    def _failed(self, i: int, error: BaseException) -> None:
        """Ends a sample that cannot go on."""
        if self.event_shape is None:  # nothing runs yet
            raise error
        self.errors[i] = error
        self.loops[i].close()

    def finished(self, slots: Tensor, x: State, status: Tensor) -> None:
        """Lets the pipelines of samples that have ended go on from their last states, to their outputs."""
        for i, last, how in zip(slots.tolist(), x, status.tolist(), strict=True):
            loop = self.loops.pop(i, None)
            if loop is None:
                continue
            if loop.stopped or (loop.ended and loop.output is not None):  # by its callback, or by its own decision
                self.stopped.add(i)
            elif loop.ended or how == Status.NON_FINITE:
                loop.close()
                continue
            else:
                # The last state is denoised as a rule, and then it is data.
                loop.finish(last if self.ends_denoised else last / self._alpha(self.t_end))
                try:
                    self.forwards.advance([loop])
                    if not loop.ended:
                        raise ValueError("this pipeline takes another step after its loop; it is not known for what.")
                except Exception as error:  # noqa: BLE001 - its last state is in the result, and others go on
                    self.errors[i] = error
                    loop.close()
                    continue
            self.outputs[i] = loop.output

    def close(self, *, others: bool = False) -> None:
        """Ends what still runs, and lets the pipeline put its models where they belong, unless others run."""
        self._drop()
        if not others and hasattr(self.pipe, "maybe_free_model_hooks"):
            self.pipe.maybe_free_model_hooks()

    def _drop(self) -> None:
        """Ends all loops, and undoes what they would have undone at their end."""
        for loop in self.loops.values():
            loop.close()
        self.loops.clear()
        restore(self.pipe, self.forwards.untouched)


def _hangs_hooks(part: object) -> bool:
    """Whether a component is a guider of diffusers that changes the network for some of its calls."""
    kind = type(part)
    if not kind.__module__.startswith("diffusers.guiders"):
        return False
    from diffusers.guiders.guider_utils import BaseGuidance

    return kind.prepare_models is not BaseGuidance.prepare_models  # type: ignore[attr-defined]
