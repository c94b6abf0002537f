"""Checks of arguments, before the first network call: what came, and what is allowed."""

from __future__ import annotations

import copy
import inspect
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from numbers import Integral

import torch
from torch import Tensor

from fastsde.checks import check_count, check_kind, check_number, check_tensor
from fastsde.control import Controller
from fastsde.job import Samples
from fastsde.score.base import Model, ScoreModel, innermost
from fastsde.sde.base import SDE
from fastsde.sde.discrete import DiscreteVPSDE
from fastsde.sde.edm import EDM
from fastsde.types import Cond, ScoreFn


def as_model(score_fn: ScoreModel | ScoreFn, sde: SDE | None) -> ScoreModel:
    """The score model that the caller means; a TypeError or ValueError without a process, or for another's."""
    if isinstance(score_fn, (str, os.PathLike)):
        raise TypeError(
            f"score_fn must be a score model or a function; got {score_fn!r}. Open it first: "
            "sample(fastsde.pretrained(...)) or, for models of diffusers, sample(fastsde.from_diffusers(...))."
        )
    if isinstance(score_fn, ScoreModel) and (sde is None or isinstance(sde, SDE)):
        model = score_fn
        if sde is not None and sde is not model.sde:
            t = torch.linspace(max(sde.t_min, model.sde.t_min), min(sde.t_max, model.sde.t_max), 5, dtype=torch.float64)
            pairs = ((sde.log_snr(t), model.sde.log_snr(t)), (sde.log_alpha(t), model.sde.log_alpha(t)))
            if not all(torch.allclose(a, b) for a, b in pairs):
                raise ValueError(f"sde is {sde}, but the score model was built for {model.sde}: leave sde out.")
    else:
        if sde is None and hasattr(score_fn, "scheduler"):
            raise TypeError(f"{type(score_fn).__name__} is a pipeline: use fastsde.sample_pipeline(pipe, ...).")
        if sde is None and callable(score_fn):
            raise TypeError(
                "a network alone does not say how it was trained: give fastsde.ScoreModel(network, sde, prediction), "
                "or sde= with a function that returns the score."
            )
        model = ScoreModel(score_fn, sde)
    _check_time(model)
    return model


def _check_time(model: ScoreModel) -> None:
    """Warns of a network that reads a table of levels and would get times from 0 to 1."""
    inside = innermost(model)
    if type(inside) is not ScoreModel or inside.timestep is not None or inside.prediction == "score":
        return
    if isinstance(inside.sde, DiscreteVPSDE):
        n = inside.sde.levels
        warn(
            f"the network gets the time of {inside.sde}, from 0 to 1. One that was trained on levels 0 .. {n - 1} "
            f"needs ScoreModel(..., timestep=lambda t: {n} * t - 1). If yours was not, say timestep=lambda t: t.",
            UserWarning,
        )


def warn(message: str, category: type[Warning]) -> None:
    """Warns, naming the line that called this package."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and str(frame.f_globals.get("__name__", "")).split(".")[0] == "fastsde":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level + 1)


def resolve_samples(
    model: Model,
    *,
    n: int | None = None,
    shape: Sequence[int] | None = None,
    given: Tensor | None = None,
    name: str = "x_init",
    index: Sequence[int] | Tensor | None = None,
    seed: int = 0,
    cond: Cond | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Samples:
    """Which samples to draw, from whichever arguments say so; they start at the states `given`, called `name`.

    Raises:
        TypeError, ValueError: if they say too little, disagree or hold numbers that are none.
    """
    numbers = check_index(index)
    full = _shape(model, n, shape, given, name, numbers)
    place = resolve_device(model, device, given)
    return Samples(
        index=(torch.arange(full[0]) if numbers is None else numbers).to(place),
        event=full[1:],
        dtype=resolve_dtype(dtype, given),
        seed=check_count("seed", seed, 0),
        cond=resolve_cond(model, cond, full[0], place),
        start=given,
    )


def check_index(index: Sequence[int] | Tensor | None) -> Tensor | None:
    """The sample numbers that are asked for, with shape (n,), or else a ValueError."""
    if index is None:
        return None
    try:
        numbers = torch.as_tensor(index)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"index must be a vector of sample numbers; got {str(index)[:80]}.") from error
    if numbers.ndim != 1 or numbers.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"index must be a vector of sample numbers; got {tuple(numbers.shape)} of {numbers.dtype}.")
    if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < 1 << 32:
        raise ValueError(f"index must be in [0, 2^32); got {int(numbers.min())} .. {int(numbers.max())}.")
    return numbers.long()


def _shape(
    model: Model, n: int | None, shape: Sequence[int] | None, given: Tensor | None, name: str, index: Tensor | None
) -> tuple[int, ...]:
    """(n, *event)."""
    if n is not None:
        n = check_count("n", n, 1)
    if shape is None and given is not None:
        shape = tuple(given.shape)
    if shape is None:
        count = n if index is None or n is not None else len(index)
        if model.event_shape is None or count is None:
            hint = "shape=(n, *event)" if model.event_shape is None else "n= or shape=(n, *event)"
            raise ValueError(
                f"the number and shape of the samples are missing: give {hint}, for example shape=(64, 3, 32, 32)."
            )
        shape = (count, *model.event_shape)
    if not isinstance(shape, Sequence):
        raise TypeError(f"shape must be (n, *event), for example (64, 3, 32, 32); got {shape!r}.")
    shape = tuple(int(k) if isinstance(k, Integral) and not isinstance(k, bool) else k for k in shape)
    if not shape or any(not isinstance(k, int) or isinstance(k, bool) for k in shape) or min(shape) < 1:
        raise ValueError(f"shape must be (n, *event) with positive integers; got {shape}.")
    counts = {"n": n, "shape": shape[0], "index": None if index is None else len(index)}
    said = {name: count for name, count in counts.items() if count is not None}
    if len(set(said.values())) > 1:
        raise ValueError(f"the number of samples disagrees: {', '.join(f'{k} says {c}' for k, c in said.items())}.")
    if model.event_shape is not None and shape[1:] != tuple(model.event_shape):
        raise ValueError(
            f"the model's samples have shape {tuple(model.event_shape)}; got {shape[1:]} in shape={shape}."
        )
    if given is not None and tuple(given.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}; got {tuple(given.shape)}.")
    most = _memory()
    if 8 * math.prod(shape) > most:
        raise ValueError(
            f"shape={str(shape)[:80]} is more numbers than this machine holds, {most / 1e9:.3g} GB. Draw the samples "
            "in parts: index=range(k, k + 1000) draws these numbers of the same seed."
        )
    return shape


def resolve_dtype(dtype: torch.dtype | None, x_init: Tensor | None) -> torch.dtype:
    """The dtype of the state: the one given, which must be real, float64 for start states in float64, else float32."""
    if dtype is None:  # differences of neighbouring states are lost in half precision
        return torch.float64 if x_init is not None and x_init.dtype == torch.float64 else torch.float32
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise TypeError(f"dtype must be real floating point of 16 bits or more, such as torch.float32; got {dtype!r}.")
    return dtype


def _memory() -> float:
    """Bytes of main memory; infinity where the system does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return math.inf


