"""What a pipeline meets in its own loop: a scheduler and networks of their own class, which a `Loop` answers."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from greenlet import getcurrent
from torch import Tensor, nn

from fastsde.diffusers.schedules import Reading

if TYPE_CHECKING:
    from fastsde.diffusers.loop import Loop


class Timesteps(Tensor):
    """A scheduler's timesteps, over which a loop walks where it is told."""

    loop: Loop

    @classmethod
    def __torch_function__(cls, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
        if func not in _KEEPING or not isinstance(out, Tensor) or out.ndim != 1:
            return out.as_subclass(Tensor) if isinstance(out, cls) else out
        source = next((a for a in args if isinstance(a, cls)), None)
        if source is None or not hasattr(source, "loop"):
            return out
        return _following(out, source.loop)

    def __iter__(self) -> Iterator[Tensor]:
        return self.loop.walk(self)

    def __len__(self) -> int:
        return self.loop.length(self.shape[0])

    def __getitem__(self, key: Any) -> Tensor:
        if isinstance(key, int) and (served := self.loop.entry(key)) is not None:
            return served.to(self.device)
        return super().__getitem__(key)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.as_subclass(Tensor).clone()


class Levels(Tensor):
    """A scheduler's noise levels; those of the current time and the next are the walk's."""

    loop: Loop
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __getitem__(self, key: Any) -> Tensor:
        plain = self.as_subclass(Tensor)
        if isinstance(key, int) and (served := self.loop.entry(key)) is not None:
            return self.loop.reading.level_of(served.cpu()).to(plain)
        return plain[key]

    __deepcopy__ = Timesteps.__deepcopy__


_KEEPING = {Tensor.__getitem__, Tensor.to, Tensor.clone, Tensor.cpu, Tensor.cuda, Tensor.detach, Tensor.contiguous}
"""What a loop may do to its list before it walks over it."""


def _following(times: Tensor, loop: Loop) -> Timesteps:
    made = times.as_subclass(Timesteps)
    made.loop = loop
    return made


def stand_in(scheduler: Any, loop: Loop) -> Any:
    """A copy of a scheduler, of the same class, whose steps are answered from outside.

    Its configuration, its `set_timesteps` and its signatures are those of the scheduler: a pipeline's shifts, its own
    sigmas and its `strength` do what they do. States are those of the process: `init_noise_sigma` and
    `scale_model_input` are its own, and noise is added by it.
    """
    kind, reading = type(scheduler), loop.reading
    space: dict[str, Any] = {
        "init_noise_sigma": property(lambda self: reading.loop_std, lambda self, value: None),
        "step_index": property(lambda self: loop.place),
        "_step_index": property(lambda self: loop.place, lambda self, value: None),
        "__deepcopy__": refuse_copy,
        "__doc__": kind.__doc__,
        "__module__": kind.__module__,
    }
    made = copy.copy(scheduler)
    # Our own scheduler has properties in the place of these.
    space |= {name: _kept(name, getattr(kind, name)) for name in ("timesteps", "sigmas") if hasattr(kind, name)}
    vars(made).pop("init_noise_sigma", None)
    vars(made).pop("_step_index", None)
    made.__class__ = type(kind.__name__, (kind,), space)
    own = vars(made)
    own |= {"set_timesteps": _set_timesteps(made, scheduler, loop), "step": _step(made, scheduler, loop)}
    own["scale_model_input"] = lambda sample, timestep=None, *args, **kwargs: reading.scaled(sample, timestep)
    for name in ("add_noise", "scale_noise"):
        if hasattr(kind, name):
            own[name] = functools.wraps(getattr(scheduler, name))(functools.partial(_noised, reading, name))
    return made


def _kept(name: str, other: property) -> property:
    """A property that keeps what it is set to, and is another one before."""
    return property(
        lambda self: vars(self)[name] if name in vars(self) else other.__get__(self),
        lambda self, value: vars(self).__setitem__(name, value),
    )


def refuse_copy(self: Any, memo: dict[int, Any]) -> Any:
    """In the place of `__deepcopy__`: a copy that a pipeline makes is for a second walk, which nobody would answer."""
    raise ValueError(
        "this pipeline copies its scheduler: it has two states a step, such as sound beside video, or several walks. "
        "Run it with its own scheduler."
    )


def unstepped(scheduler: Any, name: str) -> Any:
    """A copy of a further scheduler of the pipeline, which may add noise, but not step."""

    def step(*args: Any, **kwargs: Any) -> Any:
        raise ValueError(f"this pipeline steps {name} beside its scheduler. Run it with its own loop.")

    made = copy.copy(scheduler)
    vars(made)["step"] = step
    return made


_STEP = (
    *("model_output", "timestep", "sample", "generator", "return_dict", "eta", "use_clipped_model_output"),
    *("timestep_back", "old_pred_original_sample", "prev_timestep", "pred_original_sample", "per_token_timesteps"),
)
"""Arguments of a step that are known, or of no meaning where steps are ours."""


def _set_timesteps(made: Any, scheduler: Any, loop: Loop) -> Callable[..., None]:
    """The scheduler's own `set_timesteps`; its list is then walked where the loop is told."""
    own = type(scheduler).set_timesteps
    signature = inspect.signature(own)

    @functools.wraps(scheduler.set_timesteps)
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        vars(made).pop("timesteps", None), vars(made).pop("sigmas", None)
        own(made, *args, **kwargs)
        given = signature.bind(made, *args, **kwargs).arguments
        times = made.timesteps.as_subclass(Tensor).clone()
        custom = any(given.get(name) is not None for name in ("timesteps", "sigmas"))
        start = loop.reading.first_timestep
        if start is not None and not custom and len(times):
            # Some spacings begin below the level of noise that the pipeline starts from.
            times = times if times.is_floating_point() else times.to(torch.float32)
            times[0] = start
        loop.listed(times)
        made.timesteps = _following(times, loop)
        if isinstance(getattr(made, "sigmas", None), Tensor):
            made.sigmas = made.sigmas.clone().as_subclass(Levels)
            made.sigmas.loop = loop

    return set_timesteps


def _step(made: Any, scheduler: Any, loop: Loop) -> Callable[..., Any]:
    """`step`, which the loop answers; called with the scheduler's own arguments."""
    from diffusers.schedulers.scheduling_utils import SchedulerOutput

    own = scheduler.step
    defaults = {key: p.default for key, p in inspect.signature(own).parameters.items()}
    again = "pred_original_sample" in defaults and loop.steps_twice

    @functools.wraps(own)
    def step(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(defaults, args, strict=False)), **kwargs}
        if given.get("eta"):
            raise ValueError(f"eta must be 0; got {given['eta']}. Noise is solver=fastsde.ExponentialPC(eta=1.0).")
        others = {key: value for key, value in given.items() if key not in _STEP and value is not None}
        if other := [k for k, v in others.items() if isinstance(v, Tensor) or v != defaults.get(k)]:
            raise ValueError(
                f"this pipeline gives its scheduler's step {', '.join(other)}, which changes what a step means. Run it "
                "with its own scheduler."
            )
        if not {"model_output", "timestep", "sample"} <= given.keys():
            raise ValueError(
                f"{type(scheduler).__name__} takes other steps than from a prediction, a time and a state. Run this "
                "pipeline with its own scheduler."
            )
        out, sample = given["model_output"], given["sample"]
        if given.get("per_token_timesteps") is not None:
            out = -out  # with them a flow's scheduler goes up in time, so that pipelines turn the velocity's sign
        if again and given.get("pred_original_sample") is None:
            # The first of two: its denoised prediction is mixed, and given to the second.
            return sample, loop.denoise(out, sample)
        x = loop.step(out, sample, x_0=given.get("pred_original_sample"))
        if not given.get("return_dict", True):
            return x, loop.denoised
        output = SchedulerOutput(prev_sample=x)
        output["pred_original_sample"] = loop.denoised
        return output

    return step


