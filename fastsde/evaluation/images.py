"""Where images come from, and how floats become 8 bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fastsde.checks import check_finite
from fastsde.evaluation.jobs import MANIFEST, ShardedJob
from fastsde.files import ArrayFile, read_json
from fastsde.result import Status
from fastsde.training.data import holds_idx, load_images

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}


def to_uint8(samples: Tensor, data_range: tuple[float, float]) -> np.ndarray:
    """Rounds samples to 8 bits; truncation, as in the original evaluation code, would darken by half a level.

    Args:
        samples: with shape (n, C, H, W).
        data_range: (low, high), mapped to 0 and 255; values outside are cut.

    Returns:
        uint8 with shape (n, H, W, C).

    Raises:
        ValueError: if a sample is not finite, which has no level.
    """
    check_finite(samples, "samples")
    low, high = data_range
    levels = ((samples.double() - low) * (255 / (high - low))).round().clamp(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def image_grid(images: np.ndarray, columns: int = 8, gap: int = 2, width: int = 84) -> Image.Image:
    """A picture of the images in rows, enlarged in whole steps so that one is at least `width` pixels wide.

    Args:
        images: uint8 with shape (n, H, W, C), C being 1 or 3.
        columns: images in a row.
        gap: white pixels between images, before enlarging.
        width: pixels.
    """
    n, height, side, channels = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (side + gap) + gap, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (side + gap)
        sheet[top : top + height, left : left + side] = image
    scale = max(1, -(-width // side))
    picture = Image.fromarray(sheet[:, :, 0] if channels == 1 else sheet)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


@dataclasses.dataclass(frozen=True)
class Images:
    """A set of 8-bit images of one size, read in parts.

    Attributes:
        source: where they are.
        kind: what it is: "idx", "npz", "folder", "job", "datasets".
        n: how many.
        shape: (C, H, W).
        read: the images from one number up to another, uint8 with shape (k, C, H, W).
        unsuccessful: of a job, samples that did not reach the end (MAX_NFE, MIN_STEP), which are here all the same.
    """

    source: str
    kind: str
    n: int
    shape: tuple[int, int, int]
    read: Callable[[int, int], Tensor]
    unsuccessful: int = 0

    def batches(self, size: int = 500) -> Iterator[Tensor]:
        """The images in order, uint8 with shape (up to `size`, C, H, W)."""
        for start in range(0, self.n, size):
            yield self.read(start, min(start + size, self.n))


def open_images(source: str | Path, *, split: str = "train") -> Images:
    """Images of a folder of pictures (subfolders included), an .npz (ADM's arr_0, uint8 NHWC), a folder of IDX files, a
    job of `fastsde sample`, or a folder written by Hugging Face's `Dataset.save_to_disk`.

    Args:
        source: the file or folder.
        split: "train" or "test", for IDX files and data sets that have both.

    Raises:
        FileNotFoundError: if there is nothing there, or a job is not finished.
        ValueError: naming the file that is no image, of another size, damaged, or not 8 bits.
        ImportError: if a data set needs Hugging Face's `datasets` and it is not installed.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path} is neither a file nor a folder; no data set comes with fastsde.")
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return _from_datasets(path, split)
    if holds_idx(path):
        images, _ = load_images(path, train=split == "train")
        return _in_memory(str(path), f"idx {split}", images)
    if split != "train":
        raise ValueError(f"{path} has no splits; leave {split!r} out.")
    if not path.is_dir():
        return _from_npz(path)
    if (path / MANIFEST).is_file():
        return _from_job(path)
    if (path / "samples.npz").is_file():
        return _from_sample(path)
    return _from_folder(path)


def _in_memory(source: str, kind: str, images: Tensor) -> Images:
    n, channels, height, width = images.shape
    return Images(source, kind, n, (channels, height, width), lambda start, stop: images[start:stop])


def _channels_first(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def _from_npz(path: Path) -> Images:
    with ArrayFile(path) as file:
        if "arr_0" not in file.headers:
            raise ValueError(f"{path} has no arr_0; it has {', '.join(file.headers) or 'nothing'}.")
        images = file.read("arr_0")
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images) or images.shape[3] not in (1, 3):
        lost = images.dtype.kind == "f" and not np.isfinite(images).all()
        raise ValueError(
            f"{path}: arr_0 must hold 8-bit images (n, H, W, C), C being 1 or 3; it is {images.dtype} with shape "
            f"{images.shape}.{' Some values are not finite.' if lost else ''}"
        )
    return _in_memory(str(path), "npz", _channels_first(images))


def _from_sample(folder: Path) -> Images:
    """What `fastsde sample` wrote at once: all of it, or nothing is measured."""
    images, record = _from_npz(folder / "samples.npz"), folder / "samples.json"
    if record.is_file():
        n = read_json(record).get("n", images.n)
        if not isinstance(n, int):
            raise ValueError(f"{record} is damaged: n must be a whole number; got {n!r}.")
        if images.n < n:
            raise ValueError(f"{folder}: {n - images.n} of {n} samples are not finite or missing, and so not there.")
    return images


def _from_job(folder: Path) -> Images:
    job = ShardedJob.load(folder)
    there = job.there()
    if len(there) < job.shards:
        missing, first = job.shards - len(there), next(k for k in range(job.shards) if k not in there)
        raise FileNotFoundError(
            f"{folder} is not finished: {missing} of {job.shards} shards are missing, the first {first}. "
            "Run the command that began it again."
        )
    if not job.has_images():
        raise ValueError(f"{folder} holds tokens without images.")
    status = job.column("status")
    lost = int((status == Status.NON_FINITE).sum())
    if lost:
        raise ValueError(f"{folder}: {lost} of {job.n} samples are not finite, and so not there.")
    shape = job.read(0, "arr_0").shape[1:]

    def read(start: int, stop: int) -> Tensor:
        size, shards = job.shard_size, range(start // job.shard_size, (stop - 1) // job.shard_size + 1)
        parts = [job.read(k, "arr_0")[max(start - k * size, 0) : stop - k * size] for k in shards]
        return _channels_first(np.concatenate(parts))

    return Images(
        str(folder), "job", job.n, (shape[2], shape[0], shape[1]), read, int((status != Status.SUCCESS).sum())
    )


def _from_folder(folder: Path) -> Images:
    inside = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    files = sorted(folder / p for p in inside if not any(part.startswith(".") for part in p.parts))
    stray = [p for p in files if p.suffix.lower() not in SUFFIXES]
    if stray:
        raise ValueError(f"{folder} holds {stray[0].relative_to(folder)}, which is no image ({len(stray)} such files).")
    if not files:
        raise FileNotFoundError(f"{folder} holds no images.")
    names = list(map(str, files))
    return _of_one_size(str(folder), "folder", names, lambda start, stop: map(_picture, files[start:stop]))


def _of_one_size(
    source: str, kind: str, name: Sequence[str], pictures: Callable[[int, int], Iterable[np.ndarray]]
) -> Images:
    """Pictures (H, W, C) that are read when they are wanted, and must be as large as the first."""
    shape = next(iter(pictures(0, 1))).shape

    def read(start: int, stop: int) -> Tensor:
        found = list(pictures(start, stop))
        for k, picture in enumerate(found, start):
            if picture.shape != shape:
                raise ValueError(f"{name[k]} has shape {picture.shape}, {name[0]} has {shape}: sizes must agree.")
        return _channels_first(np.stack(found))

    return Images(source, kind, len(name), (shape[2], shape[0], shape[1]), read)


def _picture(path: Path) -> np.ndarray:
    """As `as_pixels`, of a file."""
    try:
        with Image.open(path) as image:
            return as_pixels(image)
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def as_pixels(image: Image.Image) -> np.ndarray:
    """uint8 with shape (H, W, C): grey images have one channel, all others become RGB.

    Raises:
        ValueError: if they have more than 8 bits, or are transparent somewhere: what is behind is not said.
    """
    if image.mode in ("LA", "RGBA", "PA") or "transparency" in image.info:
        if (np.array(image.convert("RGBA"))[:, :, 3] < 255).any():
            raise ValueError("it is transparent in places")
        image = image.convert("L" if image.mode == "LA" else "RGB")
    if image.mode in ("L", "1"):
        return np.array(image.convert("L"))[:, :, None]
    if image.mode not in ("RGB", "P", "CMYK", "YCbCr", "HSV", "LAB"):
        raise ValueError(f"it is not 8 bits a channel (mode {image.mode})")
    return np.array(image.convert("RGB"))


def _from_datasets(folder: Path, split: str) -> Images:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{folder} is a data set of Hugging Face: pip install datasets.") from error
    data = datasets.load_from_disk(str(folder))
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise ValueError(f"{folder} has the splits {', '.join(data)}; got {split!r}.")
        data = data[split]
    columns = [name for name, kind in data.features.items() if isinstance(kind, datasets.Image)]
    if len(columns) != 1:
        raise ValueError(f"{folder} must have one column of images; it has {columns or 'none'}.")
    name = [f"{folder}: image {k}" for k in range(len(data))]
    return _of_one_size(
        str(folder), f"datasets {split}", name, lambda start, stop: map(as_pixels, data[start:stop][columns[0]])
    )
