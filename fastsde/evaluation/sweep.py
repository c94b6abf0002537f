"""Solvers x tolerances or budgets x seeds on one model, a cell at a time, each on the disk when it is done."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsde import api
from fastsde.checkpoints import PackagedModel
from fastsde.control import Controller
from fastsde.evaluation.claims import make_here
from fastsde.evaluation.features import Features
from fastsde.evaluation.images import open_images, to_uint8
from fastsde.evaluation.jobs import HASH, MakeAll, ShardedJob, check_settings, controller_record, shard_arrays
from fastsde.evaluation.measure import measure
from fastsde.evaluation.reference import Reference
from fastsde.evaluation.statistics import fewest
from fastsde.files import Content, as_json, clear, csv_text, json_hash, json_text, npz_bytes, read_json, write_whole
from fastsde.result import Status
from fastsde.score.base import ScoreModel
from fastsde.solvers import Solver
from fastsde.tokens import TokenModel

RESULT = "result.json"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One entry of the sweep: a solver, what bounds its calls, a seed.

    Attributes:
        solver: the solver.
        label: what to call it, for instance "ExponentialPC:eta=1".
        nfe: budget of network calls; or None.
        rtol: relative tolerance; or None.
        seed: the seed of the noise.
        controller: a grid or rule of its own in place of the solver's; `nfe` and `rtol` are then for the record alone.
    """

    solver: Solver
    label: str
    nfe: int | None
    rtol: float | None
    seed: int
    controller: Controller | None = None

    @property
    def setting(self) -> str:
        """What bounds the calls, in words."""
        return f"nfe {self.nfe}" if self.nfe is not None else f"rtol {self.rtol:g}"

    @property
    def name(self) -> str:
        """A name that a folder may have."""
        return re.sub(r"[^A-Za-z0-9.=_-]+", "-", f"{self.label}-{self.setting}-seed{self.seed}")


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is swept.

    Attributes:
        model: a score model, with event shape (C, H, W) of images or that of latents; or a token model.
        features: the feature network.
        reference: statistics of the data.
        record: where the model is from, with the hash of its weights; part of every cell's settings.
        classes: labels, which samples take in turn; 0 for none.
        decode: images in [-1, 1] of a batch of tokens; of score models the model itself decodes, if it does.
    """

    model: ScoreModel | TokenModel
    features: Features
    reference: Reference
    record: Mapping[str, Any]
    classes: int = 0
    decode: Callable[[Tensor], Tensor] | None = None

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W) of images, which of latent and token models are not the samples."""
        if self.decode is not None:
            one = torch.zeros(1, *(self.model.event_shape or ()), dtype=torch.int64)
            return tuple(self.decode(one).shape[1:])
        return self.model.image_shape if isinstance(self.model, PackagedModel) else self.model.event_shape or ()

    def images(self, x: Tensor) -> np.ndarray:
        """Samples in 8 bits, decoded if they are latents or tokens, with shape (n, H, W, C)."""
        if self.decode is not None:
            return to_uint8(self.decode(x), (-1.0, 1.0))
        if isinstance(self.model, PackagedModel):
            return to_uint8(self.model.decode(x), self.model.image_range)
        return to_uint8(x, (-1.0, 1.0) if isinstance(self.model, TokenModel) else self.model.data_range)


