"""From what was asked of `sample` to a solver and its steps."""

from __future__ import annotations

from typing import Any

from fastsde.checks import check_count, check_instance, check_number
from fastsde.control import Grid
from fastsde.tokens.blocks import Blocks
from fastsde.tokens.model import TokenModel
from fastsde.tokens.solver import TokenSolver
from fastsde.tokens.unmask import DEFAULT_RTOL, EntropyBudget, Unmask


def resolve(
    model: TokenModel, *, solver: Any, controller: Any, rtol: float | None, nfe: int | None, event: tuple[int, ...]
) -> tuple[TokenSolver, Grid]:
    """The solver and the grid that arguments of `sample` ask for; of a solver that decides itself, its two ends.

    Raises:
        ValueError, TypeError: naming the argument and what to use instead.
    """
    said = {k: v for k, v in (("controller", controller), ("rtol", rtol), ("nfe", nfe)) if v is not None}
    if len(said) > 1:
        raise ValueError(f"give one of {', '.join(said)}: each says how many steps there are.")
    if rtol is not None:
        check_number("rtol", rtol, 0.0, 1.0)
    if solver is None:
        solver = (
            EntropyBudget(DEFAULT_RTOL if rtol is None else rtol) if nfe is None and controller is None else Unmask()
        )
    elif not isinstance(solver, TokenSolver):
        raise TypeError(f"solver must be one for tokens, such as fastsde.tokens.Unmask(steps=12); got {solver!r}.")
    elif rtol is not None:
        solver = solver.within(rtol)
    solver.check_model(model)
    name = type(solver).__name__
    if solver.decides:
        if said.keys() - {"rtol"}:
            raise ValueError(f"{name} decides itself how far a step goes and takes no {next(iter(said))}.")
        return solver, Grid([1.0, 0.0])
    if solver.steps is not None and said:
        raise ValueError(f"give either {next(iter(said))} or the solver's steps, not both.")
    if controller is not None:
        check_instance("controller", controller, Grid, "a fastsde.Grid of masked shares from 1 to 0")
        if controller.ends != (1.0, 0.0):
            raise ValueError(f"the grid of masked shares must go from 1 to 0; it goes from {controller.ends}.")
        return solver, controller
    if nfe is not None:
        steps = solver.grid_steps(model, check_count("nfe", nfe, 1))
        if steps < 1:
            raise ValueError(f"nfe = {nfe} does not pay for one step of {name}.")
    elif solver.steps is not None:
        steps = solver.steps
    else:
        raise ValueError(
            f"{name} needs its number of steps: {name}(steps=...), or nfe= or controller=fastsde.Grid(...)."
        )
    grid = solver.grid(model.process, steps)
    return solver, solver.block_grid(grid, event) if isinstance(solver, Blocks) else grid
