"""The `fastsde` command."""

from __future__ import annotations

import click

import fastsde
from fastsde.cli.bench import bench
from fastsde.cli.calibrate import calibrate
from fastsde.cli.features import train_features
from fastsde.cli.info import info
from fastsde.cli.measuring import evaluate, stats
from fastsde.cli.sample import sample
from fastsde.cli.train import train


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(fastsde.__version__, prog_name="fastsde")
def main() -> None:
    """Samples from pretrained diffusion models, with no schedule to tune.

    \b
    Example:
      fastsde sample --model fashion-mnist -n 64 --rtol 0.05 --out samples
    """


for command in (sample, bench, stats, evaluate, calibrate, train, train_features, info):
    main.add_command(command)
