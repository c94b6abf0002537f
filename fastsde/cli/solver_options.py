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


@dataclasses.dataclass(frozen=True)
class Steps:
    """The options of the solver and its steps, by their names; None for what the command line does not say."""

    solver: str = "ExponentialPC"
    fitted: Path | None = None
    options: tuple[str, ...] = ()
    rtol: float | None = None
    atol: float | None = None
    nfe: int | None = None
    steps: int | None = None
    grid: str | None = None

    def build(self, sde: SDE | None = None, *, counted: bool = False) -> tuple[Solver, Controller | None]:
        """The solver, and the grid asked for, or None where the solver's own choice stands.

        `sde` is the process that the grid is of; None for a pipeline, whose steps are the solver's own number. Whether
        something else says how many there are is `counted`.
        """
        if self.fitted is not None:
            if others := self._said("rtol", "atol", "nfe", "steps", "grid", "options"):
                raise ValueError(f"--fitted says solver and steps itself; it goes without {others}.")
            return FittedSolver.load(self.fitted), None
        if self.solver not in SOLVER_NAMES:
            raise ValueError(f"--solver {self.solver} is for models of tokens; there are {', '.join(SOLVER_NAMES)}.")
        solver = configured(SOLVER_NAMES[self.solver](), self.options)
        if self.steps is None:
            if self.grid is not None:
                raise ValueError("--grid needs --steps.")
            if not (counted or solver.adaptive or solver.steps is not None or self.nfe is not None):
                raise ValueError(f"--solver {self.solver} walks a grid: say how many steps with --steps, or --nfe.")
            return solver, None
        if others := self._said("nfe", "rtol", "atol"):
            raise ValueError(f"give either --steps, which fixes the grid, or {others}.")
        if sde is not None:
            return solver, (GRIDS[self.grid](sde, self.steps) if self.grid else own_grid(sde, solver, self.steps))
        return self.counted(solver), None

    def counted(self, solver: Any) -> Any:
        """The solver with as many steps as `--steps` says, if it does."""
        if self.steps is None:
            return solver
        if "steps" not in {field.name for field in dataclasses.fields(solver)}:
            raise ValueError(f"--solver {self.solver} takes no number of steps; give --rtol or --nfe.")
        return dataclasses.replace(solver, steps=self.steps)

    def _said(self, *names: str) -> str:
        """Those of the options that were given."""
        said = (name for name in names if getattr(self, name) not in (None, ()))
        return ", ".join("-o" if name == "options" else f"--{name}" for name in said)


def configured(solver: Solver, options: Sequence[str]) -> Solver:
    """The solver with options such as "eta=1", "tableau=HEUN" or "corrector.snr=0.1"."""
    for option in options:
        key, equals, text = option.partition("=")
        if not equals:
            raise ValueError(f"--option must be KEY=VALUE; got {option!r}.")
        solver = _replaced(solver, key.split("."), _value(text))
    return solver


def check_request(
    model: ScoreModel,
    solver: Solver,
    controller: Controller | None,
    rtol: float | None,
    atol: float | None,
    nfe: int | None,
) -> None:
    """Refuses what `sample` would refuse of a solver and its steps, before a folder is claimed for it."""
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
    kind, (name, *rest) = type(obj).__name__, path
    if name not in fields:
        raise ValueError(f"{kind} has no option {name!r}; it has {', '.join(fields) or 'none'}.")
    now = fields[name]
    if rest:
        if not isinstance(now, (Solver, Langevin)):
            raise ValueError(f"{kind}.{name} has no options of its own.")
        value = _replaced(now, rest, value)
    if isinstance(now, float) and type(value) is int:
        value = float(value) if abs(value) < 1 << 1023 else math.inf
    if not _fits(now, value):
        raise ValueError(f"--option {name} of {kind} is {now!r} by default; {str(value)[:80]!r} is of another kind.")
    return dataclasses.replace(obj, **{name: value})


def _fits(now: Any, value: Any) -> bool:
    """Whether a value is of the kind of the default; a default of None takes numbers, and None itself."""
    if now is None:
        return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
    for kind in (bool, int, float, str, Tableau, Langevin, Solver):
        if isinstance(now, kind):
            return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    return False
