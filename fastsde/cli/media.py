"""Files that pipelines take and give: images, videos, sound, arrays, texts."""

from __future__ import annotations

import json
import re
import wave
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
from torch import Tensor

from fastsde.evaluation.images import SUFFIXES, image_grid, to_uint8
from fastsde.files import ArrayFile, Content, sha256

MADE = re.compile(r"\d{5,}(-\d+)?\.(png|webp|wav)|samples\.npz|latents\.npz|grid\.png")
"""Names of files that this module writes."""
_THUMBNAIL = 256
_WAVE = 32767


def read_value(text: str) -> tuple[Any, Any]:
    """An argument as written on a command line, and what a record says of it: the value, or names and SHA-256 of files.

    It is JSON, or else the text itself. With @ in front it is a file: an image, a video (.gif, a .webp that moves) or a
    folder of images as a list of images, an array as a tensor, a text. A file that cannot be read is named.
    """
    if not text.startswith("@"):
        try:
            value = json.loads(text, parse_constant=_no_number)
        except (ValueError, RecursionError):
            value = text
        return value, value
    path = Path(text[1:])
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
        if not files:
            raise ValueError(f"{path} holds no images ({', '.join(sorted(SUFFIXES))}).")
        return [_read(file, _still) for file in files], [_named(file) for file in files]
    if not path.is_file():
        raise ValueError(f"no file {path}. A text that begins with @ is written in quotes of its own: '\"@..\"'.")
    if path.suffix.lower() not in _READERS:
        allowed = ", ".join(sorted(_READERS))
        raise ValueError(f"{path} is none of the files that are read here: {allowed}, or a folder of images.")
    return _read(path, _READERS[path.suffix.lower()]), _named(path)


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no JSON.")


def _named(path: Path) -> dict[str, str]:
    return {"file": str(path), "sha256": sha256(path.read_bytes())}


