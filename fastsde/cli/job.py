"""Sampling jobs of the command line: shards, then a picture and totals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastsde.cli.output import dump_json, report, write_atomic
from fastsde.evaluation.images import image_grid
from fastsde.evaluation.jobs import ShardedJob, shard_arrays
from fastsde.files import Content
from fastsde.result import SampleResult, SamplingError, Status


def run_job(
    job: ShardedJob,
    draw: Callable[..., SampleResult],
    labels_of: Callable[[Tensor], Tensor | None],
    images: Callable[[Tensor], np.ndarray],
    shares: tuple[int, int],
    *,
    as_json: bool,
) -> None:
    """Draws this process's shards of a job that are not there; whoever finds all of them writes picture and totals.

    Args:
        job: the job.
        draw: from sample numbers and labels to samples.
        labels_of: from sample numbers to labels.
        images: from finite samples to uint8 with shape (k, H, W, C).
        shares: rank and number of processes.
        as_json: print the totals as JSON.

    Raises:
        click.ClickException: if interrupted.
        SystemExit: with status 1 if a sample failed.
    """
    rank, world_size = shares
    mine = range(rank, job.shards, world_size)

    def shard(numbers: range) -> dict[str, np.ndarray]:
        index = torch.tensor(numbers)
        labels = labels_of(index)
        return shard_arrays(draw(index, labels, progress=False), images, labels)

    with tqdm(total=sum(len(job.indices(k)) for k in mine), desc="samples", unit="", disable=None) as bar:
        bar.update(bar.total - sum(len(job.indices(k)) for k in job.pending(rank, world_size)))
        try:
            for drawn in job.run(shard, rank=rank, world_size=world_size):
                bar.update(drawn)
        except KeyboardInterrupt as error:
            raise click.ClickException(f"interrupted; the same command goes on in {job.folder}.") from error
        except SamplingError as error:
            raise click.ClickException(
                f"{error.__cause__ or error}; the same command goes on in {job.folder}."
            ) from error
    left = len(job.pending())
    if left:
        click.echo(f"process {rank} of {world_size} is done; other processes draw {left} more of {job.shards} shards.")
        return
    totals, first = _totals(job), job.first(64)
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
