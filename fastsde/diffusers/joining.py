"""One forward for the network calls of several samples, where their tensors can be joined."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastsde.score.network import unwrap

_TIME = ("timestep", "timesteps", "t", "time", "timestep_r", "sigma", "noise_level")
"""Names of a network's argument that is its time, which may come without an axis."""
_POSITIONS = ("img_ids", "txt_ids", "latent_ids", "image_rotary_emb")
"""Names of arguments of which networks read one for all rows, whatever axes they have."""


class Memory:
    """What diffusers' cache hooks remember of one sample, while others are called.

    Attributes:
        context: name and further arguments of the context that the pipeline called its network in.
    """

    def __init__(self) -> None:
        self.context: tuple[str, dict[str, Any]] | None = None
        self._kept: dict[tuple[int, str], Any] = {}

    def reset(self) -> None:
        """Forgets everything, as at a sample's start."""
        self._kept.clear()

    def call(self, module: nn.Module, hooks: Sequence[Any], run: Callable[[], Any]) -> Any:
        """Runs a forward in which every hook remembers this sample alone."""
        from diffusers.hooks.hooks import CacheContext, _set_cache_context

        # A hook between blocks may share its memory with others: once each.
        places = {(id(owner), name): (owner, name) for hook in hooks for owner, name in _memories(hook)}
        before = {key: getattr(owner, name) for key, (owner, name) in places.items()}
        for key, (owner, name) in places.items():
            setattr(owner, name, self._kept[key] if key in self._kept else copy.deepcopy(before[key]))
        name, further = self.context or ("fastsde", {})
        _set_cache_context(unwrap(module), CacheContext(name, **further))
        try:
            return run()
        finally:
            _set_cache_context(unwrap(module), None)
            for key, (owner, name) in places.items():
                self._kept[key] = getattr(owner, name)
                setattr(owner, name, before[key])


def _memories(hook: Any) -> Iterator[tuple[Any, str]]:
    """Where a hook of diffusers keeps what it remembers: a state of its own, or one for each context."""
    from diffusers.hooks.hooks import StateManager

    for name, value in vars(hook).items():
        if isinstance(value, StateManager):
            yield value, "_state_cache"
        elif name == "state":
            yield hook, name


def cache_hooks(module: object) -> list[Any]:
    """The hooks of diffusers in a network that remember earlier calls."""
    parts = module.modules() if isinstance(module, nn.Module) else ()
    registries = [registry for part in parts if (registry := vars(part).get("_diffusers_hook")) is not None]
    return [hook for found in registries for hook in found.hooks.values() if getattr(hook, "_is_stateful", False)]


@dataclasses.dataclass
class Call:
    """A call of a network, `module`, by one sample's pipeline, which runs in `loop`."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    loop: Any

    def __post_init__(self) -> None:
        state = next((v for v in (*self.args, *self.kwargs.values()) if _is_state(v)), None)
        self.lists = isinstance(state, (list, tuple))
        self.rows = 1 if state is None else len(state)
        first = state[0] if isinstance(state, (list, tuple)) else state
        self.device: torch.device | None = None if first is None else first.device

    def named(self) -> dict[int | str, Any]:
        """All arguments, by name or position."""
        named: dict[int | str, Any] = dict(enumerate(self.args))
        return named | self.kwargs


def _is_state(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim > 1
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(v, Tensor) and v.ndim for v in value)


class CannotJoinError(Exception):
    """Arguments of two calls cannot be one call's."""


def answered(
    calls: Sequence[Call],
    hooks: Mapping[int, Sequence[Any]],
    apart: set[int],
    refused: Callable[[Call, Exception], None],
) -> tuple[list[Any], int, str | None]:
    """The outputs of calls, in as few forwards as can be; how many those were, and why not fewer.

    Args:
        calls: the calls.
        hooks: hooks that remember earlier calls, by the id of their network: its calls stay apart.
        apart: ids of networks whose calls failed together, and stay apart; networks are added.
        refused: told of a call for which memory did not suffice even alone; its output is None.
    """
    outputs: dict[int, Any] = {}
    forwards, why = 0, None
    for group, together in _groups(calls, {*hooks, *apart}):
        for part, out in _forward([calls[k] for k in group], together, hooks, apart, refused):
            outputs |= {group[k]: value for k, value in zip(part, out, strict=True)}
            forwards += 1
    modules = {id(call.module) for call in calls}
    if not hooks and forwards > len(modules):
        why = "their tensors have different shapes, or differ where a network takes one value for all"
    if apart:
        why = "the network takes a tensor that has no row for each sample, so that its calls cannot be one"
    return [outputs[k] for k in range(len(calls))], forwards, why


