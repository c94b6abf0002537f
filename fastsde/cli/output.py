"""Writing results: checked before sampling, atomic after it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import fastsde
from fastsde.files import Content, write_together
from fastsde.result import SampleResult, SamplingError, Status


def prepare_folder(folder: Path, needed: int, option: str = "--out") -> None:
    """Makes sure that `folder` exists, can be written to, and has room for `needed` bytes, or says what is in the way.

    If the folders above it have to be made too, standard error says so: the path may be mistyped, or a disk missing.
    """
    probe = folder / f".fastsde.{os.getpid()}.tmp"
    try:
        missing = [part for part in (folder, *folder.parents) if not part.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        if len(missing) > 1:
            click.echo(f"{option} {folder}: {missing[-1]} was not there and is made, with what is below it.", err=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise click.ClickException(f"{option} {folder} cannot be written to: {error.strerror}.") from error
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise click.ClickException(f"{option} {folder} has {free >> 20} MiB free; about {needed >> 20} MiB are needed.")


def check_writable(path: Path | None, option: str = "--out") -> None:
    """Refuses a file that could not be written after all the work; None is none."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder; name a file.")
    prepare_folder(path.parent, needed=1 << 20, option=option)


def write_atomic(folder: Path, contents: Mapping[str, Content]) -> list[Path]:
    """Writes files that belong together, by their names, and returns their paths.

    If one cannot be written, a full disk included, none of them is, and an error names it.
    """
    files = {folder / name: content for name, content in contents.items()}
    try:
        write_together(files)
    except OSError as error:
        what = f"{error.filename or folder} was not written: {error.strerror or error}."
        raise click.ClickException(f"{what} The same command gives the same samples again.") from error
    return list(files)


def versions(*more: str) -> dict[str, str]:
    """Versions of everything that can change a sample, those of more packages included where they are installed."""
    found = {"fastsde": fastsde.__version__, "torch": torch.__version__, "numpy": np.__version__}
    for name in more:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found | {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}


def data_and_licence(title: str) -> dict[str, str]:
    """What a card says of the data, from "NAME; LICENCE"."""
    source, _, licence = title.partition(";")
    return {"data": source.strip() or "not stated", "licence": licence.strip() or "not stated"}


def result_record(result: SampleResult) -> dict[str, Any]:
    """What a record says of samples: totals, then lists with an entry for each."""
    nfe = result.nfe[result.status != Status.PENDING].double()
    return {
        "n": len(result.nfe),
        "finished": len(nfe),
        "status_counts": result.counts(),
        "outside_data_range": None if result.outside is None else int(result.outside.sum()),
        "mean_nfe": float(nfe.mean()) if len(nfe) else None,
        "seconds": round(result.seconds, 3),
        "seed": result.seed,
        "index": result.index.tolist(),
        "nfe": result.nfe.tolist(),
        "accepted": result.accepted.tolist(),
        "rejected": result.rejected.tolist(),
        "status": [Status(s).name for s in result.status.tolist()],
    }


def finished(draw: Callable[[], Any]) -> tuple[Any, bool]:
    """What a call has drawn, and whether it ended early; what is finished stays, after a failure and after Ctrl-C.

    That nothing was finished is an error.
    """
    failure = None
    try:
        drawn = draw()
    except SamplingError as error:
        failure, drawn = str(error), error.result
    except KeyboardInterrupt as interruption:
        failure, drawn = "interrupted", getattr(interruption, "result", None)
    result = getattr(drawn, "result", drawn)  # of a pipeline it has more than that
    if result is None or not (result.status != Status.PENDING).any():
        raise click.ClickException(f"{failure}; no sample was finished, and nothing was written.")
    if failure is not None:
        click.echo(f"Error: {failure}", err=True)
    return drawn, failure is not None


def tell(
    result: SampleResult,
    record: dict[str, Any],
    files: Sequence[Path | str],
    more: Sequence[str] = (),
    *,
    as_json: bool,
    failed: bool,
) -> None:
    """Prints the record or its summary, and ends the program with 1 if not all samples are there."""
    if as_json:
        click.echo(dump_json(record), nl=False)
    else:
        nfe, steps = result.nfe[result.status != Status.PENDING], int((result.accepted + result.rejected).sum())
        share = int(result.rejected.sum()) / max(steps, 1)
        click.echo(report(result.counts(), nfe.numpy(), share, f"in {result.seconds:.1f} s", more, files))
    if failed or not result.success.all():
        raise SystemExit(1)


def report(
    counts: Mapping[str, int],
    nfe: np.ndarray,
    rejected: float,
    where: str,
    more: Sequence[str],
    files: Sequence[Path | str],
) -> str:
    """The lines that a command ends with: what samples cost and how they ended, more lines, and the files."""
    n = sum(counts.values())
    lines = [f"{counts.get('SUCCESS', 0)} of {n} samples {where}"]
    if len(nfe):
        lines.append(
            f"network calls per sample: mean {nfe.mean():.1f}, least {nfe.min()}, most {nfe.max()}; "
            f"{rejected:.1%} of the steps rejected"
        )
    lines.extend(more)
    if counts != {"SUCCESS": n}:
        lines.append(f"not all succeeded: {counts}; see samples.json")
    return "\n".join([*lines, *(f"  {path}" for path in files)])


def dump_json(value: dict[str, Any]) -> str:
    """JSON text with short lists on one line each."""
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(item)}" for key, item in value.items())
    return f"{{\n{lines}\n}}\n"
