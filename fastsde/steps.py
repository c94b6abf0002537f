"""Which steps a request means: the controller for a tolerance, a budget or a number of steps."""

from __future__ import annotations

import dataclasses
import math

import torch

from fastsde.checks import check_count, check_instance, check_positive
from fastsde.control import Adaptive, AdaptiveGrid, Controller, Grid
from fastsde.job import fewest_calls
from fastsde.noise import ALL_NOISE
from fastsde.score.base import ScoreModel
from fastsde.sde.base import SDE
from fastsde.sde.discrete import DiscreteVPSDE
from fastsde.sde.edm import EDM
from fastsde.sde.flow import RectifiedFlow
from fastsde.solvers import Solver

DEFAULT_RTOL = 0.05
"""Relative tolerance when nothing is said: the thesis's setting for fast results."""
_FLOW_WIDTH, _TABLE_WIDTH = 1.2, 100.0
"""Widths of `Grid.central` for flows and, as good as equal steps in log-SNR, for short tables."""
_SHORT_TABLE = 250
"""Levels of a table up to which it counts as short; 100 were measured, 1000 do not."""
_MOST_GRID = 1_000_000
"""Steps of a grid that is asked for: more would take days, and memory before the first call."""
_MOST_STEPS = 4096
"""Steps beyond which a tolerance is refused: single precision cannot tell such steps apart."""


def check_start(sde: SDE, t: float) -> None:
    """Refuses, with a ValueError, to draw the start from the prior where data are seen already."""
    noise = math.exp(-0.5 * float(sde.log_snr(torch.tensor([t], dtype=torch.float64))))
    if t < sde.t_max and noise < ALL_NOISE:
        raise ValueError(
            f"the grid starts at t = {t:g}, below t_max = {sde.t_max:g}. There a state also contains data (sigma / "
            f"alpha is {noise:.3g}), so sampling cannot start from noise alone. Give x_data=, the data to edit, or "
            "x_init=, states of that time; or start the grid at t_max."
        )


def resolve_controller(
    model: ScoreModel,
    sde: SDE,
    solver: Solver,
    controller: Controller | None,
    rtol: float | None,
    atol: float | None,
    nfe: int | None = None,
    denoise: bool = True,
) -> Controller:
    """The controller asked for; where a pair cannot work, a TypeError or ValueError says what to use instead."""
    check_instance("solver", solver, Solver, "an object such as fastsde.ExponentialPC() or fastsde.DDIM(steps=50)")
    name = type(solver).__name__
    given = {"rtol": rtol, "atol": atol, "solver.steps": solver.steps, "nfe": nfe, "controller": controller}
    said = [key for key, value in given.items() if value is not None]
    if solver.times is not None:
        if said:
            raise ValueError(f"{name} has its own times and takes no {' or '.join(said)}.")
        return Grid(list(solver.times))
    if controller is not None:
        check_instance("controller", controller, Controller, "a fastsde.Grid, AdaptiveGrid or Adaptive")
        if said[:-1]:
            raise ValueError(f"give either controller= or {', '.join(said[:-1])}, not both.")
        if controller.adaptive and not solver.adaptive:
            raise ValueError(f"{name} has no error estimate, so it cannot be adaptive; use Grid or ExponentialPC().")
        return controller
    if nfe is not None:
        if said[:-1]:
            raise ValueError(f"give either nfe= or {', '.join(said[:-1])}, not both.")
        return own_grid(sde, solver, affordable(model, solver, check_count("nfe", nfe, 1), denoise), denoise)
    if solver.adaptive:
        low, high = model.data_range
        level = (high - low) / 256 if atol is None else atol
        return _adaptive(sde, solver, DEFAULT_RTOL if rtol is None else rtol, level, denoise)
    if tolerances := [key for key in said if key != "solver.steps"]:
        raise ValueError(f"{name} has a fixed grid and takes no {' or '.join(tolerances)}; use ExponentialPC().")
    if solver.steps is None:
        raise ValueError(
            f"{name} needs its number of steps: {name}({solver.grid_hint}), nfe=, or controller=fastsde.Grid(...)."
        )
    return own_grid(sde, solver, solver.steps, denoise)


