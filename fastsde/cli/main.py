"""The `fastsde` command."""

from __future__ import annotations

import warnings
from typing import Any

import click

import fastsde
from fastsde.cli.bench import bench
from fastsde.cli.diagnose import diagnose
from fastsde.cli.features import train_features
from fastsde.cli.fit import fit
from fastsde.cli.info import info
from fastsde.cli.measuring import evaluate, stats
from fastsde.cli.sample import sample
from fastsde.cli.train import train
from fastsde.result import DataRangeWarning, RepeatedSeedWarning


class _Commands(click.Group):
    """Commands of which none ends in a traceback: what goes wrong is one line, and exit status 1 or 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort, click.UsageError):
            raise
        except click.ClickException as error:
            raise click.ClickException(_one_line(error.message)) from error
        except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
            raise click.ClickException(_one_line(str(error))) from error
        except Exception as error:  # whatever a damaged file or a model of others may raise
            raise click.ClickException(_one_line(f"{type(error).__name__}: {error}")) from error


def _one_line(text: str, most: int = 1000) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 3] + "..."


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(fastsde.__version__, prog_name="fastsde")
def main() -> None:
    """Samples from pretrained diffusion models, with no schedule to tune.

    \b
    Example:
      fastsde sample --model fashion-mnist -n 64 --rtol 0.05 --out samples
    """
    usual = warnings.formatwarning

    def told(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> str:
        own = issubclass(category, (DataRangeWarning, RepeatedSeedWarning))
        return f"Warning: {message}\n" if own else usual(message, category, *place, **more)

    warnings.formatwarning = told


for command in (sample, bench, stats, evaluate, diagnose, fit, train, train_features, info):
    main.add_command(command)
