"""What `fastsde sample` draws from, and its jobs: shards, then a picture and totals."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastsde import api
from fastsde.cli.output import dump_json, report, write_atomic
from fastsde.cli.solver_options import Steps
from fastsde.evaluation.cluster import Make
from fastsde.evaluation.images import image_grid
from fastsde.evaluation.jobs import MakeAll, ShardedJob, shard_arrays
from fastsde.files import Content, npz_bytes
from fastsde.result import SampleResult, SamplingError, Status


@dataclasses.dataclass(frozen=True)
class Request:
    """What the options of the same names ask for, in values that can go to another machine."""

    model: str
    steps: Steps
    label: str
    guidance_scale: float | None
    dtype: torch.dtype
    device: str
    seed: int
    batch_size: int


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened model, and how to draw from it.

    Attributes:
        draw: from sample numbers and labels, and whether to show progress, to samples.
        labels_of: from sample numbers to labels.
        images: from whole samples to uint8 with shape (k, H, W, C); None for tokens that are no images.
        record: where the model is from, and how it is sampled.
        image_shape: (H, W, C), where it is known beforehand.
    """

    draw: Callable[..., SampleResult]
    labels_of: Callable[[Tensor], Tensor | None]
    images: Callable[[Tensor], np.ndarray] | None
    record: dict[str, Any]
    image_shape: tuple[int, ...] | None = None

    def shard(self, numbers: range) -> dict[str, np.ndarray]:
        """The arrays of the samples with these numbers."""
        index = torch.tensor(numbers)
        labels = self.labels_of(index)
        return shard_arrays(self.draw(index, labels, progress=False), self.images, labels)


def draw(model: Any, index: Tensor, labels: Tensor | None, **options: Any) -> SampleResult:
    """Draws the samples of these numbers, which for latent models are latents."""
    cond = None if labels is None else {"class_labels": labels}
    return api.sample(model, index=index, cond=cond, **options)


def shard_maker(
    open_source: Callable[[Request], Source], request: Request, job: ShardedJob
) -> tuple[Make, dict[str, Any]]:
    """In a worker: opens the model; what makes shards from their numbers, and the record of the model."""
    single_threaded(request.device)
    source = open_source(request)

    def make(k: int) -> bytes:
        try:
            return npz_bytes(job.whole(k, source.shard(job.indices(k))))
        except SamplingError as error:  # its cause would stay here
            raise SamplingError(str(error.__cause__ or error), None) from None

    return make, source.record


def single_threaded(device: str) -> None:
    """Gives a worker on a CPU one thread: there is a worker for each core."""
    if device == "cpu":
        torch.set_num_threads(1)


def run_job(
    job: ShardedJob, source: Source, shares: tuple[int, int], *, make_all: MakeAll | None, as_json: bool
) -> None:
    """Draws the shards of a job that are not there, or has others do so; who finds all of them writes the totals.

    Raises:
        click.ClickException: if interrupted.
        SystemExit: with status 1 if a sample failed.
    """
    rank, world_size = shares
    with tqdm(total=job.n, initial=job.drawn(), desc="samples", unit="", disable=None) as bar:
        calls, count, look = 0, 0, time.monotonic()
        try:
            for k in job.run(source.shard, rank=rank, world_size=world_size, make_all=make_all):
                nfe = job.read(k, "nfe")
                calls, count = calls + int(nfe.sum()), count + len(nfe)
                bar.set_postfix_str(f"mean NFE {calls / count:.1f}", refresh=False)
                bar.update(len(nfe))
                if time.monotonic() > look:  # others draw, too
                    bar.n, look = job.drawn(), time.monotonic() + 5.0
        except KeyboardInterrupt as error:
            raise click.ClickException(f"interrupted; the same command goes on in {job.folder}.") from error
        except SamplingError as error:
            cause = error.__cause__ or error
            raise click.ClickException(f"{cause}; the same command goes on in {job.folder}.") from error
    left = len(job.pending())
    if left:
        click.echo(f"process {rank} of {world_size} is done; other processes draw {left} more of {job.shards} shards.")
        return
    totals = _totals(job)
    first = job.first(64) if job.has_images() else np.empty(0)
    grid: dict[str, Content] = {"grid.png": image_grid(first).save} if len(first) else {}
    files = write_atomic(job.folder, {"samples.json": dump_json(totals).encode(), **grid})
    counts, rejected, where = totals["status_counts"], totals["rejected_share"], f"in {job.shards} shards"
    said = dump_json(totals) if as_json else report(counts, job.column("nfe"), rejected, where, [], files)
    click.echo(said, nl=not as_json)
    if counts != {"SUCCESS": job.n}:
        raise SystemExit(1)


def _totals(job: ShardedJob) -> dict[str, Any]:
    nfe, status = job.column("nfe"), job.column("status")
    steps = job.column("accepted").sum() + job.column("rejected").sum()
    return {
        "n": job.n,
        "shards": job.shards,
        "status_counts": {s.name: count for s in Status if (count := int((status == s).sum()))},
        "mean_nfe": float(nfe.mean()),
        "least_nfe": int(nfe.min()),
        "most_nfe": int(nfe.max()),
        "rejected_share": float(job.column("rejected").sum() / max(int(steps), 1)),
        **job.settings,
    }
