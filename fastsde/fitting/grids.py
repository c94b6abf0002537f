"""Levels of noise where a fit may start."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from fastsde.control import Grid
from fastsde.fitting.pilots import Pilots
from fastsde.solvers.fitted import FittedSolver

_AGREE = 1.6
"""The share of the data's variance in which predictions in noise may differ, times the calls of a sample, as a guess
saves one of them."""
_APART = 0.05
"""The least distance of two levels, in half the log-SNR."""


def starts(pilot: Pilots, calls: int) -> dict[str, FittedSolver]:
    """Where a fit may start, by name: grids with standard weights, and a guess for the first call if it is good."""
    found = {name: pilot.solver(lams, None, (1.0,)) for name, lams in _grids(pilot, calls).items()}
    if pilot.spread * calls <= _AGREE:
        # The default and Karras's grid begin where noise is all there is; the others are better without that call.
        found = {name: solver for name, solver in found.items() if name.startswith(("default", "Karras"))}
        for name, lams in _grids(pilot, calls + 1).items():
            found[f"{name}, with a guess"] = pilot.solver(lams, None, (1.0,), pilot.guess)
    return found


def _grids(pilot: Pilots, levels: int) -> dict[str, list[float]]:
    """Levels in half the log-SNR, by name."""
    low, high = pilot.lams
    # Where data of this size are decided.
    middle = -0.5 * math.log(pilot.variance)
    if pilot.given is not None:
        return {"given": (pilot.sde.log_snr(pilot.given.times) / 2).tolist()}
    found = {"default": (pilot.sde.log_snr(pilot.own_times(levels)) / 2).tolist()}
    if levels > 2:
        for first in (-3.0, -2.2, -1.6):
            for last in (0.4, 1.2, 2.0, 4.0):
                inner = torch.linspace(middle + first, min(middle + last, high), levels - 1, dtype=torch.float64)
                found[f"log-SNR, {first:g} to {last:g}"] = [low, *inner.tolist()]
        for rho in (3.0, 7.0):
            times = Grid.karras(pilot.sde, levels - 1, rho).times
            found[f"Karras, rho {rho:g}"] = (pilot.sde.log_snr(times) / 2).tolist()
    for share in (0.0, 0.5):
        end = pilot.sde.t_min + (pilot.sde.t_max - pilot.sde.t_min) * share / levels
        times = torch.linspace(pilot.sde.t_max, end, levels + 1, dtype=torch.float64)[:-1]
        found[f"uniform t, {share:g}"] = (pilot.sde.log_snr(times) / 2).tolist()
    if levels == 2:
        found |= {f"jump to {last:g}": [low, middle + last] for last in (-1.0, -0.5, 0.0, 0.5)}
    apart = {name: lams for name, lams in found.items() if walkable(lams, high)}
    return apart or {"default": found["default"]}


def walkable(lams: Sequence[float], high: float) -> bool:
    """Whether these levels, in half the log-SNR, rise, are apart, and end at the highest or before."""
    return all(b - a >= _APART for a, b in itertools.pairwise(lams)) and lams[-1] <= high + 1e-9
