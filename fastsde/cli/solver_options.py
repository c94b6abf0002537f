"""From words on the command line to a solver and its grid."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastsde.control import Controller, Grid
from fastsde.score.base import ScoreModel
from fastsde.sde.base import SDE
from fastsde.solvers import DORMAND_PRINCE, EULER, HEUN, RK4, SOLVERS, FittedSolver, Langevin, Solver, Tableau
from fastsde.steps import own_grid, resolve_controller

SOLVER_NAMES = {solver.__name__: solver for solver in SOLVERS}
GRIDS = {
    "uniform": Grid.uniform,
    "geometric": Grid.geometric,
    "log-snr": Grid.log_snr,
    "tapered": Grid.tapered,
    "central": Grid.central,
    "karras": Grid.karras,
}
_VALUES: dict[str, Any] = {
    **SOLVER_NAMES,
    "Langevin": Langevin,
    **{tableau.name: tableau for tableau in (EULER, HEUN, RK4, DORMAND_PRINCE)},
}
"""What an option's value may name besides a number or a word; a class stands for itself with its defaults."""
_WORDS = {"true": True, "false": False, "none": None}


def build_solver(name: str, options: Sequence[str]) -> Solver:
    """The solver of that name, with options such as "eta=1", "tableau=HEUN" or "corrector.snr=0.1".

    Raises:
        ValueError: naming the option, what came and what is allowed.
    """
    solver = SOLVER_NAMES[name]()
    for option in options:
        key, equals, text = option.partition("=")
        if not equals:
            raise ValueError(f"--option must be KEY=VALUE; got {option!r}.")
        solver = _replaced(solver, key.split("."), _value(text))
    return solver


def chosen_solver(name: str, fitted: Path | None, said: dict[str, Any]) -> Solver:
    """The fitted solver in a file, or that of a name with its options.

    Args:
        name: of `--solver`.
        fitted: of `--fitted`.
        said: what else was said of steps and solver, by option; `-o` among them.

    Raises:
        ValueError, OSError: if they do not go together, or the file holds none.
    """
    if fitted is None:
        return build_solver(name, said["-o"])
    if others := [key for key, value in said.items() if value not in (None, ())]:
        raise ValueError(f"--fitted says solver and steps itself; it goes without {', '.join(others)}.")
    return FittedSolver.load(fitted)


def build_controller(
    sde: SDE, solver: Solver, steps: int | None, grid: str | None, rtol: bool, budget: bool = False
) -> Controller | None:
    """The grid asked for, or None where the solver's own choice stands.

    Raises:
        ValueError: if the options do not go together.
    """
    name = type(solver).__name__
    if steps is None:
        if grid is not None:
            raise ValueError("--grid needs --steps.")
        if not solver.adaptive and solver.steps is None and not budget:
            raise ValueError(f"--solver {name} walks a grid: say how many steps with --steps, or --nfe.")
        return None
    if budget:
        raise ValueError("give either --steps or --nfe.")
    if rtol:
        raise ValueError("--steps fixes the grid; --rtol and --atol are for adaptive steps.")
    return own_grid(sde, solver, steps) if grid is None else GRIDS[grid](sde, steps)


def check_request(
    model: ScoreModel,
    solver: Solver,
    controller: Controller | None,
    rtol: float | None,
    atol: float | None,
    nfe: int | None,
) -> None:
    """Refuses what `sample` would refuse of a solver and its steps, before a folder is claimed for it.

    Raises:
        ValueError, TypeError: as `sample`.
    """
    steps = resolve_controller(model, model.sde, solver, controller, rtol, atol, nfe)
    steps.span(model.sde.t_min, model.sde.t_max)
    solver.check(model.sde, grids[0].times if (grids := steps.all_grids()) else None)
    solver.check_model(model)


def _value(text: str) -> Any:
    if text in _VALUES:
        value = _VALUES[text]
        return value() if isinstance(value, type) else value
    if text in _WORDS:
        return _WORDS[text]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _replaced(obj: Any, path: Sequence[str], value: Any) -> Any:
    """The dataclass instance with the field at the end of the path changed."""
    fields = {f.name: getattr(obj, f.name) for f in dataclasses.fields(obj) if f.init}
    if path[0] not in fields:
        raise ValueError(f"{type(obj).__name__} has no option {path[0]!r}; it has {', '.join(fields) or 'none'}.")
    if len(path) > 1:
        if not isinstance(fields[path[0]], (Solver, Langevin)):
            raise ValueError(f"{type(obj).__name__}.{path[0]} has no options of its own.")
        value = _replaced(fields[path[0]], path[1:], value)
    now = fields[path[0]]
    if isinstance(now, float) and type(value) is int:
        value = float(value) if abs(value) < 1 << 1023 else math.inf
    if not _fits(now, value):
        raise ValueError(
            f"--option {path[0]} of {type(obj).__name__} is {now!r} by default; {str(value)[:80]!r} is of another kind."
        )
    return dataclasses.replace(obj, **{path[0]: value})


def _fits(now: Any, value: Any) -> bool:
    """Whether a value is of the kind of the default; a default of None takes numbers, and None itself."""
    if now is None:
        return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
    for kind in (bool, int, float, str, Tableau, Langevin, Solver):
        if isinstance(now, kind):
            return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    return False
