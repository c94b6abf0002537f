"""Sampling jobs that survive: shards on disk, each written whole or not at all, and a manifest of what they are."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsde.checks import check_count
from fastsde.control import Controller
from fastsde.evaluation.claims import make_here
from fastsde.files import ArrayFile, as_json, clear, differences, json_hash, json_text, read_json, write_first
from fastsde.result import SampleResult, Status

MANIFEST = "manifest.json"
HASH = "manifest_sha256"
"""The array of a shard that says which job it is of."""
TOKENS = "tokens"
OF_WHOLE = ("arr_0", "arr_1", TOKENS)
"""Arrays with a row for each sample that is whole, where others have one for each sample."""


MakeAll = Callable[[Callable[[], Iterable[Path]], Callable[[Path], tuple[Any, Iterable[Path]]]], Iterator[Path]]
"""Has others make the files that are pending, from what they are told of each and the files that it needs; yields what
is made. `RayWorkers.make_all` does so."""


def check_settings(folder: Path, name: str, settings: Mapping[str, Any]) -> None:
    """Makes a folder one's own: writes the settings to a file in it, or compares them with those that are there.

    Args:
        folder: created if needed.
        name: of the file.
        settings: JSON values.

    Raises:
        ValueError: if the folder has other settings, naming them, or files of something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, settings = folder / name, as_json(settings)
    if not path.is_file():
        others = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        if others and not path.is_file():  # another process may just have written it
            raise ValueError(
                f"{folder} has no {name}, but {others[0]}: it is of something else. Choose another folder."
            )
        write_first(path, json_text(settings))
    if found := differences(read_json(path), settings):
        raise ValueError(f"{folder} was begun with other settings ({found}). Choose another folder, or delete it.")


