"""What the benchmarks share: their command line, where numbers come from, how they are printed and kept, timing."""

from __future__ import annotations

import copy
import csv
import ctypes
import dataclasses
import datetime
import functools
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import click
import torch
from torch import Tensor, nn

import fastsde
from fastsde.evaluation.features import open_features
from fastsde.evaluation.images import to_uint8
from fastsde.evaluation.reference import packaged_reference
from fastsde.evaluation.statistics import Moments, frechet_distance

HERE = Path(__file__).parent
RESULTS, RUNS, IMAGES = HERE / "results", HERE / "runs", HERE.parent / "docs" / "images"
Row = dict[str, object]


def cpu_name() -> str:
    """The processor's model name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


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


def provenance(settings: Mapping[str, object]) -> Row:
    """The same with commit and date: what someone needs to judge or repeat a number."""
    return {"commit": commit(), "date": datetime.date.today().isoformat()} | versions(settings)


def command(
    doc: str, name: str, group: click.Group | None = None, **quick: object
) -> Callable[[Callable[..., object]], click.Command]:
    """Makes a function with click options a command that also has --threads, --keep / --discard and --quick.

    Args:
        doc: a text whose first paragraph is the help.
        name: of the file in results/ that keeps what the function returns; nothing is kept of None.
        group: what the command is a part of, under the function's name.
        quick: the settings of --quick, which shows that the script runs and keeps nothing.
    """

    def small(context: click.Context, _: click.Parameter, value: bool) -> bool:
        if value:
            context.default_map = quick | {"threads": 1}
        return value

    def decorate(work: Callable[..., object]) -> click.Command:
        @functools.wraps(work)
        def run(threads: int, keep: bool, quick: bool, **settings: object) -> None:
            torch.set_num_threads(threads)
            record = provenance(settings | {"threads": threads})  # of the code that runs, whatever changes meanwhile
            found = work(**settings)
            if keep and not quick and found is not None:
                device = settings.get("device", "cpu")
                path = RESULTS / (f"{name}.json" if device == "cpu" else f"{name}_{device}.json")
                path.write_text(json.dumps(record | {"results": found}, indent=1) + "\n")
                print(f"\nwritten: results/{path.name}")

        options = (
            click.option("--threads", default=2, help="Threads of torch."),
            click.option("--keep/--discard", default=True, help=f"Whether to write results/{name}.json."),
            click.option("--quick", is_flag=True, is_eager=True, callback=small, help="Tiny settings; keeps nothing."),
        )
        for option in options:
            run = option(run)
        make = click.command if group is None else group.command
        settings = {"show_default": True}
        return make(work.__name__, help=doc.split("\n\n")[0].replace("\n", " "), context_settings=settings)(run)

    return decorate


def shown(value: object) -> str:
    """A cell of a table: four digits of a number, nothing for None."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return " .. ".join(map(shown, value))
    return "" if value is None else str(value)


def table(rows: Sequence[Mapping[str, object]], *keys: str) -> None:
    """Prints the keys of rows, all of them by default, the first column aligned left."""
    keys = keys or tuple(dict.fromkeys(key for row in rows for key in row))
    text = [keys, *(tuple(shown(row.get(key)) for key in keys) for row in rows)]
    width = [max(len(line[k]) for line in text) for k in range(len(keys))]
    for first, *rest in (text[0], tuple("-" * w for w in width), *text[1:]):
        print("  ".join([first.ljust(width[0]), *(c.rjust(w) for c, w in zip(rest, width[1:], strict=True))]))


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

    def need(self, *key: object, work: Callable[[], Mapping[str, object]]) -> None:
        """Runs what is not there, and writes it."""
        words = tuple(map(str, key))
        if words in self.rows:
            return
        self.rows[words] = dict(zip(self.keys, words, strict=True)) | {k: str(v) for k, v in work().items()}
        self.path.parent.mkdir(exist_ok=True)
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.fields)
            if new:
                writer.writeheader()
            writer.writerow(self.rows[words])


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


def fid(images: Tensor) -> float:
    """Frechet distance of images in [-1, 1], shape (n, 1, 28, 28), to Fashion-MNIST, in the packaged features."""
    reference = packaged_reference("fashion-mnist")
    shown = torch.from_numpy(to_uint8(images, (-1.0, 1.0))).movedim(-1, 1)
    own = Moments.of(open_features("fashion-mnist").of(shown.split(500))[0].double())
    return frechet_distance(own.mean, own.covariance, reference.mean, reference.covariance)


class Recorder(nn.Module):
    """A network that notes the number of rows of each of its calls."""

    def __init__(self, network: Callable[..., object]) -> None:
        super().__init__()
        self.network = network
        self.rows: list[int] = []

    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> object:
        """Calls the network on x with shape (B, *event) and t with shape (B,), noting B."""
        self.rows.append(len(x))
        return self.network(x, t, **cond)


def recorded(model: fastsde.ScoreModel) -> tuple[fastsde.ScoreModel, list[int]]:
    """The same model with a `Recorder` around its network, and the list it fills."""
    recorder, model = Recorder(model.network), copy.copy(model)
    model.network = recorder
    return model, recorder.rows


def timed(work: Callable[[], object]) -> float:
    """Wall time of one call, and of what it left to a GPU."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def keep_memory() -> None:
    """Has glibc keep freed memory: to get it again was a seventh of a forward on a CPU, of one loop and not the other.

    It is otherwise given back by where the heap happens to end.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for option, value in ((-1, (1 << 31) - 1), (-2, 1 << 28), (-3, 1 << 25)):  # trim, pad and map from how many on
            libc.mallopt(option, value)


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