def _read(path: Path, reader: Callable[[Path], Any]) -> Any:
    try:
        return reader(path)
    except (OSError, ValueError, TypeError, UnidentifiedImageError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _array(path: Path) -> Tensor:
    if path.suffix.lower() == ".npy":
        return torch.from_numpy(np.load(path, allow_pickle=False))
    if path.suffix.lower() == ".npz":
        with ArrayFile(path) as file:
            found = {name: torch.from_numpy(file.read(name)) for name in file.headers}
    else:
        found = safetensors.torch.load_file(path)
    if len(found) != 1:
        raise ValueError(f"it must hold one array; it holds {', '.join(found) or 'none'}")
    return next(iter(found.values()))


def _moving(path: Path) -> Any:
    """The frames of a video, or an image."""
    with Image.open(path) as image:
        frames = [_upright(frame) for frame in ImageSequence.Iterator(image)]
    return frames if len(frames) > 1 or path.suffix.lower() == ".gif" else frames[0]


def _still(path: Path) -> Image.Image:
    """The first image of a file; a photo may hold a second, smaller one."""
    with Image.open(path) as image:
        return _upright(image)


def _upright(image: Image.Image) -> Image.Image:
    """RGB, or RGBA if it is transparent somewhere, turned as its EXIF data say; more bits than 8 are refused."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise ValueError(f"it is not 8 bits a channel (mode {image.mode})")
    image = ImageOps.exif_transpose(image)
    if "A" in image.mode.upper() or "transparency" in image.info:
        whole = image.convert("RGBA")
        if whole.getchannel("A").getextrema() != (255, 255):
            return whole
    return image.convert("RGB")


_READERS: dict[str, Callable[[Path], Any]] = {
    **dict.fromkeys(SUFFIXES, _still),
    **dict.fromkeys((".gif", ".webp"), _moving),
    **dict.fromkeys((".npy", ".npz", ".safetensors"), _array),
    ".txt": lambda path: path.read_text(encoding="utf-8").rstrip("\n"),
}


class Media:
    """The files of samples, collected from what a pipeline returned for each.

    Args:
        rate: samples of sound in a second, or None if it is not known: then sound is an array.
        fps: frames of a video in a second.
        raw: leave arrays as they are, also where they are known to be videos or sound.

    Attributes:
        files: names of the files of each sample added.
        more: what else a sample's output says: fields that are texts, numbers or truth values.
        writers: for each file name, a function that writes to the path it is given.
    """

    def __init__(self, rate: int | None, fps: float, raw: bool) -> None:
        self.rate, self.fps, self.raw = rate, fps, raw
        self.files: list[list[str]] = []
        self.more: list[dict[str, Any]] = []
        self.writers: dict[str, Content] = {}
        self._stills: list[Image.Image] = []
        self._arrays: dict[str, dict[int, np.ndarray]] = {}

    def add(self, output: Any) -> None:
        """Takes what a pipeline's call returned for the next sample; None if it returned nothing."""
        self.files.append([])
        self.more.append({})
        for name, value in _fields(output).items():
            if value is not None:
                self._take(name, _alone(value))

    def _take(self, name: str, value: Any) -> None:
        place = len(self.files) - 1
        stem = f"{place:05d}"
        if isinstance(value, Image.Image) and value.mode == "F":  # which PNG has not
            value = np.asarray(value)
        if isinstance(value, Image.Image):
            self._add(f"{stem}.png", value.save, value)
        elif are_images(value) and name in ("frames", "videos", "video"):
            self._add(f"{stem}.webp", partial(write_video, frames=value, fps=self.fps), value[0])
        elif are_images(value):
            for k, image in enumerate(value):
                self._add(f"{stem}-{k}.png", image.save, image)
        elif (array := _as_array(value)) is not None:
            known = not self.raw and array.dtype.kind == "f" and bool(np.isfinite(array).all())
            if known and name == "frames" and array.ndim == 4 and array.shape[-1] == 3:
                frames = to_uint8(torch.from_numpy(array).movedim(-1, 1), (0.0, 1.0))
                self._take(name, _alone([Image.fromarray(frame) for frame in frames]))
            elif known and name in ("audios", "audio", "sound") and array.ndim in (1, 2) and self.rate:
                self._add(f"{stem}.wav", partial(write_wave, sound=array, rate=self.rate))
            else:
                self._arrays.setdefault(name, {})[place] = array
                self.files[place].append("samples.npz")
        else:
            self.more[place][name] = value if _is_json(value) else f"a {type(value).__name__}, which is not kept"

    def _add(self, name: str, writer: Content, still: Image.Image | None = None) -> None:
        """A file of the last sample; `still` stands for it in grid.png if it is the sample's first."""
        self.writers[name] = writer
        if still is not None and not self.files[-1]:
            self._stills.append(still)
        self.files[-1].append(name)

    def finish(self) -> dict[str, Content]:
        """The writers of all files: those of the samples, grid.png and samples.npz where there is what they show."""
        if self._stills:
            stills = [image.convert("RGB") for image in self._stills[:64]]
            for image in stills:
                image.thumbnail((_THUMBNAIL, _THUMBNAIL))
            sheet = np.stack([np.asarray(image) for image in stills if image.size == stills[0].size])
            self.writers["grid.png"] = image_grid(sheet, columns=min(len(sheet), 8)).save
        if self._arrays:
            arrays: dict[str, Any] = {}
            for name, of in self._arrays.items():
                if len({(a.shape, a.dtype) for a in of.values()}) == 1:
                    arrays |= {name: np.stack(list(of.values())), f"{name}_index": np.array(list(of))}
                else:
                    arrays |= {f"{name}_{place:05d}": array for place, array in of.items()}
            self.writers["samples.npz"] = arrays
        return self.writers


def write_video(path: Path, frames: Sequence[Image.Image], fps: float) -> None:
    """An animated WebP of images of one size."""
    first, *rest = (frame.convert("RGB") for frame in frames)
    first.save(path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, quality=90)


def write_wave(path: Path, sound: np.ndarray, rate: int) -> None:
    """A WAV file of 16 bits, from floats in [-1, 1] with shape (T,) or (channels, T); what is beyond is cut."""
    levels = np.round(np.clip(np.atleast_2d(sound), -1, 1) * _WAVE).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(levels))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(levels.T.tobytes())


def _fields(output: Any) -> dict[str, Any]:
    if isinstance(output, Mapping):
        return dict(output)
    return dict(vars(output)) if hasattr(output, "__dataclass_fields__") else {"output": output}


def _alone(value: Any) -> Any:
    """What stands in lists of one: a pipeline's call makes one sample."""
    while isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    return value


def are_images(value: Any) -> bool:
    """Whether it is a list of images."""
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(v, Image.Image) for v in value)


def _as_array(value: Any) -> np.ndarray | None:
    """The array of a sample, without the axis of the batch of one; None if it is none."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, (np.ndarray, Tensor)) for v in value):
        parts = [_as_array(v) for v in value]
        same = len({part.shape for part in parts if part is not None}) == 1
        return np.stack([part for part in parts if part is not None]) if same else None
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if not isinstance(value, np.ndarray) or value.dtype.hasobject:
        return None
    return value[0] if value.ndim > 1 and len(value) == 1 else value


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
