"""One sample in its pipeline's own loop: a call that pauses where it needs something and is answered from outside.

The pipeline's `__call__` runs unchanged, as a coroutine. It pauses at its network's calls, which are answered for all
samples at once, and in its scheduler's `step`, which is answered with the state to evaluate next. Nothing here knows a
family of pipelines: what a loop may do is told by what it does.
"""

from __future__ import annotations

import builtins
import collections
import contextlib
import contextvars
import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from fastsde.diffusers.joining import Call, Memory
from fastsde.diffusers.stand_ins import Timesteps, refuse_copy, served, stand_in, unstepped
from fastsde.types import State

if TYPE_CHECKING:
    from fastsde.diffusers.pipeline_model import PipelineModel

_UNSERVED = ("text_encoder", "tokenizer", "image_encoder", "vae", "vqvae", "movq", "vocoder", "safety", "feature")
"""Beginnings of names of components that are no part of a loop's turn."""
_UNCOUNTED = ("controlnet", "adapter")
"""Beginnings of names of components that serve the denoiser: joined like it, but not counted as network calls."""


class Loop:
    """A sample's run of its pipeline.

    Between two answers it stands at one of three places: at a network's call (`call`), in the scheduler's step (then
    `call` is None and `out`, `sample` are what the step was given), or it has ended (`ended`, as a rule with
    `output`).

    Args:
        model: that of all samples of the run; the loop works on a shallow copy of its pipeline.
        arguments: of the pipeline's call, for this sample alone.
        seed: of the random numbers that the pipeline draws without a generator.
    """

    def __init__(self, model: PipelineModel, arguments: dict[str, Any], seed: int) -> None:
        self.reading, self.arguments, self.alone = model.reading, arguments, model.batch_size == 1
        self._device = device = model.device
        own = {str(place): torch.Generator(place).manual_seed(seed) for place in {torch.device("cpu"), device}}
        self._random = {name: generator.get_state() for name, generator in own.items()}
        self.call: Call | None = None
        self.failed: Callable[[BaseException], None]  # told of an error that ends this sample
        self.out = self.sample = self.begin = self.denoised = self._asked = torch.empty(0)
        self.output: Any = None
        self.ended = self.stopped = self.begun = self.again = self._in_turn = self._walking = False
        self.memory = Memory()
        self.given_x_0: Tensor | None = None
        self.ready: Tensor | None = None
        self.first: Tensor | None = None
        self._start: tuple[Tensor, float, Tensor] | None = None
        self._counted: list[int] = []
        self._handed: Tensor | None = None
        self._next: Tensor | None = None
        self._edits = self._place = 0
        self._listed: list[float] = []
        self.walked: list[float] = []  # the process's times in the list that the loop walks
        self.at = 0.0
        self._untouched, self._seen = model.forwards.untouched, set[int]()
        self._counts_turns, self._turn = model.counts_turns, 0
        self._inference = torch.is_inference_mode_enabled()
        self._autocast = {kind: torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")}
        # Cosmos takes each step twice, setting the scheduler's number back between.
        code = getattr(inspect.unwrap(type(model.pipe).__call__), "__code__", None)
        self.steps_twice = "_step_index" in getattr(code, "co_names", ())
        self._original, self.pipe = model.pipe, self._copied(model.pipe, model.memo)
        self._greenlet = greenlet(self._run)
        self._greenlet.run_of = self
        # Greenlets begin with an empty context; attention backends and the like are context variables.
        self._greenlet.gr_context = contextvars.copy_context()

    def _copied(self, pipe: Any, memo: dict[Any, Any]) -> Any:
        """A shallow copy of the pipeline whose scheduler and networks are answered from outside."""
        made = copy.copy(pipe)
        if hasattr(type(pipe), "_execution_device"):  # which looks through all modules to find it, for every sample
            kind, device = type(pipe), self._device
            made.__class__ = type(kind.__name__, (kind,), {"_execution_device": device, "__module__": kind.__module__})
        own = vars(made)  # the pipeline's own __setattr__ would write into the configuration that both share
        own["scheduler"] = stand_in(pipe.scheduler, self)
        for name, module in pipe.components.items():
            if type(module).__module__.startswith("diffusers.guiders"):  # they remember steps
                own[name] = copy.deepcopy(module)
            if hasattr(module, "set_timesteps") and name != "scheduler":
                own[name] = unstepped(module, name)
            if isinstance(module, nn.Module) and not name.startswith(_UNSERVED):
                own[name] = served(module, counted=not name.startswith(_UNCOUNTED))
        own["_progress_bar_config"] = {**getattr(pipe, "_progress_bar_config", {}), "disable": True}
        own["maybe_free_model_hooks"] = lambda: None  # others still need the models; the run frees them at its end
        if hasattr(pipe, "encode_prompt"):
            own["encode_prompt"] = _remembered(made, memo)
        return made

    def _run(self, _: Any = None) -> None:
        self.output = self.pipe(**self.arguments)

    def resume(self, answer: Any = None) -> None:
        """Runs on to the next pause, with the output of the network's call, or nothing after `give` and `finish`.

        It raises whatever the pipeline raises, which has ended then.
        """
        self.call = None
        grad, outside = torch.is_grad_enabled(), _random_states(self._device)
        _set_random_states(self._random)
        try:
            self._greenlet.switch(answer)
        finally:
            torch.set_grad_enabled(grad)
            self._random = _random_states(self._device)
            _set_random_states(outside)
            self.ended = self._greenlet.dead

    def _pause(self) -> Any:
        """Hands over to whoever resumed this loop; returns the answer."""
        grad = torch.is_grad_enabled()
        answer = getcurrent().parent.switch()
        torch.set_grad_enabled(grad)
        return answer

    def close(self) -> None:
        """Ends the run where it stands."""
        if not self._greenlet.dead and self._greenlet:
            grad = torch.is_grad_enabled()
            with contextlib.suppress(Exception):
                self._greenlet.throw(GreenletExit)
            torch.set_grad_enabled(grad)  # which its decorators have set as they found it
        self.ended = True

    __deepcopy__ = refuse_copy

    def remembering(self, module: nn.Module, hooks: Sequence[Any], run: Callable[[], Any]) -> Any:
        """A forward of a network with cache hooks, which remember this sample alone.

        Some ask the pipeline, which is not the copy that runs, for its time.
        """
        inside, outside = vars(self.pipe), vars(self._original)
        before = outside.get("_current_timestep")
        outside["_current_timestep"] = inside.get("_current_timestep")
        try:
            return self.memory.call(module, hooks, run)
        finally:
            outside["_current_timestep"] = before

    # What whoever answers says and asks.

    def give(self, x: State, t: float, timestep: Tensor) -> None:
        """Says where the next evaluation is: a state, with the shape of `sample`, its time and the network's."""
        # A copy: pipelines edit their latents in place.
        given = x.to(self.sample.device, self.sample.dtype, copy=True).reshape(self.sample.shape)
        self._handed, self._asked, self._edits = given, x, _edits(given)
        self._next, self.at = timestep, t

    def note_start(self, t: float) -> None:
        """Notes the first evaluation, for `give_again`."""
        self._start = (self.sample.clone(), t, self._now)

    def give_again(self) -> None:
        """Says that the next evaluation is the first once more."""
        assert self._start is not None
        self.again = False
        self.give(*self._start)

    def finish(self, x: State) -> None:
        """Says that there is none, and what the pipeline goes on with after its loop."""
        self.give(x, 0.0, torch.empty(0))
        self._next = None

    @property
    def edit(self) -> State | None:
        """What the pipeline added to the state that it was given before it evaluated it; None if nothing."""
        if self._handed is None or (self.sample is self._handed and _edits(self._handed) == self._edits >= 0):
            return None
        asked = self._asked.to(self.sample).reshape(self.sample.shape)
        return None if torch.equal(self.sample, asked) else self.sample - asked

    @property
    def cost(self) -> int:
        """Network calls since `take_cost`: the rows that the network was given."""
        return sum(self._counted)

    def take_cost(self) -> int:
        """Network calls since it was last asked."""
        cost = self.cost
        self._counted.clear()
        return cost

    @property
    def span(self) -> tuple[float, float | None]:
        """The process's times at which the walk began, and at which it ends if the pipeline cut its list's end."""
        after = [t for t in self._listed if t < self.walked[-1] * (1 - 1e-6)]
        return self.walked[0], after[0] if after else None

    def listed(self, timesteps: Tensor) -> None:
        """Notes the scheduler's whole list."""
        self._listed = self._levels(timesteps)

    # What the pipeline meets.

    def network(self, module: nn.Module, counted: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of one of its networks: answered from outside within a turn of the loop."""
        call = Call(module, args, kwargs, self)
        if not self._in_turn:
            return module(*args, **kwargs)
        if not self.alone and id(module) not in self._seen:  # samples share it, as it was before they ran
            self._seen.add(id(module))
            if self._untouched.get(id(module)) != (processors_of(module), _hooks_of(module)):
                raise SharedNetworkError
        if counted:
            self._counted.append(call.rows)
        device = "cpu" if call.device is None else call.device.type
        autocast = torch.is_autocast_enabled(device)
        inference = torch.is_inference_mode_enabled() != self._inference
        if inference or torch.is_grad_enabled() or autocast != self._autocast.get(device, autocast):
            return module(*args, **kwargs)  # its own business, in its own context
        self.call = call
        return self._pause()

    def denoise(self, out: Tensor, sample: Tensor) -> Tensor:
        """The denoised prediction of a network's output within a turn."""
        level = self.reading.sde.level(self.reading.time_of(self._now).to(sample.device).expand(len(sample)))
        return self.reading.read(out, sample, level).x_0

    def step(self, out: Tensor, sample: Tensor, x_0: Tensor | None = None) -> Tensor:
        """The scheduler's step: the state to evaluate next, or the last one."""
        if not self._in_turn:
            raise ValueError(
                "this pipeline takes a step that its loop over scheduler.timesteps did not begin: it walks times of "
                "its own, or takes several steps a turn. Run it with its own scheduler."
            )
        out = out[:, : sample.shape[1]] if out.ndim > 1 and out.shape[1] == 2 * sample.shape[1] else out
        if out.shape != sample.shape or not out.is_floating_point():
            raise ValueError(
                f"this pipeline's step has a prediction with shape {tuple(out.shape)} and a state with shape "
                f"{tuple(sample.shape)}; one of the state's shape was expected. Run it with its own scheduler."
            )
        place = sample.device.type
        autocast = torch.is_autocast_enabled(place)
        if torch.is_inference_mode_enabled() != self._inference or autocast != self._autocast.get(place, autocast):
            raise ValueError(
                "this pipeline's loop runs inside of torch.inference_mode() or torch.autocast(), where other samples "
                "would be too. Take it out of its call and put it around sample_pipeline."
            )
        self._in_turn, self._walking = False, True
        self.out, self.sample, self.given_x_0 = out, sample, x_0
        self._pause()
        assert self._handed is not None
        return self._handed

    def walk(self, timesteps: Timesteps) -> Iterator[Tensor]:
        """The times of the loop: the first is the pipeline's own, the others those that were asked for.

        A pipeline may also read its times in another loop, which takes no steps: then they are its own.
        """
        own = timesteps.as_subclass(Tensor)
        if self._walking or not len(own):  # the loop is over, or another one is running
            yield from own.unbind()
            return
        self.walked, self._place, self._now = self._levels(own), 0, own[0].float()
        self._counted.clear()
        self._in_turn = True
        yield self._now
        if not self._walking:
            self._in_turn = False
            yield from own[1:].unbind()
            return
        while self._next is not None:
            self._now, self._next = self._next, None
            self._turn += 1
            # That of the last of the pipeline's own times that is not below it in noise.
            place = max(0, sum(own >= self.at * (1 - 1e-6) for own in self.walked) - 1)
            self._place = min(self._turn, len(self.walked) - 1) if self._counts_turns else place
            self._in_turn = True
            if vars(self._original).get("_interrupt"):  # from outside, where nobody knows of copies
                vars(self.pipe)["_interrupt"] = True
            yield self._now.to(own.device)
            if self._in_turn:  # it went on without a step: stopped by its own callback
                self.stopped, self._in_turn = True, False
                return

    def _levels(self, timesteps: Tensor) -> list[float]:
        return self.reading.time(timesteps.double().cpu().reshape(-1)).tolist()

    def number(self, k: int) -> int:
        """What `enumerate` says of the entry that it was given as number k."""
        return self._place if self._walking else k

    def length(self, own: int) -> int:
        """Number of the list's entries: one more than the place of the last evaluation, once that is known."""
        if not self._walking or self._in_turn:
            return own
        return self._place + 1 if self._next is None else max(own, self._place + 2)

    def entry(self, k: int) -> Tensor | None:
        """The time at number k of the list, where the walk says another than the list."""
        if not self._walking or k not in (self._place, self._place + 1):
            return None
        if k == self._place:
            return self._now
        if self._in_turn:
            raise ValueError(
                "this pipeline reads the time of its next step before it takes one, which only a schedule fixed in "
                "advance can say. Run it with its own scheduler."
            )
        return self._next

    @property
    def place(self) -> int | None:
        """The place of the loop in the pipeline's own list; None before it."""
        return self._place if self._walking or self._in_turn else None


def _edits(x: Tensor) -> int:
    """How often a tensor was changed in place; -1 for those of inference mode, which do not count."""
    return -1 if x.is_inference() else x._version


def _random_states(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's own generators, from which pipelines draw where they take no generator."""
    states = {"cpu": torch.get_rng_state()}
    return states | {str(device): torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def _set_random_states(states: dict[str, Tensor]) -> None:
    for name, state in states.items():
        torch.set_rng_state(state) if name == "cpu" else torch.cuda.set_rng_state(state, name)


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The networks of a pipeline whose calls count."""
    parts = {key: part for key, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {key: part for key, part in parts.items() if not key.startswith((*_UNSERVED, *_UNCOUNTED))}


Touched = dict[int, tuple[dict[str, Any], dict[str, list[str]]]]


def touched(pipe: Any) -> Touched:
    """What pipelines change of their networks while they run: attention processors and hooks, by the network's id."""
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return {id(part): (processors_of(part), _hooks_of(part)) for part in parts}


def restore(pipe: Any, before: Touched) -> None:
    """Gives a pipeline's networks what `touched` has found before."""
    for part in pipe.components.values():
        if id(part) not in before:
            continue
        kept, hooks = before[id(part)]
        if processors_of(part) != kept:
            part.set_attn_processor(dict(kept))
        for name, names in _hooks_of(part).items():
            for hook in set(names) - set(hooks.get(name, ())):
                part.get_submodule(name)._diffusers_hook.remove_hook(hook, recurse=False)


def _hooks_of(module: nn.Module) -> dict[str, list[str]]:
    """Names of diffusers' hooks on a network, by the part that has them."""
    found = {name: vars(part).get("_diffusers_hook") for name, part in module.named_modules()}
    return {name: sorted(registry.hooks) for name, registry in found.items() if registry is not None and registry.hooks}


def processors_of(module: object) -> dict[str, Any]:
    """The attention processors of a network, by name; none for what has none."""
    found = getattr(module, "attn_processors", None)
    return dict(found) if isinstance(found, dict) else {}


class SharedNetworkError(Exception):
    """A pipeline changes its network while it runs, which samples in flight share."""


_injected: collections.Counter[int] = collections.Counter()


@contextlib.contextmanager
def counting(pipe: Any) -> Iterator[None]:
    """Within it, the functions of a pipeline's `__call__` see an `enumerate` of ours, which knows a loop's times."""
    calls = [vars(kind)["__call__"] for kind in type(pipe).__mro__ if "__call__" in vars(kind)]
    spaces = [f.__globals__ for call in calls if isinstance(f := inspect.unwrap(call), types.FunctionType)]
    spaces = [space for space in spaces if space.get("enumerate", _enumerate) is _enumerate]
    for space in spaces:
        _injected[id(space)] += 1
        space["enumerate"] = _enumerate
    try:
        yield
    finally:
        for space in spaces:
            _injected[id(space)] -= 1
            if not _injected[id(space)]:
                del space["enumerate"], _injected[id(space)]


def _enumerate(things: Iterable[Any], start: int = 0) -> Iterator[tuple[int, Any]]:
    """`enumerate`, which over a loop's times counts by their place in the pipeline's own list.

    Pipelines look things up by that number, in lists as long as their own: whether a control net is on, levels.
    """
    times = getattr(things, "iterable", things)
    for k, t in builtins.enumerate(things):
        yield start + (times.loop.number(k) if isinstance(times, Timesteps) else k), t


def _remembered(pipe: Any, memo: dict[Any, Any]) -> Callable[..., Any]:
    """`encode_prompt`, which encodes a prompt once for all samples that have it."""
    own = pipe.encode_prompt

    @functools.wraps(own)
    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        # Some read the pipeline's settings, too.
        settings = {key: value for key, value in vars(pipe).items() if isinstance(value, _PLAIN)}
        if not _is_plain([*args, *kwargs.values()]):
            return own(*args, **kwargs)
        key = repr((args, kwargs, settings))
        if key not in memo:
            memo[key] = own(*args, **kwargs)
        return _cloned(memo[key])  # callbacks may edit them in place

    return encode_prompt


_PLAIN = (int, float, bool, str, type(None), torch.device, torch.dtype)


def _is_plain(value: Any) -> bool:
    """Whether what it looks like tells a value from others."""
    if isinstance(value, (list, tuple)):
        return all(_is_plain(part) for part in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(part) for key, part in value.items())
    return isinstance(value, _PLAIN)


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) in (list, tuple):
        return type(value)(_cloned(part) for part in value)
    return {key: _cloned(part) for key, part in value.items()} if type(value) is dict else value