@dataclasses.dataclass(frozen=True)
class ShardedJob:
    """n samples in shards: shard k holds the samples k s .. min((k + 1) s, n) - 1 of the seed's stream.

    A shard is one .npz, which exists whole or not at all, and depends on nothing but the settings: so it does not
    matter who draws it, when, or how often the job was killed. It carries the hash of the manifest, by which a shard of
    another job is known.

    Attributes:
        folder: where the shards are.
        n: samples in all.
        shard_size: samples in a shard, s.
        settings: everything that determines the samples, as JSON values; `image_shape`, (H, W, C), may be among them.
    """

    folder: Path
    n: int
    shard_size: int
    settings: Mapping[str, Any]

    @classmethod
    def begin(cls, folder: Path, n: int, shard_size: int, settings: Mapping[str, Any]) -> ShardedJob:
        """Begins a job, or goes on with the one in the folder, after checking the shards that are there.

        Raises:
            ValueError: if the folder holds a job with other settings, naming them, files of something else, or a shard
                that is not this job's, naming it.
        """
        check_count("n", n, 1)
        check_count("shard_size", shard_size, 1)
        job = cls(folder, n, shard_size, as_json(settings))
        check_settings(folder, MANIFEST, job._manifest())
        job.check()
        return job

    @classmethod
    def load(cls, folder: Path) -> ShardedJob:
        """The job of a folder, after checking the shards that are there.

        Raises:
            ValueError: if the manifest is damaged, or a shard is not this job's.
        """
        stored = read_json(folder / MANIFEST)
        try:
            n, shard_size = (check_count(name, stored.pop(name, None), 1) for name in ("n", "shard_size"))
        except ValueError as error:
            raise ValueError(f"{folder / MANIFEST} is damaged: {error}") from error
        job = cls(folder, n, shard_size, stored)
        job.check()
        return job

    def _manifest(self) -> dict[str, Any]:
        return {"n": self.n, "shard_size": self.shard_size, **self.settings}

    def _hash(self) -> str:
        return json_hash(self._manifest())

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

    def drawn(self) -> int:
        """Number of samples that are there."""
        return sum(len(self.indices(k)) for k in self.there())

    def pending(self, rank: int = 0, world_size: int = 1) -> list[Path]:
        """Files of shards still to draw: first every `world_size`-th from `rank` on, then the others from the last on.

        So a process begins with shards of its own, and comes last to those that others will need last.
        """
        there = self.there()
        left = [k for k in range(self.shards) if k not in there]
        own = [k for k in left if k % world_size == rank]
        others = [k for k in reversed(left) if k % world_size != rank]
        return [self.path(k) for k in own + others]

    def number(self, path: Path) -> int:
        """The number of the shard that a file is."""
        return int(path.stem.partition("-")[2])

    def whole(self, k: int, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All that is in the file of shard k: what was drawn, sample numbers, and the hash of the manifest."""
        return {**arrays, "index": np.array(self.indices(k)), HASH: np.array(self._hash())}

    def run(
        self,
        draw: Callable[[range], Mapping[str, np.ndarray]],
        *,
        rank: int = 0,
        world_size: int = 1,
        make_all: MakeAll | None = None,
    ) -> Iterator[int]:
        """Draws what is pending and unclaimed; yields the number of each shard once it is on the disk.

        Args:
            draw: the arrays of a shard, from its sample numbers, as `shard_arrays` makes them: `arr_0`, uint8 with the
                images that are there, and others with a whole number for each sample.
            rank: which process this is, for the shards that it begins with.
            world_size: how many share the job. None waits for another that is alive.
            make_all: has others make the files, from the numbers of shards; `draw` is then not called.
        """
        pending = partial(self.pending, rank, world_size)
        if make_all is None:
            made = make_here(pending, lambda path: self.whole(k := self.number(path), draw(self.indices(k))))
        else:
            made = make_all(pending, lambda path: (self.number(path), ()))
        yield from map(self.number, made)
        if not self.pending():
            clear(self.folder)

    def check(self) -> None:
        """Compares the shards that are there with the job, by their headers and small arrays: no image is read.

        Raises:
            ValueError: naming the first file that is not this job's, and what is wrong with it.
        """
        event = self.settings.get("image_shape")
        for k in sorted(self.there()):
            with self._opened(k) as file:
                event = self._check(k, file, event)

    def there(self) -> set[int]:
        """The numbers of the shards in the folder."""
        matches = (re.fullmatch(r"samples-(\d{5,})\.npz", name) for name in os.listdir(self.folder))
        return {int(match[1]) for match in matches if match}

    @contextlib.contextmanager
    def _opened(self, k: int) -> Iterator[ArrayFile]:
        try:
            with ArrayFile(self.path(k)) as file:
                yield file
        except ValueError as error:
            raise ValueError(f"{error} Delete it and run the job again.") from error

    def _check(self, k: int, file: ArrayFile, event: list[int] | None) -> list[int] | None:
        """The image shape (H, W, C) of shard k, None of tokens alone; a ValueError if it is not shard k of this job."""
        if wrong := self._fault(k, file, event):
            raise ValueError(f"{file.path} is not shard {k} of this job: {wrong}.")
        return list(file.headers["arr_0"][0][1:]) if "arr_0" in file.headers else None

    def _fault(self, k: int, file: ArrayFile, event: list[int] | None) -> str | None:
        """What is wrong with a file as shard k, or None."""
        numbers = self.indices(k)
        if not numbers:
            return f"the job has {self.shards} shards, 0 to {self.shards - 1}"
        if HASH not in file.headers:
            return "it does not say of which job it is, so an earlier version wrote it, or something else"
        if str(file.read(HASH)) != self._hash():
            return f"it is of a job with other settings than {MANIFEST} has"
        rows = {name: shape[0] if shape else None for name, (shape, _) in file.headers.items() if name != HASH}
        if "index" not in rows or not {"arr_0", TOKENS} & rows.keys():
            return "it has no images or no index"
        whole = {name: file.headers[name] for name in rows if name not in OF_WHOLE}
        for name, (shape, kind) in whole.items():
            if shape != (len(numbers),) or kind.kind not in "iu":
                return f"its {name} is {kind} with shape {shape}, not whole numbers with shape ({len(numbers)},)"
        if file.read("index").tolist() != list(numbers):
            return f"it holds other samples than {numbers[0]} to {numbers[-1]}"
        lost = int((file.read("status") == Status.NON_FINITE).sum()) if "status" in whole else 0
        for name in rows.keys() - whole.keys():
            if rows[name] != len(numbers) - lost:
                return f"its {name} has {rows[name]} rows, not one for each of {len(numbers) - lost} finite samples"
        if "arr_0" in rows:
            shape, kind = file.headers["arr_0"]
            if kind != np.uint8 or len(shape) != 4 or list(shape[1:]) != (event or list(shape[1:])):
                wanted = f"{tuple(event)}" if event else "(H, W, C)"
                return f"its images are {kind} with shape {shape[1:]}, not uint8 with shape {wanted}"
        return None

    def read(self, k: int, name: str) -> np.ndarray:
        """An array of shard k.

        Raises:
            ValueError: if the file is damaged or not this job's; deleting it makes the job draw it again.
        """
        with self._opened(k) as file:
            self._check(k, file, self.settings.get("image_shape"))
            return file.read(name)

    def has_images(self) -> bool:
        """Whether shards hold images, as all do but those of tokens without a code book; the first must be there."""
        with self._opened(0) as file:
            return "arr_0" in file.headers

    def first(self, count: int) -> np.ndarray:
        """The first images, of as many shards as that takes, with shape (up to `count`, H, W, C)."""
        parts: list[np.ndarray] = []
        for k in range(self.shards):
            parts.append(self.read(k, "arr_0"))
            if sum(map(len, parts)) >= count:
                break
        return np.concatenate(parts)[:count]

    def column(self, name: str) -> np.ndarray:
        """One number per sample, of all shards, with shape (n,)."""
        return np.concatenate([self.read(k, name) for k in range(self.shards)])


def controller_record(controller: Controller | None) -> dict[str, Any]:
    """What tells a grid or a rule of steps from another one: its text, and the times of a grid."""
    return {"grid": None} if controller is None else controller.record()


def whole_arrays(
    result: SampleResult, images: Callable[[Tensor], np.ndarray] | None, labels: Tensor | None
) -> dict[str, np.ndarray]:
    """The samples that are whole: images, labels and tokens.

    Args:
        result: the samples.
        images: from finite samples, or tokens without a mask, with shape (k, *event), to uint8 with shape (k, H, W, C);
            None for tokens that are no images.
        labels: with shape (n,), or None.

    Returns:
        `arr_0` and, with labels, `arr_1`, as ADM's suite names them; `tokens` of tokens.
    """
    whole, is_tokens = whole_samples(result), not result.samples.is_floating_point()
    arrays = {} if images is None else {"arr_0": images(result.samples[whole])}
    arrays |= {TOKENS: result.samples[whole].cpu().numpy()} if is_tokens else {}
    return arrays if labels is None else arrays | {"arr_1": labels[whole.cpu()].numpy()}


def whole_samples(result: SampleResult) -> Tensor:
    """Which samples are there, neither missing nor lost nor with a mask left; booleans with shape (n,)."""
    values = result.samples.flatten(1)
    return (torch.isfinite(values) if values.is_floating_point() else values >= 0).all(1)


def shard_arrays(
    result: SampleResult, images: Callable[[Tensor], np.ndarray] | None, labels: Tensor | None
) -> dict[str, np.ndarray]:
    """The arrays of a shard: `whole_arrays`, and what each sample cost.

    Returns:
        Also `index`, `nfe`, `accepted`, `rejected` and `status` of every sample.

    Raises:
        KeyboardInterrupt: if sampling was interrupted: a part of a shard is none.
    """
    if (result.status == Status.PENDING).any():
        raise KeyboardInterrupt
    return whole_arrays(result, images, labels) | {
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
