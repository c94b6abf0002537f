"""What does each sampler draw with a trained network, at a number of calls that suits it?

Ten images, one of each class, from the packaged Fashion-MNIST model (VP, predicts noise) with every solver. All rows
use the same seed, so they start from the same noise: deterministic solvers agree on the garments, stochastic ones need
not.
Annealed Langevin and consistent annealed sampling run on this VP network through y = x / alpha.
"""

from __future__ import annotations

from pathlib import Path

import click
import matplotlib as mpl
import torch

import fastsde

mpl.use("Agg")
import matplotlib.pyplot as plt


def settings(sde: fastsde.SDE) -> list[tuple[str, dict[str, object]]]:
    """A label and the arguments of `sample` for each row."""
    corrected = fastsde.PredictorCorrector(fastsde.ReverseDiffusion(100), fastsde.Langevin(0.01))
    karras = {"solver": fastsde.Heun(), "controller": fastsde.Grid.karras(sde, 17)}
    return [
        ("ExtrapolatedEM, rtol 0.05", {"rtol": 0.05}),
        ("ExponentialPC, eta 0", {"solver": fastsde.ExponentialPC(11)}),
        ("ExponentialPC, eta 1", {"solver": fastsde.ExponentialPC(19, eta=1.0)}),
        ("DDIM", {"solver": fastsde.DDIM(20)}),
        ("DPMSolverPP 2M", {"solver": fastsde.DPMSolverPP(11)}),
        ("DPMSolverPP 2M, SDE", {"solver": fastsde.DPMSolverPP(19, eta=1.0)}),
        ("UniPC-3", {"solver": fastsde.UniPC(11, order=3)}),
        ("DEIS-3", {"solver": fastsde.DEIS(11)}),
        ("SASolver", {"solver": fastsde.SASolver(19)}),
        ("ProbabilityFlow 5(4), rtol 0.05", {"solver": fastsde.ProbabilityFlow(), "rtol": 0.05}),
        ("Heun, Karras grid", karras),
        ("EulerMaruyama", {"solver": fastsde.EulerMaruyama(200)}),
        ("ReverseDiffusion", {"solver": fastsde.ReverseDiffusion(200)}),
        ("Ancestral", {"solver": fastsde.Ancestral(200)}),
        ("ReverseDiffusion + Langevin", {"solver": corrected}),
        ("AnnealedLangevin (ALS)", {"solver": fastsde.AnnealedLangevin(200)}),
        ("ConsistentAnnealed (CAS)", {"solver": fastsde.ConsistentAnnealed(100)}),
    ]


@click.command(help=__doc__.split("\n", 1)[0], context_settings={"show_default": True})
@click.option("--seed", default=0)
@click.option("--threads", default=2, help="Threads of torch.")
@click.option("--out", default="docs/images/samplers.png", type=click.Path(path_type=Path))
def main(seed: int, threads: int, out: Path) -> None:
    """Draws the picture and prints the calls."""
    torch.set_num_threads(threads)
    model, sde = fastsde.pretrained("fashion-mnist")
    rows = settings(sde)
    figure, axes = plt.subplots(len(rows), 1, figsize=(7.8, 0.62 * len(rows)))
    cond = {"class_labels": torch.arange(10)}
    for axis, (label, options) in zip(axes, rows, strict=True):
        result = fastsde.sample(model, n=10, seed=seed, cond=cond, **options)
        images = result.samples[:, 0].clamp(-1, 1)
        axis.imshow(torch.cat(list(images), 1), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_axis_off()
        calls = f"{result.nfe.double().mean():.0f} calls"
        axis.text(-6, 14, f"{label}\n{calls}", ha="right", va="center", fontsize=8)
        print(f"{label:34} {calls:>10}  {result.counts()}")
    figure.subplots_adjust(left=0.27, right=0.995, top=0.995, bottom=0.005, hspace=0.06)
    figure.savefig(out, dpi=110)
    print(f"written: {out}")


if __name__ == "__main__":
    main()
