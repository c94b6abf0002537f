"""`fastsde calibrate`."""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch

from fastsde.arguments import usable_device
from fastsde.calibration import PILOT
from fastsde.calibration import calibrate as run
from fastsde.cli.output import PATH, check_writable
from fastsde.pretrained import pretrained


@click.command(short_help="The shape of a grid for one model, from a short pilot.")
@click.option("--model", default="fashion-mnist", help="A packaged model, or a folder written by `fastsde train`.")
@click.option("--nfe", type=click.IntRange(5), help="Network calls of a sample.")
@click.option("--rtol", type=float, help="In place of --nfe: the relative difference that more calls may make.")
@click.option("--pilot", default=PILOT, type=click.IntRange(3), help="Pilot samples.")
@click.option("--seed", default=0, help="Seed of the pilot samples.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, mps.")
@click.option("--out", default="schedule.json", type=PATH, help="The file to write.")
@click.option("--plot", type=PATH, help="Also draw the steps, as PNG; needs matplotlib.")
@click.option("--json", "as_json", is_flag=True, help="Print the file rather than the summary.")
def calibrate(
    model: str,
    nfe: int | None,
    rtol: float | None,
    pilot: int,
    seed: int,
    device: str,
    out: Path,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Choose the shape of the grid (and for --rtol the number of calls) for a model, and write it as JSON.

    Costs 36 runs of a sample with the default pilot. Weights and settings are kept in the file: if it is there and
    was made for the same, nothing is run.

    \b
    Examples:
      fastsde calibrate --nfe 12 --out twelve.json
      fastsde sample --schedule twelve.json
    """
    try:
        check_writable(out)
        if plot is not None:
            check_writable(plot, "--plot")
        score_model, sde = pretrained(model, device=usable_device(device))
        schedule = run(score_model, nfe=nfe, rtol=rtol, pilot=pilot, seed=seed, cache=out)
        if plot is not None:
            schedule.plot(plot, sde)
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps(json.loads(out.read_text()), indent=2) if as_json else f"{schedule}\n  {out}")
