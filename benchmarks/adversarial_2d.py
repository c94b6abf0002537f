r"""Figure 8.2 and the error of a learned score: does the expected denoised sample come nearer to the data?

A swiss roll and 25 Gaussians in two dimensions, standardised; VP down to noise over signal of 0.05; a perceptron told
the log-SNR, trained at 200 geometric levels by denoising score matching, plain or adversarial (least squares, another
perceptron as discriminator, lambda 10), same steps and seeds; also plain with the Adam of the adversarial one, which
has no momentum. The largest norm of the gradient is scaled as the loss is. Samples are by consistent and by plain
annealed sampling. "gap" is the root mean square distance to the roll's curve or the nearest centre, of the last state
and its expected denoised sample; "SW2" the sliced Wasserstein distance to fresh data. The Gaussians have an exact
score: the relative error of the learned one, E |s - s*|^2 / E |s*|^2, at each level of noise.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from pathlib import Path

import click
import torch
from common import RESULTS, save, table
from torch import Tensor, nn
from tqdm import tqdm

import fastsde
from fastsde.evaluation.statistics import sliced_wasserstein
from fastsde.score import MixtureScore
from fastsde.training.adversarial import Adversary
from fastsde.training.config import TrainConfig
from fastsde.training.loop import train
from fastsde.training.networks import MLP

LAST = 0.05
"""The lowest noise over signal."""
SPREAD = 0.03
SDE = fastsde.VPSDE(t_min=float(fastsde.VPSDE().t_of_log_snr(torch.tensor(-2 * math.log(LAST), dtype=torch.float64))))
SAMPLERS = {
    "CAS": fastsde.ConsistentAnnealed(levels=200, n_sigma=1, eta=0.2),
    "ALS": fastsde.AnnealedLangevin(levels=200, n_sigma=5, eta=0.1),
}
LEVELS = torch.logspace(math.log10(LAST), 1, 16, dtype=torch.float64)
COLORS = {"plain": "#d55e00", "plain, no momentum": "0.5", "adversarial": "#0072b2"}
SHOWN = ("plain", "adversarial")


def roll(u: Tensor) -> Tensor:
    """Points of the roll's curve, u in [0, 1], with mean near 0 and spread near 1."""
    angle = 1.5 * math.pi * (1 + 2 * u)
    return torch.stack([angle * angle.cos(), angle * angle.sin()], -1) / 6.6


CENTRES = torch.cartesian_prod(*[torch.linspace(-1.4, 1.4, 5)] * 2)
CURVE = roll(torch.linspace(0, 1, 4000))


def draw(name: str, n: int, seed: int) -> Tensor:
    """Data with shape (n, 2)."""
    generator = torch.Generator().manual_seed(seed)
    if name == "swiss roll":
        return roll(torch.rand(n, generator=generator))
    centre = CENTRES[torch.randint(25, (n,), generator=generator)]
    return centre + SPREAD * torch.randn(n, 2, generator=generator)


def gap(name: str, x: Tensor) -> float:
    """Root mean square distance to the curve, or to the nearest centre."""
    nearest = torch.cdist(x, CURVE if name == "swiss roll" else CENTRES).amin(1)
    return float(nearest.square().mean().sqrt())


