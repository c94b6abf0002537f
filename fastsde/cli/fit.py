"""`fastsde fit`."""

from __future__ import annotations

import os
from pathlib import Path

import click
import torch

from fastsde.cli.models import open_model, own_device
from fastsde.cli.output import PATH, check_writable, dump_json
from fastsde.fitting import FEWEST, PRICE
from fastsde.fitting import fit as run

_LABELLED = 40


@click.command(short_help="Fit the solver to a network: few calls, from some 30 samples of it.")
@click.option(
    "--model",
    default="fashion-mnist",
    help="A packaged model, a folder written by `fastsde train`, or a diffusers model: a folder or a name on the hub.",
)
@click.option("--nfe", type=click.IntRange(2), help="Network calls of a sample.")
@click.option("--rtol", type=float, help="In place of --nfe: the error allowed, as a share of a sample's size.")
@click.option("--eta", default=0.0, help="Noise of the sampler: 0 for the probability flow, 1 for the reverse SDE.")
@click.option(
    "--calls",
    type=click.IntRange(500),
    show_default=f"{PRICE:,} up to 6 calls a sample, more for more",
    help="What the fit may cost in network calls, about.",
)
@click.option(
    "--pilots",
    type=click.IntRange(FEWEST),
    show_default=f"as --calls pays for; {_LABELLED} for models with classes, in turn",
    help="Pilot samples.",
)
@click.option("--seed", default=0, type=click.IntRange(0), help="Seed of the pilot samples.")
@click.option("--batch-size", default=64, type=click.IntRange(1, 1 << 20), help="Rows evaluated at a time.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, mps.")
@click.option("--out", default="fitted.json", type=PATH, help="The file to write.")
@click.option("--plot", type=PATH, help="Also draw levels and errors, as PNG; needs matplotlib.")
@click.option("--json", "as_json", is_flag=True, help="Print the file rather than the summary.")
def fit(
    model: str,
    nfe: int | None,
    rtol: float | None,
    eta: float,
    calls: int | None,
    pilots: int | None,
    seed: int,
    batch_size: int,
    device: str,
    out: Path,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Fit times and weights of a multistep solver to a network, for one number of calls, and write them as JSON.

    A few samples are solved accurately; then the solver is fitted to end where they do. A third of them is left out,
    and tells how good the fit is beside the default, which stays if it is as good. Paid once: if the file is there and
    was made for the same weights and settings, nothing is run. A fit that was interrupted goes on from FILE.part.

    \b
    Examples:
      fastsde fit --nfe 5 --out five.json
      fastsde sample --fitted five.json -n 64
      fastsde fit --rtol 0.1 --plot fitted.png
    """
    check_writable(out)
    if plot is not None:
        check_writable(plot, "--plot")
    opened = open_model(model, own_device(device, os.environ), torch.float32)
    cond = None
    if opened.classes:
        pilots = _LABELLED if pilots is None else pilots
        cond = {"class_labels": torch.arange(pilots) % opened.classes}
    solver = run(
        opened.model,
        nfe=nfe,
        rtol=rtol,
        eta=eta,
        cond=cond,
        calls=calls,
        pilots=pilots,
        seed=seed,
        batch_size=batch_size,
        cache=out,
        progress=True,
    )
    if plot is not None:
        solver.plot(plot)
    click.echo(dump_json(solver.as_json()) if as_json else f"{solver}\n  {out}")