def resolve_device(model: Model, device: torch.device | str | None, x_init: Tensor | None) -> torch.device:
    """The device of the run: the one given, that of the start states, or that of the network."""
    if device is not None:
        return usable_device(device)
    return model.device if x_init is None else x_init.device


def usable_device(device: torch.device | str) -> torch.device:
    """The device of that name, or a ValueError if this torch does not know it or cannot use it here."""
    try:
        probe = torch.empty(0, device=device)
        probe.cpu()  # fails on "meta", which holds no numbers
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be one this torch can use, such as 'cpu'; got {device!r} ({reason}).") from error
    return probe.device


def started(
    sde: SDE, given: Tensor | None, strength: float | None, t_start: float | None, controller: Controller | None
) -> SDE:
    """The process from where sampling starts: a copy with another t_max, if `strength` or `t_start` say so."""
    said = {k: v for k, v in (("strength", strength), ("t_start", t_start)) if v is not None}
    if not said:
        return sde
    if len(said) == 2 or controller is not None:
        others = "strength and t_start" if len(said) == 2 else f"{next(iter(said))} and controller"
        raise ValueError(f"give only one of {others}: both say where to start.")
    if given is None:
        raise ValueError(f"{next(iter(said))} needs a start state: give x_data=, the data to edit, or x_init=.")
    if strength is not None:
        check_number("strength", strength, 0.0, 1.0, ends="(]")
        if isinstance(sde, EDM):
            raise ValueError("strength is not for EDM, whose time is the noise: give t_start=, the sigma to start at.")
        # Rounding may end a little outside of the range.
        t_start = min(max(sde.t_min + strength * (sde.t_max - sde.t_min), math.nextafter(sde.t_min, 1e9)), sde.t_max)
    cut = copy.copy(sde)
    cut.t_max = check_number("t_start", t_start, sde.t_min, sde.t_max, ends="(]")
    return cut


def resolve_cond(model: Model, cond: Cond | None, n: int, device: torch.device) -> dict[str, Tensor]:
    """The conditioning on the right device; the model's default repeated n times for what the caller left out.

    What is no dict of tensors with leading axis n, or not what the network takes, is refused.
    """
    check_kind("cond", cond, Mapping, "a dict of tensors")
    default = {k: v.expand(n, *v.shape) for k, v in (model.default_cond or {}).items()}
    for key, value in (cond or {}).items():
        if not isinstance(key, str) or key == "self":
            raise ValueError(f"cond has the key {key!r}; keys are names of arguments of the network.")
        if isinstance(value, Tensor):
            check_tensor(f"cond[{key!r}]", value)
        if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != n:
            came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"cond[{key!r}] must be a tensor with leading axis n={n}; got {came}.")
    full = {k: v.to(device) for k, v in {**default, **(cond or {})}.items()}
    model.check_cond(full)
    return full
