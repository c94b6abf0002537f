r"""Which grid for `ExponentialPC` with 5 to 12 calls? Three problems with an exact score, those of `peers/`.

Frechet distance between the moments of samples and the exact ones, over that of as many exact samples: 1 is perfect,
with a spread of about a tenth.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import click
import torch
from common import save, table
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from problems import SDE, Gaussian, digits, rare

import fastsde


def always_tapered(sde: fastsde.SDE, steps: int) -> fastsde.Grid:
    """Steps of lengths 2, 1, .., 1, 0.85, 0.7 however few there are."""
    lengths = torch.tensor([2.0, *[1.0] * (steps - 3), 0.85, 0.7], dtype=torch.float64)
    first, last = sde.log_snr(torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)).tolist()
    inner = sde.t_of_log_snr(first + (lengths.cumsum(0) / lengths.sum())[:-1] * (last - first)).tolist()
    return fastsde.Grid([sde.t_max, *inner, sde.t_min])


PROBLEMS = {"digits": digits, "gaussian": Gaussian, "rare": rare}
CALLS = (5, 6, 7, 8, 9, 10, 12)
GRIDS = {
    "default": fastsde.Grid.tapered,
    "always 2, 1, .., 0.85, 0.7": always_tapered,
    "short start": partial(fastsde.Grid.tapered, first=1.0),
    "log-SNR": fastsde.Grid.log_snr,
    "Karras": fastsde.Grid.karras,
}


@click.command(help=__doc__.split("\n", 1)[0], context_settings={"show_default": True})
@click.option("--samples", "-n", default=2000)
@click.option("--threads", default=2)
@click.option("--keep/--discard", default=True, help="Whether to write results/few_calls.json.")
def main(samples: int, threads: int, keep: bool) -> None:
    """Prints the table and writes it."""
    settings = click.get_current_context().params
    torch.set_num_threads(threads)
    rows = []
    for name, problem in ((name, make(samples)) for name, make in PROBLEMS.items()):
        floor, _ = problem.floor(20)
        for calls in tqdm(CALLS, name, disable=None):
            row: dict[str, object] = {"problem": name, "calls": calls}
            for key, grid in GRIDS.items():
                r = fastsde.sample(problem.model(), n=samples, controller=grid(SDE, calls - 1), batch_size=samples)
                row[key] = problem.distance(r.samples) / floor
            rows.append(row)
    table(list(rows[0]), [[f"{v:.2f}" if isinstance(v, float) else v for v in row.values()] for row in rows])
    if keep:
        save("few_calls", settings, rows)


if __name__ == "__main__":
    main()
