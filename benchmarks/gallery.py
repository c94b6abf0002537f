"""What does each sampler draw with a trained network, at a number of calls that suits it?

Ten images, one of each class, from the packaged Fashion-MNIST model (VP, predicts noise) with every solver. All rows
use the same seed, so they start from the same noise: deterministic solvers agree on the garments, stochastic ones need
not.
Annealed Langevin and consistent annealed sampling run on this VP network through y = x / alpha.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import click
import matplotlib as mpl
import torch
from common import described

import fastsde

mpl.use("Agg")
import matplotlib.pyplot as plt


def settings(sde: fastsde.SDE) -> list[dict[str, object]]:
    """The arguments of `sample` for each row, the solver always among them: the label is that of what ran."""
    solvers = [
        fastsde.ExponentialPC(11),
        fastsde.ExponentialPC(19, eta=1.0),
        fastsde.DDIM(20),
        fastsde.DPMSolverPP(11),
        fastsde.DPMSolverPP(19, eta=1.0),
        fastsde.UniPC(11, order=3),
        fastsde.DEIS(11),
        fastsde.SASolver(19),
        fastsde.EulerMaruyama(200),
        fastsde.ReverseDiffusion(200),
        fastsde.Ancestral(200),
        fastsde.PredictorCorrector(fastsde.ReverseDiffusion(100), fastsde.Langevin(0.01)),
        fastsde.AnnealedLangevin(200),
        fastsde.ConsistentAnnealed(100),
    ]
    return [
        {"solver": fastsde.ExponentialPC(), "rtol": 0.05},
        {"solver": fastsde.ExtrapolatedEM(), "rtol": 0.05},
        {"solver": fastsde.ProbabilityFlow(), "rtol": 0.05},
        {"solver": fastsde.Heun(), "controller": fastsde.Grid.karras(sde, 17)},
        *({"solver": solver} for solver in solvers),
    ]


def label(options: dict[str, object]) -> str:
    """What a row was drawn with: its solver, and what else `sample` was given."""
    solver, *rest = (
        described(value) if key != "rtol" else f"rtol {described(value)}" for key, value in options.items()
    )
    return ", ".join([solver, *rest])


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
    for axis, options in zip(axes, rows, strict=True):
        result = fastsde.sample(model, n=10, seed=seed, cond=cond, **options)
        images = result.samples[:, 0].clamp(-1, 1)
        axis.imshow(torch.cat(list(images), 1), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_axis_off()
        calls = f"{result.nfe.double().mean():.0f} calls"
        name = label(options)
        # A solver inside another may start a line.
        lines = textwrap.wrap(re.sub("=(?=[A-Z])", "= ", name), 36)
        shown = "\n".join([*lines, calls]).replace("= ", "=")
        axis.text(-6, 14, shown, ha="right", va="center", fontsize=7)
        print(f"{name:90} {calls:>10}  {result.counts()}")
    figure.subplots_adjust(left=0.27, right=0.995, top=0.995, bottom=0.005, hspace=0.06)
    figure.savefig(out, dpi=110)
    print(f"written: {out}")


if __name__ == "__main__":
    main()