class Critic(nn.Module):
    """A perceptron from points to numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, 256), nn.LeakyReLU(0.2), nn.Linear(256, 256), nn.LeakyReLU(0.2), nn.Linear(256, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """From (B, 2) to (B,)."""
        return self.layers(x).squeeze(1)


def trained(name: str, kind: str, steps: int, seed: int) -> fastsde.ScoreModel:
    """A score model with the averaged weights."""
    torch.manual_seed(seed)
    network = MLP(2, depth=4, octaves=5)
    model = fastsde.ScoreModel(
        network, SDE, "epsilon", event_shape=(2,), data_range=(-2.0, 2.0), timestep=lambda t: 0.5 + SDE.log_snr(t) / 20
    )
    adversary = Adversary(Critic(), weight=10.0) if kind == "adversarial" else None
    betas = (0.9, 0.999) if kind == "plain" else (0.0, 0.9)
    # The adversarial loss has lambda / 2 of the sum over two coordinates where the plain one has the mean.
    clip = adversary.weight if adversary else 1.0
    config = TrainConfig(steps, 256, 2e-3, betas=betas, seed=seed, bf16=False, levels=200, grad_clip=clip)
    with tempfile.TemporaryDirectory() as folder:
        model.network = train(
            model,
            draw(name, 50_000, 1),
            None,
            config,
            Path(folder) / "c.safetensors",
            adversary=adversary,
            save_every=steps,
        )
    return model


@torch.no_grad()
def score_errors(model: fastsde.ScoreModel) -> list[float]:
    """Relative error of the learned score of the Gaussians at each of LEVELS, by 4000 points of the noisy law."""
    exact = MixtureScore(
        SDE, torch.full((25,), 0.04), CENTRES, torch.zeros(25, 2, 0), torch.zeros(25, 0), floor=SPREAD**2
    )
    x_0, generator = draw("25 Gaussians", 4000, 3), torch.Generator().manual_seed(4)
    errors = []
    for t in SDE.t_of_log_snr(-2 * LEVELS.log()):
        times = t.expand(len(x_0))
        x = SDE.marginal(x_0, times, torch.randn(x_0.shape, generator=generator))
        right = exact(x, times).score
        errors.append(float((model(x, times).score - right).square().sum() / right.square().sum()))
    return errors


def plot(pictures: dict[tuple[str, str], tuple[Tensor, Tensor]], errors: dict[tuple[str, int], list[float]]) -> None:
    """Draws results/adversarial_2d.png and results/score_error.png."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 6.6), dpi=110, layout="constrained")
    axes = figure.subplots(2, 4)
    for (name, kind), pair in pictures.items():
        row, column = ("swiss roll", "25 Gaussians").index(name), 2 * SHOWN.index(kind)
        for k, (x, label) in enumerate(zip(pair, ("last state", "expected denoised"), strict=True)):
            panel, real = axes[row, column + k], draw(name, 500, 2)
            panel.plot(*real.T, "o", color="0.55", ms=4, mfc="none", label="data")
            panel.plot(*x[:500].T, "x", color=COLORS[kind], ms=4, label="samples")
            panel.set(title=f"{name}, {kind}: {label}", xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), aspect="equal")
            panel.title.set_fontsize(9)
            panel.set_axis_off()
    axes[0, 0].legend(fontsize=8)
    figure.savefig(RESULTS / "adversarial_2d.png")
    figure = Figure(figsize=(5.6, 4), dpi=110, layout="constrained")
    panel = figure.subplots()
    for (kind, seed), values in errors.items():
        panel.plot(LEVELS, values, "-o", ms=3, color=COLORS[kind], label=kind if seed == 0 else None)
    panel.set(xscale="log", yscale="log", xlabel="noise over signal", ylabel="E |s - s*|$^2$ / E |s*|$^2$")
    panel.set_title("Error of the learned score, 25 Gaussians", fontsize=10)
    panel.grid(alpha=0.3)
    panel.legend()
    figure.savefig(RESULTS / "score_error.png")


@click.command(help=__doc__.split("\n", 1)[0], context_settings={"show_default": True})
@click.option("--steps", default=6000)
@click.option("--samples", "-n", default=4000)
@click.option("--seeds", default=2)
@click.option("--threads", default=2)
@click.option("--keep/--discard", default=True, help="Whether to write results/adversarial_2d.json and two pictures.")
def main(steps: int, samples: int, seeds: int, threads: int, keep: bool) -> None:
    """Prints the table and writes it."""
    settings = click.get_current_context().params
    torch.set_num_threads(threads)
    rows, pictures, errors = [], {}, {}
    runs = list(itertools.product(("swiss roll", "25 Gaussians"), COLORS, range(seeds)))
    for name, kind, seed in tqdm(runs, "runs", disable=None):
        model, fresh = trained(name, kind, steps, seed), draw(name, samples, 5)
        for sampler, solver in SAMPLERS.items():
            r = fastsde.sample(model, n=samples, solver=solver, seed=seed, batch_size=samples, denoise=False)
            last = torch.full((samples,), SDE.t_min, dtype=torch.float64)
            with torch.no_grad():
                denoised = model(r.samples, last).x_0
            state = r.samples / float(SDE.alpha(last)[0])
            if sampler == "CAS" and seed == 0 and kind in SHOWN:
                pictures[name, kind] = (state, denoised)
            row: dict[str, object] = {"data": name, "training": kind, "seed": seed, "sampler": sampler}
            for key, x in (("last", state), ("denoised", denoised)):
                row |= {f"gap_{key}": gap(name, x), f"SW2_{key}": sliced_wasserstein(x, fresh)}
            rows.append(row)
        if name == "25 Gaussians":
            errors[kind, seed] = score_errors(model)
    real = {name: (gap(name, a := draw(name, samples, 6)), sliced_wasserstein(a, draw(name, samples, 5)))
            for name in ("swiss roll", "25 Gaussians")}  # fmt: skip
    print(f"\nfresh data (gap, SW2): {real}\n")
    table(list(rows[0]), [[f"{v:.4f}" if isinstance(v, float) else v for v in row.values()] for row in rows])
    chosen = (0, 5, 10, 15)
    print()
    table(
        ["error of the score at", *(f"{LEVELS[k]:.2g}" for k in chosen)],
        [[f"{kind}, seed {seed}", *(f"{v[k]:.2g}" for k in chosen)] for (kind, seed), v in errors.items()],
    )
    if keep:
        plot(pictures, errors)
        found = [{"training": kind, "seed": seed, "errors": v} for (kind, seed), v in errors.items()]
        save("adversarial_2d", settings, {"data": real, "rows": rows, "levels": LEVELS.tolist(), "score_errors": found})


if __name__ == "__main__":
    main()
