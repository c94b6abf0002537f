r"""`fastsde.kdiffusion` beside k-diffusion's DPM-Solver++(2M), on the same model, levels and start states.

The packaged network, in k-diffusion's convention. Error: root mean square of the difference to the accurate solution of
the probability flow down to the same last level, over that of the solution. Needs `pip install -e '.[bench,peers]'`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import torch
from common import packaged_model, save, table
from torch import Tensor
from tqdm import tqdm

import fastsde
from fastsde.kdiffusion import sample_adaptive, sample_exponential_pc

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from competitors import k_diffusion_sampling

CALLS = (5, 6, 8, 10, 15, 20, 30)
SCHEDULES = ("karras", "exponential", "simple")
ACCURATE = 200
"""Steps of the accurate solution: twice as many move it by less than a thousandth."""


class Host:
    """The model as a host calls it, `model(x, sigma)`, with x = x_0 + sigma eps; counts its calls."""

    def __init__(self, model: fastsde.ScoreModel, labels: Tensor) -> None:
        self.model, self.cond, self.calls = model, {"class_labels": labels}, 0

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.calls += 1
        t = self.model.sde.t_of_log_snr(-2 * sigma.double().log())
        alpha = self.model.sde.alpha(t).to(x)
        return self.model(x * alpha.reshape(-1, *[1] * (x.ndim - 1)), t, self.cond).x_0

    def levels(self, schedule: str, calls: int) -> Tensor:
        """A host's levels: Karras et al., equal steps in log sigma, or equal steps in the network's time."""
        sde = self.model.sde
        grid = {"karras": fastsde.Grid.karras, "exponential": fastsde.Grid.log_snr, "simple": fastsde.Grid.uniform}
        sigma = (-0.5 * sde.log_snr(grid[schedule](sde, calls - 1).times)).exp()
        return torch.cat([sigma, sigma.new_zeros(1)]).float()


@click.command(help=__doc__.split("\n", 1)[0], context_settings={"show_default": True})
@click.option("--samples", "-n", default=20)
@click.option("--threads", default=2)
@click.option("--untrained", is_flag=True, help="Random weights, to try the script.")
@click.option("--keep/--discard", default=True, help="Whether to write results/hosts.json.")
def main(samples: int, threads: int, untrained: bool, keep: bool) -> None:
    """Prints the table and writes it."""
    settings = click.get_current_context().params
    torch.set_num_threads(threads)
    host = Host(packaged_model(untrained=untrained), torch.arange(samples) % 10)
    theirs = k_diffusion_sampling().sample_dpmpp_2m
    fine = host.levels("exponential", ACCURATE)
    x = fine[0] * torch.randn(samples, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    exact = sample_exponential_pc(host, x, fine, disable=True)

    def error(sampler: object, sigmas: Tensor, **options: float) -> float:
        host.calls = 0
        return float((sampler(host, x, sigmas, disable=True, **options) - exact).norm() / exact.norm())  # type: ignore[operator]

    rows = []
    for schedule in SCHEDULES:
        for calls in tqdm(CALLS, schedule, disable=None):
            sigmas = host.levels(schedule, calls)
            ours, dpm = error(sample_exponential_pc, sigmas), error(theirs, sigmas)
            rows.append({"levels": schedule, "calls": calls, "sample_exponential_pc": ours, "sample_dpmpp_2m": dpm})
    for rtol in (0.2, 0.1, 0.05, 0.02):
        ours = error(sample_adaptive, fine, rtol=rtol)
        rows.append({"levels": f"its own, rtol {rtol}", "calls": host.calls, "sample_adaptive": ours})
    columns = ("sample_exponential_pc", "sample_dpmpp_2m", "sample_adaptive")
    shown = [[r["levels"], r["calls"], *(f"{r[c]:.3f}" if c in r else "" for c in columns)] for r in rows]
    table(["levels", "calls", *columns], shown)
    if keep:
        save("hosts", settings, rows)


if __name__ == "__main__":
    main()