def _noised(reading: Reading, name: str, *args: Any, **kwargs: Any) -> Tensor:
    """`add_noise(x_0, noise, timesteps)` and `scale_noise(x_0, timesteps, noise)`: alpha x_0 + sigma noise."""
    names = ("original_samples", "noise", "timesteps") if name == "add_noise" else ("sample", "timestep", "noise")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    x_0, noise = given[names[0]], given["noise"]
    times = given.get("timesteps", given.get("timestep"))
    k = torch.as_tensor(times).as_subclass(Tensor).double().reshape(-1)
    return reading.noised(x_0, k, torch.zeros_like(x_0) if noise is None else noise)


def served(module: nn.Module, *, counted: bool) -> nn.Module:
    """The module itself, as an object of its class whose calls go to the loop that runs in the current greenlet."""
    kind = type(module)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return getcurrent().run_of.network(module, counted, args, kwargs)

    @contextlib.contextmanager
    def cache_context(self: nn.Module, name: str, **kwargs: Any) -> Iterator[None]:
        memory = getcurrent().run_of.memory
        before, memory.context = memory.context, (name, kwargs)
        try:
            yield
        finally:
            memory.context = before

    space = {"__call__": call, "__module__": kind.__module__, "__doc__": kind.__doc__}
    space |= {"cache_context": cache_context} if hasattr(module, "cache_context") else {}
    made_kind = type(kind.__name__, (kind,), space)
    made: nn.Module = object.__new__(made_kind)
    object.__setattr__(made, "__dict__", vars(module))
    return made
