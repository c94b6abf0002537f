r"""What of our solver matters? Its weights and its grid, and what of a fit.

`solver`: along the probability flow of exact problems, every variant from the same noise as a reference with 150 steps:
the Frechet distance between the two sets of samples over the distance of 8000 exact samples to their law, that is what
a variant adds to the ratio of `peers.py`, without the sampling error. k = 1 - exp(-c h) is the weight of a new value at
a step of length h; phi the exact one of a line.

`fit`: levels or weights alone, pilots, history; three pilots: the median, with the least and the most.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
from common import Row, command
from fitted import Case
from problems import Problem, make
from torch import Tensor
from tqdm import tqdm

import fastsde
from fastsde.evaluation.statistics import Moments, frechet_distance

CALLS = (6, 8, 10, 12, 15, 20)
WEIGHTS: dict[str, fastsde.Solver] = {
    "k/2, no corrector (2M)": fastsde.DPMSolverPP(order=2),
    "k/2, k/2": fastsde.ExponentialPC(order=2),
    "phi, phi": fastsde.SASolver(eta=0.0, predictor=2, corrector=2),
    "k/2, parabola (UniPC-2)": fastsde.UniPC(order=2),
    "parabola, parabola": fastsde.SASolver(eta=0.0, predictor=3, corrector=3),
    "parabola, cubic (UniPC-3)": fastsde.UniPC(order=3),
    "ours": fastsde.ExponentialPC(),
}
GRIDS: dict[str, Callable[[fastsde.SDE, int], fastsde.Grid]] = {
    "tapered": fastsde.Grid.tapered,
    "first step as the others": partial(fastsde.Grid.tapered, first=1.0),
    "log-SNR": fastsde.Grid.log_snr,
    "Karras": fastsde.Grid.karras,
}
EXACT = ("digits", "gaussian", "scales", "rare")

main = click.Group(help=__doc__)


def between(x: Tensor, reference: Tensor, *, diagonal: bool) -> float:
    """Frechet distance between two sets of samples."""
    x, reference = x.double(), reference.double()
    if diagonal:
        return float((x.mean(0) - reference.mean(0)).square().sum() + (x.std(0) - reference.std(0)).square().sum())
    a, b = Moments.of(x), Moments.of(reference)
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def excess(problem: Problem) -> list[Row]:
    """All weights on equal steps in log-SNR, and ours and the nearest of the others on every grid."""
    model, rows = problem.model(), list[Row]()
    # The floor of 8000 samples, whatever is drawn here: a distance of moments falls as 1 / n.
    unit = problem.floor(6)[0] * problem.n / 8000
    options = {"n": problem.n, "batch_size": 2000}
    reference = fastsde.sample(model, controller=fastsde.Grid.log_snr(model.sde, 150), **options).samples
    pairs = [(weights, "log-SNR") for weights in WEIGHTS]
    pairs += [(weights, grid) for grid in GRIDS if grid != "log-SNR" for weights in ("k/2, k/2", "ours")]
    for weights, grid in tqdm(pairs, problem.name, disable=None):
        row: Row = {"problem": problem.name, "grid": grid, "weights": weights}
        for calls in CALLS:
            controller = GRIDS[grid](model.sde, calls - 1)
            x = fastsde.sample(model, solver=WEIGHTS[weights], controller=controller, **options).samples
            row[str(calls)] = between(x, reference, diagonal=problem.name == "gaussian") / unit
        rows.append(row)
    return rows


@command("ablation_solver", main, samples=64, only=["digits"])
def solver(samples: int = 1000, only: tuple[str, ...] = EXACT, images: Path | None = None) -> list[Row]:
    """Which weights and which grid?"""
    rows = [row for name in only for row in excess(make(name, samples, images))]
    return rows


def settings_of(n: int, sde: fastsde.SDE) -> dict[str, Row]:
    """What is tried of a fit, by name."""
    return {
        "weights alone, on the tapered grid": {"times": fastsde.Grid.tapered(sde, n - 1).times.tolist()},
        "levels alone": {"nfe": n, "history": 0},
        "both": {"nfe": n},
        **{f"history {h}": {"nfe": n, "history": h} for h in (1, 2, 3, 6)},
        **{f"{p} pilots": {"nfe": n, "pilots": p, "calls": max(20_000, 400 * p)} for p in (8, 16, 32, 64, 128)},
    }


@command("ablation_fit", main, samples=64, seeds=1, calls=[3], only=["digits"])
def fit(
    only: tuple[str, ...] = ("digits",),
    images: Path | None = None,
    samples: int = 2000,
    starts: int = 64,
    calls: tuple[int, ...] = (4, 6),
    seeds: int = 3,
) -> list[Row]:
    """What of a fit?"""
    rows: list[Row] = []
    cases = [Case(name, images, starts, samples) for name in only]
    for case, n in itertools.product(cases, calls):
        found = {"default": [case.judged(case.run(nfe=n).samples) | {"price": 0}]}
        for name, options in tqdm(settings_of(n, case.model.sde).items(), f"{case.name}, {n} calls", disable=None):
            fits = [case.fitted(2000 + seed, **options) for seed in range(seeds)]
            runs = [case.judged(case.run(solver=one).samples) | {"price": one.record["cost"]} for one in fits]
            found[name] = runs
        for name, runs in found.items():
            row: Row = {"problem": case.name, "calls": n, "setting": name}
            for key in ("distance", "error", "price"):
                if values := [run[key] for run in runs if key in run]:
                    row |= {key: statistics.median(values), f"{key} range": [min(values), max(values)]}
            rows.append(row)
    return rows


if __name__ == "__main__":
    main()