class Sweep:
    """A folder of cells: each a sampling job and its figures.

    Args:
        folder: where everything goes; None for one that only makes what others ask for.
        problem: what is swept.
        cells: the cells, in the order of the tables.
        n: samples of each.
        batch_size: rows evaluated at a time.
        shard_size: samples in a shard.
        draws: bootstrap replicates for the error of the Frechet distance.

    Raises:
        ValueError: if the folder holds a sweep with other settings, the reference does not fit features or images, or n
            is too small for the number of features.
    """

    def __init__(
        self,
        folder: Path | None,
        problem: Problem,
        cells: Sequence[Cell],
        n: int,
        *,
        batch_size: int = 64,
        shard_size: int = 512,
        draws: int = 50,
    ) -> None:
        self.folder, self.problem, self.cells, self.n = folder or Path(), problem, list(cells), n
        self.batch_size, self.shard_size, self.draws = batch_size, shard_size, draws
        names = [cell.name for cell in cells]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice or not names:
            raise ValueError(f"a sweep needs cells that differ; got {twice[0] + ' twice' if twice else 'none'}.")
        event, width = problem.image_shape, len(problem.reference.mean)
        problem.features.check(event)
        problem.reference.check(problem.features, event)
        if n < fewest(width):
            raise ValueError(f"n = {n} samples are too few for {width} features: at least {fewest(width)} are needed.")
        model = problem.model
        self.settings = {
            **problem.record,
            "sde": repr(model.process if isinstance(model, TokenModel) else model.sde),
            "n": n,
            "labels": f"{problem.classes} classes in turn" if problem.classes else "none",
            "features": problem.features.describe(),
            "reference": {
                "sha256": problem.reference.sha256(),
                **{key: problem.reference.record.get(key) for key in ("n", "source")},
            },
            "batch_size": batch_size,
            "bootstrap": draws,
        }
        if folder is not None:
            check_settings(folder, "bench.json", self.settings)
        self._jobs = {cell.name: self._plan(cell) for cell in self.cells}

    def run(
        self,
        *,
        rank: int = 0,
        world_size: int = 1,
        progress: Callable[[int], object] = int,
        make_all: MakeAll | None = None,
    ) -> Iterator[Cell]:
        """Draws and measures what is neither there nor claimed by another process; yields each cell that has figures.

        Cells that have them come first. Then processes share the shards of each cell; one that finds a cell complete
        measures it.

        Args:
            rank: which process this is.
            world_size: how many there are.
            progress: called with numbers of samples as they are drawn.
            make_all: has others make the files, from what `request` says of them.
        """
        # All are checked before the first call.
        jobs = [ShardedJob.begin(job.folder, job.n, job.shard_size, job.settings) for job in self._jobs.values()]
        progress(sum(job.drawn() for job in jobs))
        for cell, job in zip(self.cells, jobs, strict=True):
            if (job.folder / RESULT).is_file():
                self.row(cell)
                yield cell

        def pending() -> Iterator[Path]:
            unmeasured: list[ShardedJob] = []
            for job in jobs:
                yield from job.pending(rank, world_size)
                unmeasured = [job for job in (*unmeasured, job) if not (job.folder / RESULT).is_file()]
                yield from [job.folder / RESULT for job in unmeasured if not job.pending()]

        made = make_here(pending, self._content) if make_all is None else make_all(pending, self.request)
        for path in made:
            cell, job = self._of(path)
            if path.name == RESULT:
                clear(job.folder)
                yield cell
            else:
                progress(len(job.indices(job.number(path))))

    def _of(self, path: Path) -> tuple[Cell, ShardedJob]:
        """The cell whose folder a file is in, and its job."""
        cell = next(cell for cell in self.cells if cell.name == path.parent.name)
        return cell, self._jobs[cell.name]

    def _content(self, path: Path) -> Content:
        """The content of a shard, or of the figures of a cell whose shards are there."""
        cell, job = self._of(path)
        return self._figures(cell, job) if path.name == RESULT else self._shard(cell, job, job.number(path))

    def _shard(self, cell: Cell, job: ShardedJob, k: int) -> dict[str, np.ndarray]:
        return job.whole(k, self._draw(cell, job.indices(k)))

    def request(self, path: Path) -> tuple[str, list[Path]]:
        """What another machine needs to make a file: its name in the folder, and the files that it is made from."""
        _, job = self._of(path)
        needed = [job.path(k) for k in range(job.shards)] if path.name == RESULT else []
        return str(path.relative_to(self.folder)), needed

    def make(self, name: str, files: Iterable[bytes] = ()) -> bytes:
        """The bytes of a file of a sweep on another machine, from what `request` says of it.

        Args:
            name: the file's name in the folder.
            files: contents of the files that it is made from, in order.
        """
        cell, job = self._of(path := Path(name))
        if path.name != RESULT:
            return npz_bytes(self._shard(cell, job, job.number(path)))
        with tempfile.TemporaryDirectory() as folder:
            copy = ShardedJob.begin(Path(folder), job.n, job.shard_size, job.settings)
            for k, content in enumerate(files):
                write_whole(copy.path(k), content)
            return self._figures(cell, copy)

    def _cell_settings(self, cell: Cell) -> dict[str, Any]:
        solver, rule = repr(cell.solver), controller_record(cell.controller)
        return {"solver": solver, "setting": cell.setting, **rule, "seed": cell.seed}

    def _plan(self, cell: Cell) -> ShardedJob:
        channels, *size = self.problem.image_shape
        settings = {**self.settings, **self._cell_settings(cell), "image_shape": [*size, channels]}
        del settings["n"], settings["features"], settings["reference"], settings["bootstrap"]
        return ShardedJob(self.folder / "cells" / cell.name, self.n, self.shard_size, as_json(settings))

    def _draw(self, cell: Cell, indices: range) -> dict[str, np.ndarray]:
        model, classes = self.problem.model, self.problem.classes
        index = torch.tensor(indices)
        labels = index % classes if classes else None
        result = api.sample(
            model,
            index=index,
            seed=cell.seed,
            solver=cell.solver,
            controller=cell.controller,
            nfe=cell.nfe if cell.controller is None else None,
            rtol=cell.rtol if cell.controller is None else None,
            batch_size=self.batch_size,
            cond=None if labels is None else {"class_labels": labels},
        )
        return shard_arrays(result, self.problem.images, labels)

    def _figures(self, cell: Cell, job: ShardedJob) -> bytes:
        """The figures of a cell whose samples are all there, with the hash of its settings."""
        nfe, status = job.column("nfe"), job.column("status")
        row: dict[str, Any] = {
            "solver": cell.label,
            "setting": cell.setting,
            "seed": cell.seed,
            "n": self.n,
            "mean_nfe": float(nfe.mean()),
            "max_nfe": int(nfe.max()),
            "rejected": float(job.column("rejected").mean()),
            "status": {s.name: count for s in Status if (count := int((status == s).sum()))},
        }
        lost = int((status == Status.NON_FINITE).sum())
        if lost:
            row |= {"fid": None, "note": f"{lost} of {self.n} samples are not finite: nothing was measured"}
        else:
            features, logits = self.problem.features.of(open_images(job.folder))
            row |= measure(features, logits, self.problem.reference, draws=self.draws)
        return json_text(row | {HASH: self._hash(cell)})

    def _hash(self, cell: Cell) -> str:
        """Of all that determines the figures of a cell."""
        return json_hash({**self.settings, **self._cell_settings(cell)})

    def row(self, cell: Cell) -> dict[str, Any]:
        """The figures of a cell that has them.

        Raises:
            ValueError: if the file is damaged or of other settings, naming it.
        """
        path = self._jobs[cell.name].folder / RESULT
        found = read_json(path)
        if found.pop(HASH, None) != self._hash(cell):
            raise ValueError(f"{path} is of other settings than this sweep. Delete it and run the command again.")
        return found

    def rows(self) -> list[dict[str, Any]]:
        """The figures of every cell that has them, in order."""
        return [self.row(cell) for cell in self.cells if (self._jobs[cell.name].folder / RESULT).is_file()]

    def images(self, cell: Cell, count: int) -> np.ndarray:
        """The first images of a cell, uint8 with shape (count, H, W, C)."""
        return self._jobs[cell.name].first(count)

    def write_tables(self) -> list[dict[str, Any]]:
        """Writes results.jsonl and results.csv, a line for each cell, and summary.csv, over seeds; returns that."""
        clear(self.folder)
        rows = [row | {"provenance": self.settings} for row in self.rows()]
        write_whole(self.folder / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
        write_whole(self.folder / "results.csv", csv_text(rows))
        summary = summarise(rows)
        write_whole(self.folder / "summary.csv", csv_text(summary))
        return summary


_AVERAGED = ("fid_infinite", "kid", "divergence", "precision", "recall", "density", "coverage", "inception_score")


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each solver and setting: means over seeds, the error of the mean FID, and ranks.

    The error is the bootstrap's, or the spread over seeds where that is larger, over the root of the number of seeds.
    Within one budget a solver ranks below all that are better by more than twice the joint error: what is closer than
    that shares a rank. Solvers with tolerances have no budget and no rank.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["solver"], row["setting"]), []).append(row)
    summary = []
    for (solver, setting), seeds in groups.items():
        line: dict[str, Any] = {"solver": solver, "setting": setting, "seeds": len(seeds), "n": seeds[0]["n"]}
        line["mean_nfe"] = float(np.mean([row["mean_nfe"] for row in seeds]))
        line["max_nfe"] = max(row["max_nfe"] for row in seeds)
        line["failed"] = sum(row["n"] - row["status"].get("SUCCESS", 0) for row in seeds)
        values = [row["fid"] for row in seeds]
        if None in values:
            line |= {"fid": None, "fid_error": None}
        else:
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            bootstrap = _root_mean_square(seeds, "fid_error") or 0.0
            line["fid"] = float(np.mean(values))
            line["fid_error"] = max(spread, bootstrap) / math.sqrt(len(values))
            line |= {key: float(np.mean([row[key] for row in seeds])) for key in _AVERAGED if key in seeds[0]}
            kid_error = _root_mean_square(seeds, "kid_error")
            line["kid_error"] = None if kid_error is None else kid_error / math.sqrt(len(values))
        summary.append(line)
    for line in summary:
        rivals = [other for other in summary if other["setting"] == line["setting"] and other["fid"] is not None]
        ranked = line["fid"] is not None and line["setting"].startswith("nfe") and len(rivals) > 1
        line["rank"] = 1 + sum(_clearly_better(other, line) for other in rivals) if ranked else None
    return summary


def _root_mean_square(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None]
    return math.sqrt(sum(value**2 for value in values) / len(values)) if len(values) == len(rows) else None


def _clearly_better(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return bool(a["fid"] + 2 * math.hypot(a["fid_error"], b["fid_error"]) < b["fid"])


def pareto(summary: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows that no other beats in calls and FID at once, by calls."""
    there = sorted((row for row in summary if row["fid"] is not None), key=lambda row: (row["mean_nfe"], row["fid"]))
    front: list[Mapping[str, Any]] = []
    for row in there:
        if not front or row["fid"] < front[-1]["fid"]:
            front.append(row)
    return front


def result_of(row: Mapping[str, Any]) -> str:
    """One line of the live table."""
    found = row["note"] if row["fid"] is None else f"FID {row['fid']:8.3f} +- {row['fid_error']:.3f}"
    return f"{row['solver']:<34} {row['setting']:<10} seed {row['seed']}  {row['mean_nfe']:7.1f} calls  {found}"
