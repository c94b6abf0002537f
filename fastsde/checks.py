"""Checks of single arguments: what came, and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


def check_steps(steps: object, name: str = "steps", least: int = 1) -> None:
    """Refuses, with a ValueError, anything but an integer of at least `least`, or None for no number yet."""
    if steps is not None:
        check_count(name, steps, least)


def check_number(name: str, value: Any, least: float, most: float = math.inf, *, ends: str = "[]") -> float:
    """A real number from `least` to `most`, or else a ValueError; "(" and ")" exclude an end."""
    number = _as_float(value)
    outside = number is None or not least <= number <= most
    if outside or (ends[0] == "(" and number == least) or (ends[1] == ")" and number == most):
        raise ValueError(f"{name} must be in {ends[0]}{least:g}, {most:g}{ends[1]}; got {_shown(value)}.")
    return float(number)  # type: ignore[arg-type] # a number, as it is not outside


def check_real(name: str, value: Any) -> None:
    """Refuses, with a ValueError, what is no real number or too large for a float; NaN and infinity are numbers."""
    number = _as_float(value)
    if number is None or (math.isinf(number) and not isinstance(value, float)):
        raise ValueError(f"{name} must be a number; got {_shown(value)}.")


def check_positive(name: str, value: Any) -> float:
    """A positive number that single precision holds, or else a ValueError."""
    number = _as_float(value)
    if number is None or not 0 < number < 3e38:
        raise ValueError(f"{name} must be a positive, finite number; got {_shown(value)}.")
    return number


def _as_float(value: Any) -> float | None:
    """A real number as a float, infinite if it is too large; None for what is none."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _shown(value: Any) -> str:
    """What came, cut short; Python does not print whole numbers of thousands of digits."""
    try:
        return repr(value)[:80]
    except ValueError:
        return "a number too long to print"


def check_labels(labels: Tensor, classes: int) -> None:
    """Refuses, with a ValueError, `class_labels` that are no integers with shape (n,) from 0 to classes - 1."""
    if labels.is_floating_point() or labels.ndim != 1:
        raise ValueError(f"class_labels must be integers with shape (n,); got {tuple(labels.shape)}, {labels.dtype}.")
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(
            f"class_labels must be from 0 to {classes - 1}; got {int(labels.min())} .. {int(labels.max())}."
        )


def check_order(name: str, value: object, allowed: tuple[int, ...]) -> None:
    """Refuses, with a ValueError, anything but one of the allowed integers."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value not in allowed:
        *some, last = map(str, allowed)
        raise ValueError(f"{name} must be {', '.join(some)} or {last}; got {value!r}.")


def check_choice(name: str, value: object, allowed: Collection[str]) -> None:
    """Refuses, with a ValueError, anything but one of the allowed names."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {_shown(value)}.")


def check_flags(**flags: object) -> None:
    """Refuses, with a TypeError, anything but True and False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False; got {value!r}.")


def check_kind(name: str, value: object, kind: Any, what: str) -> None:
    """Refuses, with a TypeError, a value that is neither None nor of the kind."""
    if value is not None:
        check_instance(name, value, kind, what)


def check_instance(name: str, value: object, kind: Any, what: str) -> None:
    """Refuses, with a TypeError, a value that is not of the kind."""
    if not isinstance(value, kind):
        short = isinstance(value, (str, type))
        raise TypeError(f"{name} must be {what}; got {_shown(value) if short else type(value).__name__}.")


def check_tensor(name: str, value: object) -> Tensor:
    """A tensor that is dense and in memory, or else a TypeError."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(value).__name__}.")
    if value.layout != torch.strided or value.is_meta or value.is_quantized:
        kind = "meta" if value.is_meta else "quantized" if value.is_quantized else str(value.layout)
        raise TypeError(f"{name} must be an ordinary dense tensor; got one of kind {kind}.")
    return value


def check_finite(x: Tensor, what: str) -> None:
    """Refuses, with a ValueError that counts them, rows of x with shape (n, *event) that are not finite."""
    lost = (~torch.isfinite(x).flatten(1).all(1)).nonzero()
    if len(lost):
        raise ValueError(f"{len(lost)} of {len(x)} {what} are not finite, the first at {int(lost[0])}.")


def check_states(name: str, value: object, *, gradient: bool = False) -> None:
    """Refuses, with a TypeError or ValueError, what cannot be states with shape (n, *event).

    A state that requires a gradient is refused where none goes through what follows: unless `gradient` is set.
    """
    value = check_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be real floating point; got {value.dtype}.")
    if value.ndim == 0 or value.numel() == 0:
        raise ValueError(f"{name} must have shape (n, *event) with n of at least 1; got {tuple(value.shape)}.")
    wide = value.float() if value.itemsize == 1 else value  # such floats have no arithmetic
    if not torch.isfinite(wide).all():
        raise ValueError(f"{name} holds NaN or infinity.")
    if value.requires_grad and torch.is_grad_enabled() and not gradient:
        raise ValueError(
            f"{name} requires a gradient, but none goes through here; give {name}.detach(), or call under no_grad. "
            "Through sample(..., differentiable=True) one goes."
        )


def check_count(name: str, value: Any, least: int) -> int:
    """An integer of at least `least`, numpy's kinds included, and not too large for a tensor; or else a ValueError."""
    count = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else least - 1
    if count < least or (count >= 1 << 62 and name != "seed"):
        most = "" if count < 1 << 62 else " and below 2^62"
        raise ValueError(f"{name} must be an integer of at least {least}{most}; got {value!r}.")
    return count