def _groups(calls: Sequence[Call], apart: set[int]) -> list[tuple[list[int], _Joint | None]]:
    """Which calls make one forward, and its arguments if they are several."""
    groups: list[tuple[list[int], _Joint | None]] = []
    left = list(range(len(calls)))
    while left:
        same = [k for k in left if calls[k].module is calls[left[0]].module]
        group, together = same[:1], None
        if len(same) > 1 and id(calls[same[0]].module) not in apart:
            group, together = same, _joint([calls[k] for k in same])
            if together is None:
                fit = [k for k in same[1:] if _joint([calls[same[0]], calls[k]]) is not None]
                group = [same[0], *fit]
                together = _joint([calls[k] for k in group]) if fit else None
        groups.append((group, together))
        left = [k for k in left if k not in group]
    return groups


def _forward(
    calls: list[Call],
    together: _Joint | None,
    hooks: Mapping[int, Sequence[Any]],
    apart: set[int],
    refused: Callable[[Call, Exception], None],
) -> list[tuple[list[int], list[Any]]]:
    """Forwards for a group of calls, one if memory suffices: which calls each answers, and with what."""
    first = calls[0]
    try:
        if len(calls) == 1:
            run = functools.partial(first.module, *first.args, **first.kwargs)
            found = hooks.get(id(first.module))
            return [([0], [first.loop.remembering(first.module, found, run) if found else run()])]
        args, kwargs = together or joined(calls)
        out = first.module(*args, **kwargs)
        return [(list(range(len(calls))), parted(out, [call.rows for call in calls], first.lists))]
    except torch.OutOfMemoryError as error:
        if len(calls) == 1:
            refused(first, error)
            return [([0], [None])]
    except Exception:
        if len(calls) == 1:
            raise
        # What is wrong with a call itself, its own forward will say.
        apart.add(id(first.module))
        singles = [_forward([call], None, hooks, apart, refused)[0][1] for call in calls]
        return [([k], out) for k, out in enumerate(singles)]
    # Out of the handler, which holds the frames of the failed forward and their tensors.
    half = len(calls) // 2
    above = [([k + half for k in part], out) for part, out in _forward(calls[half:], None, hooks, apart, refused)]
    return _forward(calls[:half], None, hooks, apart, refused) + above


_Joint = tuple[tuple[Any, ...], dict[str, Any]]


def joined(calls: Sequence[Call]) -> _Joint:
    """Arguments of one call in the place of several."""
    names = _names(type(unwrap(calls[0].module)).forward)
    rows = [call.rows for call in calls]
    lists = calls[0].lists

    def one(key: int | str) -> Any:
        name = (names[key] if key < len(names) else "") if isinstance(key, int) else key
        values = [call.named()[key] for call in calls]
        is_time = name in _TIME or key == 1  # by position the time is second, also of wrappers that take anything
        return _join(values, [-1] * len(rows) if name in _POSITIONS else rows, is_time, lists)

    merged = {key: one(key) for key in calls[0].named()}
    args = tuple(merged[k] for k in range(len(calls[0].args)))
    return args, {key: merged[key] for key in calls[0].kwargs}


@functools.lru_cache
def _names(forward: Callable[..., Any]) -> list[str]:
    """Names of the arguments of a network's `forward`, a function of its class, after self."""
    return list(inspect.signature(forward).parameters)[1:]


