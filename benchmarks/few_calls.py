r"""Which grid for `ExponentialPC` with 5 to 12 calls? The digits mixture with its exact score.

Frechet distance between the moments of samples and the exact ones, over that of as many exact samples: 1 is perfect,
with a spread of about a tenth.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import torch
from common import save, table
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from problems import SDE, digits

import fastsde

CALLS = (5, 6, 7, 8, 9, 10, 12)
GRIDS = {"tapered": fastsde.Grid.tapered, "log-SNR": fastsde.Grid.log_snr, "Karras": fastsde.Grid.karras}


@click.command(help=__doc__.split("\n", 1)[0], context_settings={"show_default": True})
@click.option("--samples", "-n", default=4000)
@click.option("--threads", default=2)
@click.option("--keep/--discard", default=True, help="Whether to write results/few_calls.json.")
def main(samples: int, threads: int, keep: bool) -> None:
    """Prints the table and writes it."""
    settings = click.get_current_context().params
    torch.set_num_threads(threads)
    problem = digits(samples)
    floor, _ = problem.floor(20)
    rows = []
    for calls in tqdm(CALLS, disable=None):
        row: dict[str, object] = {"calls": calls}
        for name, grid in GRIDS.items():
            for order in (2, 3):
                controller, solver = grid(SDE, calls - 1), fastsde.ExponentialPC(order=order)
                r = fastsde.sample(problem.model(), n=samples, solver=solver, controller=controller, batch_size=samples)
                row[f"{name}, order {order}"] = problem.distance(r.samples) / floor
        rows.append(row)
    table(list(rows[0]), [[f"{v:.2f}" if isinstance(v, float) else v for v in row.values()] for row in rows])
    if keep:
        save("few_calls", settings, rows)


if __name__ == "__main__":
    main()
