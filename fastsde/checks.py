"""Checks of single arguments: what came, and what is allowed."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from torch import Tensor


def check_steps(steps: object, name: str = "steps", least: int = 1) -> None:
    """Refuses, with a ValueError, anything but an integer of at least `least`, or None for no number yet."""
    if steps is not None:
        check_count(name, steps, least)


def check_number(name: str, value: Any, least: float, most: float = math.inf, *, ends: str = "[]") -> float:
    """A real number from `least` to `most`, or else a ValueError; "(" and ")" exclude an end."""
    if isinstance(value, Real) and not isinstance(value, bool):
        number = math.inf if isinstance(value, int) and abs(value) >= 1 << 1023 else float(value)
        outside = not least <= number <= most
        if not (outside or (ends[0] == "(" and number == least) or (ends[1] == ")" and number == most)):
            return number
    raise ValueError(f"{name} must be in {ends[0]}{least:g}, {most:g}{ends[1]}; got {value!r}.")


def check_order(name: str, value: object, allowed: tuple[int, ...]) -> None:
    """Refuses, with a ValueError, anything but one of the allowed integers."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value not in allowed:
        *some, last = map(str, allowed)
        raise ValueError(f"{name} must be {', '.join(some)} or {last}; got {value!r}.")


def check_flags(**flags: object) -> None:
    """Refuses, with a TypeError, anything but True and False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False; got {value!r}.")


def check_kind(name: str, value: object, kind: Any, what: str) -> None:
    """Refuses, with a TypeError, a value that is neither None nor of the kind."""
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"{name} must be {what}; got {type(value).__name__}.")


def check_tensor(name: str, value: object) -> None:
    """Refuses, with a TypeError, a value that is no tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(value).__name__}.")


def check_count(name: str, value: Any, least: int) -> int:
    """An integer of at least `least`, numpy's kinds included, and not too large for a tensor; or else a ValueError."""
    count = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else least - 1
    if count < least or (count >= 1 << 62 and name != "seed"):
        most = "" if count < 1 << 62 else " and below 2^62"
        raise ValueError(f"{name} must be an integer of at least {least}{most}; got {value!r}.")
    return count
