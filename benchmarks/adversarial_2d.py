r"""Figure 8.2: in two dimensions, does taking the expected denoised sample bring samples closer to the data?

Data: a swiss roll and 25 Gaussians on a grid. A perceptron learns the score on a VE process by denoising score
matching, and, with the same budget, with a discriminator of denoised samples (`fastsde.training.adversarial`). Annealed
Langevin sampling ends at sigma 0.1, as in appendix C.2 of the thesis, with ten steps a level. The distance of a sample
is that to the nearest of 20,000 data points, its median over samples, and the share of samples farther than 0.1.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import click
import torch
from common import RESULTS, save, table
from torch import Tensor, nn

import fastsde
from fastsde.training.adversarial import Adversary
from fastsde.training.loop import TrainConfig, train
from fastsde.training.networks import MLP

SIGMA_L = 0.1


def swiss_roll(n: int, generator: torch.Generator) -> Tensor:
    """A spiral, without noise, within about [-1.5, 1.5]."""
    angle = 1.5 * math.pi * (1 + 2 * torch.rand(n, generator=generator))
    return torch.stack([angle * angle.cos(), angle * angle.sin()], 1) / 10


def grid_of_gaussians(n: int, generator: torch.Generator) -> Tensor:
    """25 Gaussians of standard deviation 0.02 on a grid from -1.5 to 1.5."""
    centres = torch.cartesian_prod(*[torch.linspace(-1.5, 1.5, 5)] * 2)
    return centres[torch.randint(25, (n,), generator=generator)] + 0.02 * torch.randn(n, 2, generator=generator)


class Judge(nn.Sequential):
    """A perceptron with one output, without its axis."""

    def forward(self, x: Tensor) -> Tensor:
        """From (B, 2) to (B,)."""
        return super().forward(x).squeeze(1)


def trained(data: Tensor, steps: int, seed: int, *, adversarial: bool) -> fastsde.ScoreModel:
    """A score model of the data, from sigma 3 down to `SIGMA_L`."""
    torch.manual_seed(seed)
    sde = fastsde.VESDE(SIGMA_L, 3.0, t_min=1e-9)
    model = fastsde.ScoreModel(MLP(2), sde, "epsilon", event_shape=(2,))
    judge = Judge(nn.Linear(2, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 1))
    adversary = Adversary(judge, weight=1.0, learning_rate=1e-3) if adversarial else None
    betas = (0.0, 0.9) if adversarial else (0.9, 0.999)
    config = TrainConfig(steps=steps, batch_size=512, learning_rate=2e-3, betas=betas, seed=seed, bf16=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        model.network = train(model, data, None, config, path, adversary=adversary, save_every=steps)
    return model


def nearest(x: Tensor, data: Tensor) -> Tensor:
    """Distance of each row to the nearest data point, with shape (n,)."""
    return torch.cat([torch.cdist(part.double(), data.double()).amin(1) for part in x.split(500)])


@click.command(help=__doc__.split("\n", 1)[0], context_settings={"show_default": True})
@click.option("--steps", default=4000, help="Training steps.")
@click.option("--seeds", default=2)
@click.option("--samples", "-n", default=2000)
@click.option("--threads", default=2)
@click.option("--keep/--discard", default=True, help="Whether to write results/adversarial_2d.json and .png.")
def main(steps: int, seeds: int, samples: int, threads: int, keep: bool) -> None:
    """Prints the table and writes it."""
    from matplotlib.figure import Figure

    settings = click.get_current_context().params
    torch.set_num_threads(threads)
    rows: list[dict[str, object]] = []
    figure = Figure(figsize=(12, 6.2), dpi=110, layout="constrained")
    panels = figure.subplots(2, 4)
    for line, (name, law) in enumerate((("swiss roll", swiss_roll), ("25 Gaussians", grid_of_gaussians))):
        data = law(20_000, torch.Generator().manual_seed(0))
        for kind, adversarial in (("plain", False), ("adversarial", True)):
            for seed in range(seeds):
                model = trained(data, steps, seed, adversarial=adversarial)
                solver = fastsde.AnnealedLangevin(levels=30, n_sigma=10)
                r = fastsde.sample(model, n=samples, seed=seed, solver=solver, batch_size=samples, denoise=False)
                last = torch.full((samples,), model.sde.t_min, dtype=torch.float64)
                with torch.no_grad():
                    denoised = model(r.samples, last).x_0
                for column, (what, x) in enumerate((("not denoised", r.samples), ("denoised", denoised))):
                    distance = nearest(x, data)
                    row = {"data": name, "training": kind, "seed": seed, "sample": what}
                    row |= {"median": float(distance.median()), "far": float((distance > 0.1).double().mean())}
                    rows.append(row)
                    if seed == 0:
                        panel = panels[line, 2 * adversarial + column]
                        panel.plot(*data[:3000].T, ".", color="0.8", markersize=1.5)
                        panel.plot(*x[:1000].T, "x", color="#0072b2", markersize=2.5, markeredgewidth=0.6)
                        panel.set(title=f"{kind}, {what}", xlim=(-1.9, 1.9), ylim=(-1.9, 1.9), aspect="equal")
    keys = ("data", "training", "seed", "sample", "median", "far")
    table(keys, [[f"{v:.4f}" if isinstance(v := row[key], float) else v for key in keys] for row in rows])
    if keep:
        figure.savefig(RESULTS / "adversarial_2d.png")
        save("adversarial_2d", settings, rows)


if __name__ == "__main__":
    main()
