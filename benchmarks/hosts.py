r"""`fastsde.kdiffusion` beside k-diffusion's DPM-Solver++(2M), on the same model, levels and start states.

The packaged network, in k-diffusion's convention. Error: root mean square of the difference to the accurate solution of
the probability flow down to the same last level, over that of the solution. Needs `pip install -e '.[bench,peers]'`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import Row, command, labels
from peers_exact import k_diffusion_sampling
from torch import Tensor
from tqdm import tqdm

import fastsde
from fastsde.kdiffusion import sample_adaptive, sample_exponential_pc

SCHEDULES = ("karras", "exponential", "simple")


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


@command("hosts", samples=2, calls=[5], accurate=10)
def main(samples: int = 20, calls: tuple[int, ...] = (5, 6, 8, 10, 15, 20, 30), accurate: int = 200) -> list[Row]:
    """The table."""
    host = Host(fastsde.pretrained("fashion-mnist"), labels(samples)["class_labels"])
    theirs = k_diffusion_sampling().sample_dpmpp_2m
    fine = host.levels("exponential", accurate)
    x = fine[0] * torch.randn(samples, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    exact = sample_exponential_pc(host, x, fine, disable=True)

    def error(sampler: Callable[..., Tensor], sigmas: Tensor, **options: float) -> float:
        host.calls = 0
        return float((sampler(host, x, sigmas, disable=True, **options) - exact).norm() / exact.norm())

    rows: list[Row] = []
    for schedule, n in tqdm([(schedule, n) for schedule in SCHEDULES for n in calls], disable=None):
        sigmas = host.levels(schedule, n)
        row: Row = {"levels": schedule, "calls": n, "sample_exponential_pc": error(sample_exponential_pc, sigmas)}
        rows.append(row | {"sample_dpmpp_2m": error(theirs, sigmas)})
    for rtol in (0.2, 0.1, 0.05, 0.02):
        ours = error(sample_adaptive, fine, rtol=rtol)
        rows.append({"levels": f"its own, rtol {rtol}", "calls": host.calls, "sample_adaptive": ours})
    return rows


if __name__ == "__main__":
    main()
