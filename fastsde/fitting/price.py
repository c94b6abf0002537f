"""What a fit will cost: its pilots, its numbers and its network calls."""

from __future__ import annotations

import dataclasses
from functools import partial

from fastsde.checks import check_count

PRICE = 8_000
"""Network calls of a fit for up to six calls a sample; more in proportion to their square."""
FEWEST = 8
"""Pilots at least."""
_LEAST, _ENOUGH, _MOST = 16, 22, 64
"""Pilots, where nobody says how many: at least; at least for the usual price; at most."""
_HELD, _FITTED = 12, 14
"""Pilots that are held out cost little, as no derivatives are taken of them: 12, if 14 are left to be fitted."""
_GRIDS = 20
"""How many grids there are, about."""
STARTS = 2
"""Grids from which a first step is tried: the best, and that of the default."""
_PLANNED = 4
"""Gauss-Newton steps that a number of pilots is chosen for."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a fit will cost: how many pilots, whether a guess is looked for, and about how many network calls."""

    pilots: int
    guess: bool
    price: float


def planned(
    evaluations: int,
    accurate: int,
    calls: int | None,
    each: int,
    pilots: int | None,
    history: int,
    *,
    guess: bool,
    moving: bool,
) -> Plan:
    """The plan of a fit; without a guess if `calls` does not pay for one.

    Args:
        evaluations: of a sample, the fewest that are tried.
        accurate: evaluations of the accurate solution of a pilot.
        calls: what the fit may cost in network calls; None for the usual price.
        each: network calls of an evaluation.
        pilots: their number, if it is said.
        history, guess: as for `fit`.
        moving: whether levels are fitted, too.

    Raises:
        ValueError: if `calls` is too few for a single step.
    """
    price = PRICE * max(1.0, (evaluations / 6) ** 2) if calls is None else calls / each
    least = 0
    for with_guess in (True, False) if guess else (False,):
        levels, before = evaluations + with_guess, accurate + 2 * with_guess
        cost = partial(cost_of, levels=levels, accurate=before, history=history, moving=moving)
        if pilots is None:
            few = _ENOUGH if calls is None else _LEAST
            count = next((n for n in range(_MOST, few, -1) if cost(n) <= price), few)
        else:
            count = check_count("pilots", pilots, FEWEST)
        least = cost(count, steps=1, starts=1)
        if calls is None:
            # So many pilots may do with a step less.
            price = max(price, cost(count, steps=_PLANNED - 1))
        if calls is None or calls >= least * each:
            return Plan(count, with_guess, price * each)
    raise ValueError(
        f"calls must be at least {least * each:,} for {evaluations} evaluations a sample and {count} pilot samples; "
        f"got {calls:,}."
    )


def numbers_of(levels: int, history: int = 4, *, moving: bool = True) -> list[tuple[str, int, int]]:
    """What is fitted: (kind, step, which) of levels, step weights and output weights."""
    steps = [(k, min(k, history)) for k in range(1, levels)]
    moved = [("level", k, 0) for k, _ in steps] if moving else []
    if history == 0:
        return moved
    return (
        moved
        + [("weight", k, j) for k, q in steps for j in range(1 + q)]
        + [("output", 0, j) for j in range(min(levels, history))]
    )


def cost_of(
    pilots: int,
    levels: int,
    accurate: int,
    history: int,
    *,
    moving: bool,
    steps: int = _PLANNED,
    starts: int = STARTS,
) -> int:
    """Evaluations of the accurate solution, the grids, and so many steps, the first of them from each of the starts."""
    starts = starts if moving else 1
    scouts = _GRIDS * scouts_of(pilots) * levels if moving else 0
    numbers = numbers_of(levels, history, moving=moving)
    jacobian = sum(levels - k for kind, k, _ in numbers if kind != "output")
    step = (pilots - held_of(pilots)) * jacobian + pilots * 1.3 * levels  # some moves are tried again
    walks = accurate + (starts + 0.7) * levels
    return round(pilots * walks + scouts + (steps + starts - 1) * step)


def held_of(pilots: int) -> int:
    """How many pilots are held out."""
    return max(2, pilots // 3, min(_HELD, pilots - _FITTED))


def scouts_of(pilots: int) -> int:
    """On how many pilots the grids are compared."""
    return min(8, max(3, pilots // 4))