def _adaptive(sde: SDE, solver: Solver, rtol: float, atol: float, denoise: bool) -> Controller:
    """The controller of an adaptive solver: a grid of as many steps as the tolerance asks for, or steps from errors.

    The grid is an `AdaptiveGrid` without finer ones: nobody starts again, and steps go through the times of a
    trajectory. Restarts are on request: on trained networks they cost more than they gave (docs/measured/tolerance.md).
    """
    rtol, atol = check_positive("rtol", rtol), check_positive("atol", atol)
    if (step := solver.base_step(rtol)) is not None:
        first, last = sde.log_snr(torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)).tolist()
        # The last two steps of a tapered grid are shorter, by 0.45 of a step in all; a longer first shortens the rest.
        steps = max(3, round((last - first) / 2 / step + 0.45))
        if steps > _MOST_STEPS:
            least = rtol * (steps / _MOST_STEPS) ** 2
            raise ValueError(
                f"rtol must be at least {least:.1g} for {type(solver).__name__}: {rtol} asks for {steps} steps. "
                "ProbabilityFlow() is of higher order."
            )
        if solver.keep_path and steps > 1 / solver.resolution:
            least = rtol * (steps * solver.resolution) ** 2
            raise ValueError(
                f"rtol must be at least {least:.1g} with noise: smaller steps are below the resolution of the Brownian "
                f"path; got {rtol}."
            )
        return AdaptiveGrid([own_grid(sde, solver, steps, denoise)], rtol, atol)
    rule = Adaptive(rtol, atol, r=solver.error_power, resolution=solver.resolution)
    if solver.log_snr_steps:
        # Steps there change slowly: a growth of 10 and a safety of 0.9 would only buy rejections.
        return dataclasses.replace(rule, clock=sde, h_init=1.0, growth=2.0, safety=0.8)
    return rule


def affordable(model: ScoreModel, solver: Solver, nfe: int, denoise: bool) -> int:
    """The number of steps that `nfe` calls pay for, the first and the last call of a sample included."""
    least = fewest_calls(model, solver, denoise)
    if nfe < least:
        raise ValueError(f"nfe must be at least {least} for one step of {type(solver).__name__}; got {nfe}.")
    return 1 + (nfe - least) // (model.calls * solver.calls_per_step)


def own_grid(sde: SDE, solver: Solver, steps: int, denoise: bool = True) -> Grid:
    """The grid that a solver walks when only the number of steps is said.

    With `denoise` the result is the denoised sample; else it is the state at t_min, where the grid then ends. More
    steps than a run could take are refused, with a ValueError.
    """
    if steps > _MOST_GRID:
        raise ValueError(f"nfe and steps may say at most {_MOST_GRID:,} steps of a grid; got {steps:,}.")
    if solver.tapered_steps:
        grid = plain_grid(sde, steps) if denoise else Grid.tapered(sde, steps)
    else:
        # EDM's time is the noise, of which equal steps would leave nothing for where data are decided.
        equal = Grid.log_snr if solver.log_snr_steps or isinstance(sde, EDM) else Grid.uniform
        grid = equal(sde, steps)
    return grid if solver.clock_power is None or not solver.keep_path else _on_cells(grid, sde)


def plain_grid(sde: SDE, steps: int) -> Grid:
    """The grid of `ExponentialPC` for a process: `Grid.central` on flows and short tables, else `Grid.tapered`.

    The ends of a flow are no levels that somebody chose: beyond 1 / steps nothing is decided, and half of the steps in
    log-SNR would be spent there. Nor has the network of a short table learned what lies between its lowest levels,
    which are up to 0.7 apart in half the log-SNR.
    """
    if isinstance(sde, RectifiedFlow):
        return Grid.central(sde, steps, _FLOW_WIDTH)
    if isinstance(sde, DiscreteVPSDE) and sde.levels <= _SHORT_TABLE:
        return Grid.central(sde, steps, _TABLE_WIDTH, first=None)
    return Grid.tapered(sde, steps)


def _on_cells(grid: Grid, sde: SDE) -> Grid:
    """A grid with its times on borders of the cells of a `BrownianPath` over the process, in the log-SNR.

    There its value takes few normals. A border is a multiple of 2^-k of the range of the log-SNR; with
    k = 4 + ceil(log2 n) one is a 32nd of the mean of n steps away at most. n is the number of steps, or more where one
    is shorter than half of their mean, so that times stay apart. Ends of the process stay as they are.
    """
    start, end = sde.log_snr(torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)).tolist()
    share = (sde.log_snr(grid.times) - start) / (end - start)
    cells = 16 * 2.0 ** math.ceil(math.log2(max(grid.steps, 0.5 / float(share.diff().min()))))
    times = sde.t_of_log_snr(start + (share * cells).round() / cells * (end - start))
    times[0] = grid.times[0]
    if grid.times[-1] == sde.t_min:
        times[-1] = sde.t_min
    return Grid(times)