def _joint(calls: Sequence[Call]) -> _Joint | None:
    """Arguments of one call in the place of several, if there can be one."""
    first = calls[0]
    alike = all(
        len(call.args) == len(first.args) and call.kwargs.keys() == first.kwargs.keys() and call.lists == first.lists
        for call in calls
    )
    if not alike:
        return None
    try:
        return joined(calls)
    except CannotJoinError:
        return None


def _join(values: Sequence[Any], rows: Sequence[int], is_time: bool, lists: bool) -> Any:
    """One argument of the joint call; a CannotJoinError if values differ in what is not a row for each sample."""
    first = values[0]
    if isinstance(first, Tensor):
        return _join_tensors(values, rows, is_time)
    if any(type(v) is not type(first) for v in values):
        raise CannotJoinError
    if lists and isinstance(first, list) and all(len(v) == n for v, n in zip(values, rows, strict=True)):
        return [part for value in values for part in value]
    if isinstance(first, Mapping):
        if any(v.keys() != first.keys() for v in values):
            raise CannotJoinError
        return {k: _join([v[k] for v in values], rows, k in _TIME, lists) for k in first}
    if isinstance(first, (list, tuple)) and any(isinstance(v, (Tensor, list, tuple, dict)) for v in first):
        if any(len(v) != len(first) for v in values):
            raise CannotJoinError
        tensors = [v for v in first if isinstance(v, Tensor)]
        if any(v.ndim == 0 or len(v) != rows[0] for v in tensors):  # positions, one axis each: rows in none of them
            rows = [-1] * len(values)
        parts = [_join(list(part), rows, is_time, lists) for part in zip(*values, strict=True)]
        return type(first)(parts) if type(first) in (list, tuple) else type(first)(*parts)
    if is_time and isinstance(first, float) and any(v != first for v in values):
        return torch.cat([torch.full((n,), v) for v, n in zip(values, rows, strict=True)])
    try:
        same = all(v is first or bool(v == first) for v in values)
    except (TypeError, ValueError, RuntimeError):
        same = False
    if not same:
        raise CannotJoinError
    return first


def _join_tensors(values: Sequence[Any], rows: Sequence[int], is_time: bool) -> Tensor:
    first = values[0]
    alike = all(
        isinstance(v, Tensor) and v.dtype == first.dtype and v.device == first.device and v.ndim == first.ndim
        for v in values
    )
    if not alike:
        raise CannotJoinError
    if first.ndim and all(len(v) == n for v, n in zip(values, rows, strict=True)):
        if any(v.shape[1:] != first.shape[1:] for v in values):
            raise CannotJoinError
        return torch.cat(list(values))
    if all(v is first or (v.shape == first.shape and torch.equal(v, first)) for v in values):
        return first
    if rows[0] > 0 and ((first.ndim == 0 and is_time) or (first.ndim and all(len(v) == 1 for v in values))):
        wide = [v.expand(n, *v.shape[1:]) for v, n in zip(values, rows, strict=True)]
        if any(v.shape[1:] != wide[0].shape[1:] for v in wide):
            raise CannotJoinError
        return torch.cat(wide)
    raise CannotJoinError


def parted(out: Any, rows: Sequence[int], lists: bool) -> list[Any]:
    """The output of a joint call as one for each of its parts, in containers of its class."""
    total = sum(rows)
    if isinstance(out, Tensor):
        return list(out.split(list(rows))) if out.ndim and len(out) == total else [out] * len(rows)
    if isinstance(out, Mapping):  # diffusers' output classes, too
        parts = {k: parted(v, rows, lists) for k, v in out.items()}
        return [type(out)(**{k: v[i] for k, v in parts.items()}) for i in range(len(rows))]
    if lists and isinstance(out, list) and len(out) == total:
        ends = torch.tensor(rows).cumsum(0).tolist()
        return [out[end - n : end] for end, n in zip(ends, rows, strict=True)]
    if isinstance(out, (list, tuple)):
        each = [parted(v, rows, lists) for v in out]
        made = [[part[i] for part in each] for i in range(len(rows))]
        return [type(out)(v) if type(out) in (list, tuple) else type(out)(*v) for v in made]
    return [out] * len(rows)
