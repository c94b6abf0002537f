"""The `fastsde` command."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import click

import fastsde

_COMMANDS = {
    "sample": ("sample", "Draw samples: a PNG grid, an .npz and a JSON record."),
    "serve": ("serve", "Serve a model over HTTP: images, progress, metrics, a page."),
    "bench": ("bench", "NFE against FID: solvers x budgets x seeds, a table, a plot and a page."),
    "stats": ("measuring", "Reference statistics of a data set."),
    "evaluate": ("measuring", "FID, KID and others of a set of images."),
    "diagnose": ("diagnose", "Does the reading of a model fit its network?"),
    "fit": ("fit", "Fit the solver to a network: few calls, from some 30 samples of it."),
    "train": ("train", "Train a small score network on images, adversarial or not."),
    "train-features": ("features", "Train the classifier whose features measure images."),
    "info": ("info", "Versions, packaged models and solvers."),
}
"""For each command its module, which is imported when the command is used, and its line in the list of commands."""


class _Commands(click.Group):
    """Commands of which none ends in a traceback: what goes wrong is one line, and exit status 1 or 2."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"fastsde.cli.{_COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort, click.UsageError):
            raise
        except click.ClickException as error:
            raise click.ClickException(_one_line(error.message)) from error
        except (ValueError, TypeError, OSError, ImportError, RuntimeError, ArithmeticError) as error:
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
        own = issubclass(category, (fastsde.DataRangeWarning, fastsde.RepeatedSeedWarning))
        return f"Warning: {message}\n" if own else usual(message, category, *place, **more)

    warnings.formatwarning = told
