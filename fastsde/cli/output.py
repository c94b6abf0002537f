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
from PIL import Image
from torch import Tensor

import fastsde


def prepare_folder(folder: Path, needed: int) -> None:
    """Makes sure that `folder` exists, can be written to, and has room for `needed` bytes.

    Raises:
        click.ClickException: saying what stands in the way.
    """
    probe = folder / ".fastsde.tmp"
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
    pairs = [(folder / f".{Path(name).stem}.tmp{Path(name).suffix}", folder / name) for name in writers]
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


def to_uint8(samples: Tensor, data_range: tuple[float, float]) -> np.ndarray:
    """Rounds samples to 8 bits.

    Args:
        samples: with shape (n, C, H, W), without NaN.
        data_range: (low, high), mapped to 0 and 255; values outside are cut.

    Returns:
        uint8 with shape (n, H, W, C).
    """
    low, high = data_range
    levels = ((samples.double() - low) * (255 / (high - low))).round().clamp(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def image_grid(images: np.ndarray, columns: int = 8, gap: int = 2) -> Image.Image:
    """A picture of the images in rows of `columns`, enlarged in whole steps so that one is at least 84 pixels wide.

    Args:
        images: uint8 with shape (n, H, W, C), C being 1 or 3.
        columns: images in a row.
        gap: white pixels between images, before enlarging.
    """
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    scale = max(1, -(-84 // width))
    picture = Image.fromarray(sheet[:, :, 0] if channels == 1 else sheet)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def versions() -> dict[str, str]:
    """Versions of everything that can change a sample."""
    found = {"fastsde": fastsde.__version__, "torch": torch.__version__, "numpy": np.__version__}
    return found | {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}


def dump_json(value: dict[str, Any]) -> str:
    """JSON text with short lists on one line each."""
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(item)}" for key, item in value.items())
    return f"{{\n{lines}\n}}\n"
