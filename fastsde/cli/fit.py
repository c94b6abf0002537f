"""`fastsde fit`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch

from fastsde.cli import options as option
from fastsde.cli.models import open_model
from fastsde.cli.options import PATH
from fastsde.cli.output import check_writable, dump_json
from fastsde.fitting import FEWEST, PRICE
from fastsde.fitting import fit as run


@click.command()
@option.model
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
    show_default="as many as --calls pays for",
    help="Pilot samples; of a model with classes, of each in turn.",
)
@click.option(
    "--guess/--no-guess",
    default=True,
    help="Whether the mean of the data may take the place of the call in pure noise. A pipeline's loop makes that call "
    "in any case.",
)
@option.seed
@option.batch_size
@option.device
@click.option("--out", default="fitted.json", type=PATH, help="The file to write.")
@option.plot
@option.as_json
def fit(model: str, device: torch.device, out: Path, plot: Path | None, as_json: bool, **asked: Any) -> None:
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
    if (asked["nfe"] is None) == (asked["rtol"] is None):
        raise click.UsageError("give one of --nfe and --rtol.")
    check_writable(out)
    check_writable(plot, "--plot")
    opened = open_model(model, device, torch.float32)
    cond = (lambda n: {"class_labels": torch.arange(n) % opened.classes}) if opened.classes else None
    solver = run(opened.model, cond=cond, cache=out, progress=True, **asked)
    if plot is not None:
        solver.plot(plot)
    click.echo(dump_json(solver.as_json()) if as_json else f"{solver}\n  {out}")
