r"""What would it buy to draw a hard sample again on a grid twice as fine, rather than to refine its steps on the way?

Hard is a sample with a step that `AdaptiveGrid` would refuse at the given limit. Its calls are those of both grids,
more than if it left the first one at once. Errors are root mean square distances to a run with 300 steps from the same
noise, eta 0, beside the plain grid at the same mean calls (between its two nearest numbers) and beside refinement.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from common import save, table
from problems import Mixture, digits, rare
from torch import Tensor
from tqdm import tqdm

import fastsde

BASES = {0.1: 12, 0.05: 16}
"""Calls of the base grid of `ExponentialPC` at a tolerance."""
LIMITS = (1.0, 2.0, 4.0)


def study(problem: Mixture) -> list[dict[str, object]]:
    """A row for each tolerance and limit."""
    model, rows = problem.model(), []
    options = {"n": problem.n, "batch_size": 2000}
    exact = fastsde.sample(model, controller=fastsde.Grid.log_snr(model.sde, 300), **options).samples
    known: dict[int, Tensor] = {}

    def error(x: Tensor) -> Tensor:
        return (x - exact).double().square().mean(1)

    def on_grid(calls: int) -> Tensor:
        if calls not in known:
            known[calls] = error(fastsde.sample(model, nfe=calls, **options).samples)
        return known[calls]

    for rtol, limit in tqdm([(r, k) for r in BASES for k in LIMITS], problem.name, disable=None):
        base = BASES[rtol]
        grid = fastsde.Grid.tapered(model.sde, base - 1)
        # The absolute tolerance of `sample`: one 8-bit level of the data's range.
        controller = fastsde.AdaptiveGrid(grid, rtol, 2 / 256, model.sde, limit=limit)
        r = fastsde.sample(model, solver=fastsde.ExponentialPC(), controller=controller, **options)
        hard = r.rejected > 0
        share = float(hard.double().mean())
        again = torch.where(hard, on_grid(2 * base - 1), on_grid(base))
        rows.append(
            {"problem": problem.name, "rtol": rtol, "limit": limit, "hard": share}
            | at_equal_calls("refined", float(error(r.samples).mean()), float(r.nfe.double().mean()), on_grid)
            | at_equal_calls("again", float(again.mean()), base + share * (2 * base - 1), on_grid)
        )
    return rows


def at_equal_calls(name: str, square: float, calls: float, on_grid: Callable[[int], Tensor]) -> dict[str, float]:
    """Calls and error of one way, and the error of the plain grid between its two nearest numbers of calls."""
    low, part = int(calls), calls - int(calls)
    plain = (1 - part) * on_grid(low).mean() + part * on_grid(low + 1).mean()
    return {f"{name}, calls": calls, f"{name}, error": square**0.5, f"{name}, plain grid": float(plain.sqrt())}


@click.command(help=__doc__.split("\n", 1)[0], context_settings={"show_default": True})
@click.option("--samples", "-n", default=10_000)
@click.option("--threads", default=2)
@click.option("--keep/--discard", default=True, help="Whether to write results/restarts.json.")
def main(samples: int, threads: int, keep: bool) -> None:
    """Prints the table and writes it."""
    settings = click.get_current_context().params
    torch.set_num_threads(threads)
    rows = study(rare(samples)) + study(digits(samples))
    table(list(rows[0]), [[f"{v:.4g}" if isinstance(v, float) else v for v in row.values()] for row in rows])
    if keep:
        save("restarts", settings, rows)


if __name__ == "__main__":
    main()
