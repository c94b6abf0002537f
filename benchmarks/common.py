"""What the benchmarks share: their command line, where numbers come from, how they are printed and kept, timing."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import functools
import inspect
import itertools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from tables import cell, lines_of
from torch import Tensor
from tqdm import tqdm

import fastsde
from fastsde.evaluation.features import open_features
from fastsde.evaluation.images import to_uint8
from fastsde.evaluation.reference import packaged_reference
from fastsde.evaluation.statistics import Moments, frechet, frechet_distance
from fastsde.evaluation.sweep import Cell, Problem, Sweep, result_of
from fastsde.training.adversarial import Adversary
from fastsde.training.config import TrainConfig
from fastsde.training.loop import train

HERE = Path(__file__).resolve().parent
RESULTS, RUNS, IMAGES = HERE / "results", HERE / "runs", HERE.parent / "docs" / "images"
Row = dict[str, Any]
Work = Callable[..., Any]


def cpu_name() -> str:
    """The processor's model name."""
    info = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*: (.*)", info.read_text() if info.exists() else "", re.MULTILINE)
    return name[1].strip() if name else platform.processor() or platform.machine()


def commit() -> str:
    """The commit that runs, with "-dirty" if code differs from it; "unknown" outside of a git repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(HERE.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions(settings: Mapping[str, object]) -> Row:
    """Settings, versions and processor: what may not change in a study that goes on where it stopped."""
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "torch_threads": torch.get_num_threads()}
    if settings.get("device") == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    return {
        "settings": {key: value.name if isinstance(value, Path) else value for key, value in settings.items()},
        "versions": {"fastsde": fastsde.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": machine,
    }


def command(
    name: str | None, group: click.Group | None = None, *, by_device: bool = False, **quick: object
) -> Callable[[Work], click.Command]:
    """Makes a function a command whose arguments are options; it prints and keeps what the function returns.

    An argument without a default must be given; a tuple may be given several times. The help is the first paragraph of
    the function's docstring, or of the script's if the script has one command.

    Args:
        name: of the file in results/ that keeps what the function returns; nothing is kept of None.
        group: what the command is a part of, under the function's name.
        by_device: whether each device has a file of its own, as for times.
        quick: the settings of --quick, which shows that the script runs and keeps nothing.
    """

    def small(context: click.Context, _: click.Parameter, value: bool) -> bool:
        if value:
            context.default_map = quick | {"threads": 1}
        return value

    def decorate(work: Work) -> click.Command:
        @functools.wraps(work)
        def run(threads: int, keep: bool, quick: bool, **settings: object) -> None:
            torch.set_num_threads(threads)
            torch.backends.cudnn.allow_tf32 = False  # which a GPU would use for convolutions: errors of 1e-3
            script = str(Path(inspect.getfile(work)).resolve().relative_to(HERE)) + (
                f" {work.__name__}" if group else ""
            )
            # Of the code that runs, whatever changes meanwhile.
            record: Row = {"script": script, "commit": commit(), "date": datetime.date.today().isoformat()}
            record |= versions(settings | {"threads": threads})
            start = time.perf_counter()
            found = work(**settings)
            if found is None:
                return
            record["minutes"] = round((time.perf_counter() - start) / 60, 1)
            if name is not None and keep and not quick:
                device = settings.get("device", "cpu")
                path = RESULTS / (f"{name}_{device}.json" if by_device and device != "cpu" else f"{name}.json")
                path.write_text(json.dumps(record | {"results": found}, indent=1) + "\n")
                print(f"written: results/{path.name}\n")
            show(found)

        for argument in reversed(inspect.signature(work).parameters.values()):
            run = option_of(argument)(run)
        for option in (
            click.option("--threads", default=2, help="Threads of torch."),
            click.option("--keep/--discard", default=True, help=f"Whether to write results/{name}.json."),
            click.option("--quick", is_flag=True, is_eager=True, callback=small, help="Tiny settings; keeps nothing."),
        ):
            run = option(run)
        doc = work.__doc__ if group else sys.modules[work.__module__].__doc__
        said = {"help": doc.split("\n\n")[0].replace("\n", " "), "context_settings": {"show_default": True}}
        return (group.command if group else click.command)(work.__name__, **said)(run)

    return decorate


def option_of(argument: inspect.Parameter) -> Callable[[Work], Work]:
    """The option of an argument: its type is that of the default, or a path."""
    default, name = argument.default, f"--{argument.name.replace('_', '-')}"
    if isinstance(default, bool):
        return click.option(f"{name}/--no-{name[2:]}", default=default)
    if default is argument.empty or "Path" in argument.annotation:
        needed = {"required": True} if default is argument.empty else {"default": default, "show_default": False}
        return click.option(name, type=click.Path(path_type=Path), **needed)
    if isinstance(default, tuple):
        return click.option(name, type=type(default[0]) if default else str, multiple=True, default=default)
    return click.option(name, default=default)


def show(found: Any) -> None:
    """Prints rows, a table for each `part` of a study, and what else a result holds by its name."""
    if isinstance(found, Mapping):
        for key, value in found.items():
            print(f"\n{key}:", end=" ")
            show(value)
    elif isinstance(found, list) and all(isinstance(row, Mapping) for row in found):
        for _, rows in itertools.groupby(found, key=lambda row: row.get("part")):
            print("\n" + lines_of(list(rows)))
    else:
        print(cell(found))


class Book:
    """Rows of a CSV file, by their first fields; it is written as they come, so that an interrupted study goes on.

    Args:
        path: the file.
        keys: the fields that make a row.
        values: the others.
    """

    def __init__(self, path: Path, keys: Sequence[str], values: Sequence[str]) -> None:
        self.path, self.keys, self.fields = path, keys, (*keys, *values)
        self.rows: dict[tuple[str, ...], dict[str, str]] = {}
        if path.exists():
            with path.open(newline="") as file:
                self.rows = {tuple(row[k] for k in keys): row for row in csv.DictReader(file)}

    def need(self, work: Callable[..., Mapping[str, object]], *key: Any) -> dict[str, str]:
        """The row of a key; `work(*key)` makes and writes it where it is not there."""
        words = tuple(map(str, key))
        if words not in self.rows:
            made = {k: str(v) for k, v in work(*key).items()}
            self.rows[words] = dict(zip(self.keys, words, strict=True)) | made
            self.path.parent.mkdir(exist_ok=True, parents=True)
            new = not self.path.exists()
            with self.path.open("a", newline="") as file:
                writer = csv.DictWriter(file, self.fields)
                if new:
                    writer.writeheader()
                writer.writerow(self.rows[words])
        return self.rows[words]


def described(part: object) -> str:
    """A solver, or another dataclass, by its class and the arguments that are not the defaults: what was run says so.

    What is no dataclass is given by its repr; a number by up to six digits.
    """
    if not dataclasses.is_dataclass(part):
        return f"{part:g}" if isinstance(part, float) else repr(part)
    if isinstance(name := getattr(part, "name", None), str):  # a tableau
        return name
    own = {field.name: (getattr(part, field.name), field.default) for field in dataclasses.fields(part)}
    changed = [f"{name}={described(value)}" for name, (value, default) in own.items() if value != default]
    return f"{type(part).__name__}({', '.join(changed)})"


def labels(n: int) -> dict[str, Tensor]:
    """Conditioning of n samples: the ten classes in turn."""
    return {"class_labels": torch.arange(n) % 10}


def pixels(images: Tensor) -> Tensor:
    """Images in [-1, 1] with shape (n, C, H, W) in 8 bits."""
    return torch.from_numpy(to_uint8(images, (-1.0, 1.0))).movedim(-1, 1)


def fid(images: Tensor) -> float:
    """Frechet distance of images in [-1, 1], shape (n, 1, 28, 28), to Fashion-MNIST, in the packaged features."""
    reference = packaged_reference("fashion-mnist")
    own = Moments.of(open_features("fashion-mnist").of(pixels(images).split(500))[0].double())
    return frechet_distance(own.mean, own.covariance, reference.mean, reference.covariance)


def floor_of(n: int, draws: int = 20) -> Row:
    """Mean and spread of the Frechet distances of n training images of Fashion-MNIST at a time."""
    reference, seeded = packaged_reference("fashion-mnist"), torch.Generator().manual_seed(0)
    chosen = [torch.randperm(len(reference.feats), generator=seeded)[:n] for _ in range(draws)]
    found = [frechet(reference.feats[k], reference.mean, reference.covariance, draws=2).value for k in chosen]
    return {"mean": float(torch.tensor(found).mean()), "spread": float(torch.tensor(found).std())}


def swept(work: Path, model: fastsde.ScoreModel, cells: Sequence[Cell], samples: int, **sizes: int) -> list[Row]:
    """Rows of a sweep with the packaged network; draws and measures what is missing.

    The folder survives being killed. Other processes may run the same; what one of them draws, the others wait for.
    """
    of = open_features("fashion-mnist"), packaged_reference("fashion-mnist")
    sweep = Sweep(work, Problem(model, *of, versions({}), 10), cells, samples, **sizes)
    while len(rows := sweep.rows()) < len(cells):
        with tqdm(total=len(cells) * samples, unit="", smoothing=0.05, disable=None) as bar:
            for cell in sweep.run(progress=bar.update):
                tqdm.write(result_of(sweep.row(cell)))
    return rows


def trained(
    model: fastsde.ScoreModel, data: Tensor, config: TrainConfig, adversary: Adversary | None = None
) -> fastsde.ScoreModel:
    """The model with the averaged weights of a training without labels, whose checkpoint goes."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"adversary": adversary, "save_every": config.steps}
        model.network = train(model, data, None, config, Path(folder) / "c.safetensors", **options)
    return model


def timed(work: Callable[[], object]) -> float:
    """Wall time of one call, and of what it left to a GPU."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(ours: Callable[[], float], theirs: Callable[[], float], seconds: float) -> Row:
    """Two works that return their time, in turn, for so many seconds and at least 5 times each.

    A machine that others use, too, is fast and slow by the minute, so one pair says little. Returns medians of both
    times and of the ratio of pairs, with the interval that holds the true one in 95 of 100 cases.
    """
    pairs: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(pairs) < 5 or time.perf_counter() < end:
        if len(pairs) % 2:  # each goes first as often as the other
            b, a = theirs(), ours()
        else:
            a, b = ours(), theirs()
        pairs.append((a, b))
    ratios = sorted(a / b for a, b in pairs)
    low = max(0, math.floor((len(ratios) - 1.96 * math.sqrt(len(ratios))) / 2))
    return {
        "pairs": len(pairs),
        "ours_seconds": statistics.median(a for a, _ in pairs),
        "theirs_seconds": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "ratio_interval": [ratios[low], ratios[-1 - low]],
    }
