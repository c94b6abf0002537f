r"""Which weights and which grid for an exponential predictor-corrector? The ablation of docs/solver.md.

Every variant starts from the same noise as a reference with 150 steps, and is judged by the Frechet distance between
the two sets of samples, over the distance of 8000 exact samples to their law: what the variant adds to the ratio that
`peers/run.py` reports, without the sampling error. Along the probability flow (eta 0).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from common import save, table
from problems import Gaussian as gaussian
from problems import Problem, digits, images, scales
from torch import Tensor
from tqdm import tqdm

import fastsde
from fastsde.sde.base import Level
from fastsde.solvers.adams import ExponentialAdams


class Alike(fastsde.ExponentialPC):
    """Corrects the first step as all others, with half the weight on its first value."""

    coefficients = ExponentialAdams.coefficients


class Leaning(fastsde.ExponentialPC):
    """Leans to the new value of the first correction as if there were never much noise left, and asks for no norm."""

    def coefficients(self, now: Level, end: Level, lams: Tensor, count: Tensor) -> dict[str, Tensor]:
        c = ExponentialAdams.coefficients(self, now, end, lams, count)
        moved = torch.where(count == 1, (c["a"] / 0.8).clamp(0, 1), 0.0) * c["weights"][:, 1, 0]
        c["weights"][:, 1, :2] += torch.stack([-moved, moved], 1)
        return c


class AsItIs(fastsde.ExponentialPC):
    """Reads the first value as it is, whatever its norm."""

    def coefficients(self, now: Level, end: Level, lams: Tensor, count: Tensor) -> dict[str, Tensor]:
        return {k: v for k, v in super().coefficients(now, end, lams, count).items() if k != "first"}


CALLS = (8, 10, 12, 15, 20, 30)
WEIGHTS: dict[str, fastsde.Solver] = {
    "k/2, no corrector (2M)": fastsde.DPMSolverPP(order=2),
    "k/2, k/2": fastsde.ExponentialPC(order=2),
    "phi, phi": fastsde.SASolver(eta=0.0, predictor=2, corrector=2),
    "k/2, parabola (UniPC-2)": fastsde.UniPC(order=2),
    "parabola, parabola": fastsde.SASolver(eta=0.0, predictor=3, corrector=3),
    "parabola, cubic (UniPC-3)": fastsde.UniPC(order=3),
    "mixed by c h (order 3)": fastsde.ExponentialPC(),
    "mixed, first correction alike": Alike(),
    "mixed, leaning at any noise": Leaning(),
}
OURS = ("k/2, k/2", "mixed by c h (order 3)", "mixed, first correction alike", "mixed, leaning at any noise")
GRIDS: dict[str, Callable[[fastsde.SDE, int], fastsde.Grid]] = {
    "log-SNR": fastsde.Grid.log_snr,
    "tapered": fastsde.Grid.tapered,
    "short start": partial(fastsde.Grid.tapered, first=1.0),
    "Karras": fastsde.Grid.karras,
}


def between(x: Tensor, reference: Tensor, *, diagonal: bool) -> float:
    """Frechet distance between two sets of samples."""
    x, reference = x.double(), reference.double()
    shift = float((x.mean(0) - reference.mean(0)).square().sum())
    if diagonal:
        return shift + float((x.std(0) - reference.std(0)).square().sum())
    a, b = x.T.cov(), reference.T.cov()
    values, vectors = torch.linalg.eigh(b)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.mT
    cross = torch.linalg.eigvalsh(root @ a @ root).clamp(min=0).sqrt().sum()
    return shift + float(a.trace() + b.trace() - 2 * cross)


def excess(problem: Problem, unit: float, grids: tuple[str, ...], solvers: tuple[str, ...]) -> list[dict[str, object]]:
    """What each pair of weights and grid adds to the ratio, at each number of calls."""
    model, rows = problem.model(), []
    options = {"n": problem.n, "batch_size": 2000}
    reference = fastsde.sample(model, controller=fastsde.Grid.log_snr(model.sde, 150), **options).samples
    for grid in grids:
        for name in tqdm(solvers, desc=f"{problem.name}, {grid}", disable=None):
            row: dict[str, object] = {"problem": problem.name, "grid": grid, "weights": name}
            for calls in CALLS:
                controller = GRIDS[grid](model.sde, calls - 1)
                x = fastsde.sample(model, solver=WEIGHTS[name], controller=controller, **options).samples
                row[str(calls)] = round(between(x, reference, diagonal=problem.name == "gaussian") / unit, 3)
            rows.append(row)
    return rows


@click.command(help=__doc__.split("\n", 1)[0], context_settings={"show_default": True})
@click.option("--samples", "-n", default=2000, help="Samples of each run.")
@click.option("--images", "folder", help="Folder with an IDX image data set, for a problem with its statistics.")
@click.option("--threads", default=2)
@click.option("--keep/--discard", default=True, help="Whether to write results/coefficients.json.")
def main(samples: int, folder: str | None, threads: int, keep: bool) -> None:
    """Prints the tables and writes them."""
    settings = click.get_current_context().params | {"folder": None if folder is None else Path(folder).name}
    torch.set_num_threads(threads)
    problems = [digits(samples), gaussian(samples // 4), scales(samples)]
    if folder is not None:
        problems.append(images(samples // 2, folder))
    rows = []
    for problem in problems:
        # The floor of 8000 samples, whatever is drawn here: a distance of moments falls as 1 / n.
        unit = problem.floor(6)[0] * problem.n / 8000
        rows += excess(problem, unit, ("log-SNR",), tuple(WEIGHTS))
        rows += excess(problem, unit, ("tapered", "short start", "Karras"), OURS)
    header = ("problem", "grid", "weights", *map(str, CALLS))
    table(header, [tuple(row[key] for key in header) for row in rows])
    if keep:
        save("coefficients", settings, rows)


if __name__ == "__main__":
    main()
