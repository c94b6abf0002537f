r"""The first step of `ExponentialPC`, from high noise and from low: how long, and what does its correction weigh?

One law in the dress of several processes, whose highest sigma / alpha goes from 1000 to 1. Each run starts from the
exact law there and is judged by what it adds to the ratio of distance over floor, as in `coefficients.py`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from coefficients import Alike, Leaning, between
from common import save, table
from problems import Problem, digits, images
from torch import Tensor
from tqdm import tqdm

import fastsde

CALLS = (6, 8, 10, 12, 15, 20)
Variant = tuple[fastsde.Solver, Callable[[fastsde.SDE, int], fastsde.Grid]]
VARIANTS: dict[str, Variant] = {
    "default": (fastsde.ExponentialPC(), fastsde.Grid.tapered),
    "first correction alike": (Alike(), fastsde.Grid.tapered),
    "leaning at any noise": (Leaning(), fastsde.Grid.tapered),
    "first step 1": (fastsde.ExponentialPC(), partial(fastsde.Grid.tapered, first=1.0)),
    "first step 2": (fastsde.ExponentialPC(), partial(fastsde.Grid.tapered, first=2.0)),
}


def processes() -> dict[str, fastsde.SDE]:
    """Processes by name; the table of betas is Stable Diffusion's."""
    betas = torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000, dtype=torch.float64) ** 2
    found: dict[str, fastsde.SDE] = {
        "flow": fastsde.RectifiedFlow(),
        "VP": fastsde.VPSDE(),
        "EDM": fastsde.EDM(),
        "scaled linear betas": fastsde.DiscreteVPSDE(betas),
    }
    for rho in (3.0, 1.0):
        t = fastsde.VPSDE().t_of_log_snr(torch.tensor([-2 * math.log(rho)], dtype=torch.float64))
        found[f"VP from {rho:g}"] = fastsde.VPSDE(t_max=float(t[0]))
    return found


def dressed(problem: Problem, sde: fastsde.SDE) -> tuple[fastsde.ScoreModel, Tensor, float]:
    """The problem's score in the dress of a process, exact states at its highest level, and that sigma / alpha."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        alpha = sde.alpha(t.double())
        return problem.denoise((x / alpha[:, None]).to(x.dtype), sde.sigma(t.double()) / alpha)

    end, generator = torch.tensor([sde.t_max], dtype=torch.float64), torch.Generator().manual_seed(0)
    alpha, sigma = float(sde.alpha(end)), float(sde.sigma(end))
    clean = problem.draw(problem.n, generator)
    noise = torch.randn(clean.shape, dtype=torch.float64, generator=generator)
    model = fastsde.ScoreModel(network, sde, "sample", event_shape=(problem.d,))
    return model, (alpha * clean + sigma * noise).float(), sigma / alpha


@click.command(help=__doc__.split("\n", 1)[0], context_settings={"show_default": True})
@click.option("--samples", "-n", default=1000)
@click.option("--images", "folder", help="Folder with an IDX image data set, for a problem with its statistics.")
@click.option("--threads", default=2)
@click.option("--keep/--discard", default=True, help="Whether to write results/starts.json.")
def main(samples: int, folder: str | None, threads: int, keep: bool) -> None:
    """Prints the table and writes it."""
    settings = click.get_current_context().params | {"folder": None if folder is None else Path(folder).name}
    torch.set_num_threads(threads)
    problems, rows = [digits(samples)], list[dict[str, object]]()
    if folder is not None:
        problems.append(images(samples, folder))
    for problem in problems:
        unit = problem.floor(6)[0] * problem.n / 8000  # of 8000 samples, as in coefficients.py
        for name, sde in tqdm(processes().items(), problem.name, disable=None):
            model, start, rho = dressed(problem, sde)
            options = {"x_init": start, "batch_size": samples}
            fine = fastsde.sample(model, controller=fastsde.Grid.log_snr(sde, 150), **options).samples
            for variant, (solver, grid) in VARIANTS.items():
                row: dict[str, object] = {"problem": problem.name, "process": name, "rho": rho, "variant": variant}
                for calls in CALLS:
                    x = fastsde.sample(model, solver=solver, controller=grid(sde, calls - 1), **options).samples
                    row[str(calls)] = round(between(x, fine, diagonal=False) / unit, 3)
                rows.append(row)
    table(list(rows[0]), [[f"{v:.4g}" if isinstance(v, float) else v for v in row.values()] for row in rows])
    if keep:
        save("starts", settings, rows)


if __name__ == "__main__":
    main()
