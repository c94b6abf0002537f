"""Sampling jobs that survive: shards on disk, each written whole or not at all, and a manifest of what they are."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsde.control import AdaptiveGrid, Controller, Grid
from fastsde.pretrained import read_json
from fastsde.result import SampleResult, Status

MANIFEST = "manifest.json"
UNREADABLE = (zipfile.BadZipFile, zlib.error, ValueError, KeyError, TypeError, AttributeError, OSError, EOFError)
"""What numpy raises for files that are no whole .npz of plain arrays."""


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that appears under its name only when it is whole and on the disk.

    Processes that write the same file have temporary names of their own.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except FileNotFoundError:
        if not path.is_file():  # see `clear`
            raise
    finally:
        temporary.unlink(missing_ok=True)


def clear(folder: Path) -> None:
    """Removes what killed processes left half-written in a folder that is complete.

    A process that is just writing what is there already may lose its temporary file by this, and then is content with
    what is there.
    """
    for pattern in (".*.tmp", ".*.first"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def claim(folder: Path, name: str, settings: Mapping[str, Any]) -> None:
    """Makes a folder one's own: writes the settings to a file in it, or compares them with those that are there.

    Args:
        folder: created if needed.
        name: of the file.
        settings: JSON values.

    Raises:
        ValueError: if the folder has other settings, naming them, or files of something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, settings = folder / name, json.loads(json.dumps(dict(settings)))
    if not path.is_file():
        others = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        if others and not path.is_file():  # another process may just have written it
            raise ValueError(
                f"{folder} has no {name}, but {others[0]}: it is of something else. Choose another folder."
            )
        _write_first(path, (json.dumps(settings, indent=1) + "\n").encode())
    stored = read_json(path)
    changed = sorted(key for key in stored.keys() | settings.keys() if stored.get(key) != settings.get(key))
    if changed:
        pairs = "; ".join(
            f"{key}: {_short(stored.get(key))} there, {_short(settings.get(key))} here" for key in changed
        )
        raise ValueError(f"{folder} was begun with other settings ({pairs}). Choose another folder, or delete it.")


