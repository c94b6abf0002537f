"""Writing results: checked before sampling, atomic after it."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import fastsde


def prepare_folder(folder: Path, needed: int) -> None:
    """Makes sure that `folder` exists, can be written to, and has room for `needed` bytes.

    Raises:
        click.ClickException: saying what stands in the way.
    """
    probe = folder / f".fastsde.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise click.ClickException(f"--out {folder} cannot be written to: {error.strerror}.") from error
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise click.ClickException(f"--out {folder} has {free >> 20} MiB free; about {needed >> 20} MiB are needed.")


def write_atomic(folder: Path, writers: dict[str, Callable[[Path], object]]) -> list[Path]:
    """Writes files that belong together: all of them whole under temporary names first, then renamed.

    Args:
        folder: where they go.
        writers: for each file name, a function that writes to the path it is given.

    Returns:
        The files' paths.

    Raises:
        click.ClickException: if one cannot be written, a full disk included; then none of them is.
    """
    pairs = [(folder / f".{Path(name).stem}.{os.getpid()}.tmp{Path(name).suffix}", folder / name) for name in writers]
    try:
        for (temporary, _), write in zip(pairs, writers.values(), strict=True):
            write(temporary)
        for temporary, path in pairs:
            os.replace(temporary, path)
    except OSError as error:
        raise click.ClickException(
            f"{folder} was not written: {error.strerror or error}. The same command gives the same samples again."
        ) from error
    finally:
        for temporary, _ in pairs:
            temporary.unlink(missing_ok=True)
    return [path for _, path in pairs]


def versions() -> dict[str, str]:
    """Versions of everything that can change a sample."""
    found = {"fastsde": fastsde.__version__, "torch": torch.__version__, "numpy": np.__version__}
    return found | {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}


def dump_json(value: dict[str, Any]) -> str:
    """JSON text with short lists on one line each."""
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(item)}" for key, item in value.items())
    return f"{{\n{lines}\n}}\n"
