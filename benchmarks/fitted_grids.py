"""Draws docs/images/fitted.png: ten garments with 4, 5 and 6 calls, by default and fitted, from the same noise."""

from __future__ import annotations

from pathlib import Path

import click
import torch
from common import packaged_model

import fastsde
from fastsde.evaluation.images import to_uint8

CALLS = (4, 5, 6)
OUT = Path(__file__).parents[1] / "docs" / "images" / "fitted.png"


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--seed", default=0)
@click.option("--threads", default=2)
def main(seed: int, threads: int) -> None:
    """Fits, draws and writes the picture."""
    from matplotlib.figure import Figure

    torch.set_num_threads(threads)
    model = packaged_model(untrained=False)
    labels = {"class_labels": torch.arange(40) % 10}
    ten = {"n": 10, "seed": seed, "cond": {"class_labels": torch.arange(10)}}
    rows = {}
    for n in CALLS:
        solver = fastsde.fit(model, nfe=n, cond=labels, progress=True)
        rows[f"{n} calls, default"] = fastsde.sample(model, nfe=n, **ten).samples
        rows[f"{n} calls, fitted"] = fastsde.sample(model, solver=solver, **ten).samples
    rows["60 calls"] = fastsde.sample(model, controller=fastsde.Grid.log_snr(model.sde, 59), **ten).samples
    figure = Figure(figsize=(7.6, 0.62 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 1)
    for axis, (name, samples) in zip(axes, rows.items(), strict=True):
        pixels = to_uint8(samples, (-1.0, 1.0))[..., 0]
        axis.imshow(torch.as_tensor(pixels).permute(1, 0, 2).reshape(28, -1), cmap="gray", vmin=0, vmax=255)
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
    figure.savefig(OUT, dpi=110)
    print(f"written: {OUT.name}")


if __name__ == "__main__":
    main()