def _write_first(path: Path, content: bytes) -> None:
    """As `write_whole`, unless another process has written the file in between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.first")
    write_whole(temporary, content)
    try:
        os.link(temporary, path)  # fails if it exists, which replacing it would not
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class ShardedJob:
    """n samples in shards: shard k holds the samples k s .. min((k + 1) s, n) - 1 of the seed's stream.

    A shard is one .npz, which exists whole or not at all, and depends on nothing but the settings: so it does not
    matter who draws it, when, or how often the job was killed.

    Attributes:
        folder: where the shards are.
        n: samples in all.
        shard_size: samples in a shard, s.
        settings: everything that determines the samples, as JSON values.
    """

    folder: Path
    n: int
    shard_size: int
    settings: Mapping[str, Any]

    @classmethod
    def begin(cls, folder: Path, n: int, shard_size: int, settings: Mapping[str, Any]) -> ShardedJob:
        """Begins a job, or goes on with the one in the folder.

        Raises:
            ValueError: if the folder holds a job with other settings, naming them, or files of something else.
        """
        job = cls(folder, n, shard_size, json.loads(json.dumps(dict(settings))))
        claim(folder, MANIFEST, job._manifest())
        return job

    @classmethod
    def load(cls, folder: Path) -> ShardedJob:
        """The job of a folder.

        Raises:
            ValueError: if the manifest is damaged.
        """
        stored = read_json(folder / MANIFEST)
        if not (isinstance(stored.get("n"), int) and isinstance(stored.get("shard_size"), int)):
            raise ValueError(f"{folder / MANIFEST} is damaged: n and shard_size must be whole numbers.")
        return cls(folder, stored.pop("n"), stored.pop("shard_size"), stored)

    def _manifest(self) -> dict[str, Any]:
        return {"n": self.n, "shard_size": self.shard_size, **self.settings}

    @property
    def shards(self) -> int:
        """How many shards there are in all."""
        return -(-self.n // self.shard_size)

    def indices(self, k: int) -> range:
        """Sample numbers of shard k."""
        return range(k * self.shard_size, min((k + 1) * self.shard_size, self.n))

    def path(self, k: int) -> Path:
        """The file of shard k."""
        return self.folder / f"samples-{k:05d}.npz"

    def pending(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """Shards still to draw, of those that fall to a process: every `world_size`-th from `rank` on."""
        return [k for k in range(rank, self.shards, world_size) if not self.path(k).is_file()]

    def run(
        self, draw: Callable[[range], Mapping[str, np.ndarray]], *, rank: int = 0, world_size: int = 1
    ) -> Iterator[int]:
        """Draws what is pending; yields the number of samples of each shard once it is on the disk.

        Args:
            draw: the arrays of a shard, from its sample numbers: `arr_0` with the images that are there, and others.
            rank: which process this is.
            world_size: how many share the job. None waits for another.
        """
        for k in self.pending(rank, world_size):
            arrays = draw(self.indices(k))
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
            write_whole(self.path(k), buffer.getvalue())
            yield len(self.indices(k))
        if not self.pending():
            clear(self.folder)

    def read(self, k: int, *names: str) -> dict[str, np.ndarray]:
        """The arrays of shard k, or those of them that are named.

        Raises:
            ValueError: if the file is damaged; deleting it makes the job draw it again.
        """
        try:
            with np.load(self.path(k), allow_pickle=False) as file:
                arrays = {name: file[name] for name in names or file.files}
                index = file["index"] if "index" in file.files else None
        except UNREADABLE as error:
            raise ValueError(f"{self.path(k)} is damaged: {error}. Delete it and run the job again.") from error
        if index is not None and index.tolist() != list(self.indices(k)):
            raise ValueError(f"{self.path(k)} holds other samples than shard {k}. Delete it and run the job again.")
        return arrays

    def first(self, count: int) -> np.ndarray:
        """The first images, of as many shards as that takes, with shape (up to `count`, H, W, C)."""
        parts: list[np.ndarray] = []
        for k in range(self.shards):
            parts.append(self.read(k, "arr_0")["arr_0"])
            if sum(map(len, parts)) >= count:
                break
        return np.concatenate(parts)[:count]

    def column(self, name: str) -> np.ndarray:
        """One number per sample, of all shards, with shape (n,)."""
        return np.concatenate([self.read(k, name)[name] for k in range(self.shards)])


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def controller_record(controller: Controller | None) -> dict[str, Any]:
    """What tells a grid or a rule of steps from another one: its text, and the times of a grid."""
    times: dict[str, Any] = {"grid_times": controller.times.tolist()} if isinstance(controller, Grid) else {}
    if isinstance(controller, AdaptiveGrid):
        times = {"grid_times": [grid.times.tolist() for grid in controller.grids]}
    return {"grid": None if controller is None else repr(controller), **times}


def shard_arrays(
    result: SampleResult, images: Callable[[Tensor], np.ndarray], labels: Tensor | None
) -> dict[str, np.ndarray]:
    """The arrays of a shard, or of samples.npz: images and labels of the samples that are whole, costs of all.

    Args:
        result: the samples.
        images: from finite samples with shape (k, *event) to uint8 with shape (k, H, W, C).
        labels: with shape (n,), or None.

    Returns:
        `arr_0` and, with labels, `arr_1`, as ADM's suite names them; `index`, `nfe`, `accepted`, `rejected` and
        `status` of every sample.

    Raises:
        KeyboardInterrupt: if sampling was interrupted: a part of a shard is none.
    """
    if (result.status == Status.PENDING).any():
        raise KeyboardInterrupt
    whole = torch.isfinite(result.samples.flatten(1)).all(1)
    arrays = {"arr_0": images(result.samples[whole])}
    if labels is not None:
        arrays["arr_1"] = labels[whole.cpu()].numpy()
    return arrays | {
        name: getattr(result, name).cpu().numpy() for name in ("index", "nfe", "accepted", "rejected", "status")
    }


def processes(rank: int | None, world_size: int | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """Which process of how many this is: as given, or as `torchrun` and `accelerate launch` say in RANK and WORLD_SIZE.

    Raises:
        ValueError: if one is missing or rank is not below world_size.
    """
    if (rank is None) != (world_size is None):
        raise ValueError("--rank and --world-size go together.")
    if rank is None or world_size is None:
        try:
            rank, world_size = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
        except ValueError as error:
            raise ValueError(f"RANK and WORLD_SIZE in the environment must be whole numbers: {error}") from error
    if world_size < 1:
        raise ValueError(f"--world-size must be at least 1; got {world_size}.")
    if not 0 <= rank < world_size:
        raise ValueError(f"--rank must be in 0 .. {world_size - 1}; got {rank}.")
    return rank, world_size
