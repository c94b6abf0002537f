"""Checks of solvers' arguments: what came, and what is allowed."""

from __future__ import annotations

import math
from numbers import Integral, Real


def check_steps(steps: object, name: str = "steps", least: int = 1) -> None:
    """Refuses, with a ValueError, anything but an integer of at least `least`, or None for no number yet."""
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, Integral) or steps < least):
        raise ValueError(f"{name} must be an integer of at least {least}; got {steps!r}.")


def check_number(name: str, value: object, least: float, most: float = math.inf, *, ends: str = "[]") -> None:
    """Refuses, with a ValueError, anything but a real number from `least` to `most`; "(" and ")" exclude an end."""
    if isinstance(value, Real) and not isinstance(value, bool):
        number = float(value)
        outside = not least <= number <= most
        if not (outside or (ends[0] == "(" and number == least) or (ends[1] == ")" and number == most)):
            return
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
