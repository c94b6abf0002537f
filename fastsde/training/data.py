"""Reading image data sets in the IDX format of MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: str | Path) -> np.ndarray:
    """Reads one IDX file, gzipped or not (http://yann.lecun.com/exdb/mnist/, "the IDX file format").

    Raises:
        ValueError: if the file is not IDX or is shorter than its header says.
    """
    path = Path(path)
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _DTYPES:
        raise ValueError(f"{path} is not an IDX file: it starts with {raw[:4].hex() or 'nothing'}.")
    dtype, rank = np.dtype(_DTYPES[raw[2]]), raw[3]
    shape = tuple(np.frombuffer(raw, ">u4", rank, offset=4).tolist())
    start, count = 4 + 4 * rank, math.prod(shape)
    if len(raw) != start + count * dtype.itemsize:
        raise ValueError(f"{path} is damaged: its header promises shape {shape}, it holds {len(raw)} bytes.")
    return np.frombuffer(raw, dtype, count, offset=start).reshape(shape)


def load_images(folder: str | Path, *, train: bool = True) -> tuple[Tensor, Tensor]:
    """Images and labels of a torchvision-style folder with `train-images-idx3-ubyte[.gz]` and its companions.

    Args:
        folder: where the four IDX files lie; also the root that torchvision's data sets take, with NAME/raw below it.
        train: the training split, or else the test split (`t10k`).

    Returns:
        uint8 images with shape (N, 1, H, W) and int64 labels with shape (N,).

    Raises:
        FileNotFoundError: naming the file looked for.
        ValueError: if images and labels do not match, or there are several data sets.
    """
    split = "train" if train else "t10k"
    images, labels = (
        read_idx(_find(Path(folder), f"{split}-{name}")) for name in ("images-idx3-ubyte", "labels-idx1-ubyte")
    )
    fits = labels.ndim == 1 and len(images) == len(labels) and labels.dtype.kind in "iu"
    if images.ndim != 3 or not len(images) or images.dtype != np.uint8 or not fits:
        raise ValueError(
            f"{folder}: expected 8-bit images (N, H, W), N >= 1, and as many whole labels; "
            f"got {images.dtype} {images.shape} and {labels.dtype} {labels.shape}."
        )
    return torch.from_numpy(images.copy())[:, None], torch.from_numpy(labels.astype(np.int64))


def load_test_images(folder: str | Path, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The test split, as `load_images`, after comparing it with the training split.

    Raises:
        FileNotFoundError, ValueError: as `load_images`; or if it has other image sizes or classes.
    """
    test_images, test_labels = load_images(folder, train=False)
    if test_images.shape[1:] != images.shape[1:] or test_labels.min() < 0 or test_labels.max() > labels.max():
        raise ValueError(f"{folder}: the test split has other image sizes or classes than the training split.")
    return test_images, test_labels


def _find(folder: Path, stem: str) -> Path:
    for places in ([folder], [folder / "raw"], sorted(folder.glob("*/raw"))):
        there = [place / name for place in places for name in (f"{stem}.gz", stem) if (place / name).is_file()]
        if len({path.parent for path in there}) > 1:
            raise ValueError(f"{folder} holds several data sets: {there[0].parent} and {there[-1].parent}. Choose one.")
        if there:
            return there[0]
    raise FileNotFoundError(
        f"{folder / stem}[.gz] not found: give the folder of the four IDX files. No data set comes with fastsde."
    )


def holds_idx(path: Path) -> bool:
    """Whether a folder, or raw/ or NAME/raw below it, has IDX files."""
    return any(list(path.glob(f"{below}*-ubyte*")) for below in ("", "raw/", "*/raw/"))


def to_unit_range(images: Tensor) -> Tensor:
    """8-bit images to float32 in [-1, 1]: 0 becomes -1 and 255 becomes 1."""
    return images.float() / 127.5 - 1.0
