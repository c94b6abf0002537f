"""Options that several commands have."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource

from fastsde.arguments import usable_device
from fastsde.evaluation.cluster import RayWorkers
from fastsde.evaluation.jobs import processes


class _Path(click.Path):
    """A path; the empty one, as from a variable that is not set, would mean the folder where the command runs."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("an empty path; write . for this folder.", param, ctx)
        if "://" in str(value):
            self.fail(f"{value} is not a path on this machine; use one, and copy the files.", param, ctx)
        return super().convert(value, param, ctx)


PATH = _Path(path_type=Path)


def _device(ctx: click.Context, param: click.Parameter, value: str) -> torch.device:
    """The device asked for; of several GPUs the one that `torchrun` or `accelerate launch` means by LOCAL_RANK."""
    local = os.environ.get("LOCAL_RANK")
    return usable_device(f"cuda:{local}" if value == "cuda" and local is not None else value)


model = click.option(
    "--model",
    default="fashion-mnist",
    help="A packaged model, a folder written by `fastsde train`, or a diffusers model: a folder or a name on the hub.",
)
device = click.option(
    "--device",
    default=lambda: "cuda" if torch.cuda.is_available() else "cpu",
    show_default="cuda where there is one, else cpu",
    callback=_device,
    help="cpu, cuda, cuda:1, mps.",
)
dtype = click.option(
    "--dtype",
    default="float32",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    callback=lambda ctx, param, value: getattr(torch, value),
    help="Of the network alone; of a pipeline's parts.",
)
batch_size = click.option("--batch-size", default=64, type=click.IntRange(1, 1 << 20), help="Rows evaluated at a time.")
shard_size = click.option(
    "--shard-size",
    default=512,
    type=click.IntRange(1, 1 << 32),
    help="Samples in a file of a job; a kill costs that many at most.",
)
rank = click.option(
    "--rank", type=int, help="Of a job's processes, which this is, for the shards it begins with; from RANK by default."
)
world_size = click.option("--world-size", type=int, help="How many processes share a job; from WORLD_SIZE by default.")
ray = click.option(
    "--ray",
    metavar="[ADDRESS]",
    is_flag=False,
    flag_value="local",
    show_default="none",
    help='Have a Ray cluster draw: host:port, "auto" on a machine of it; without a value one is started here.',
)
workers = click.option(
    "--workers",
    type=click.IntRange(1),
    show_default="one for each GPU of the cluster, else for each CPU",
    help="How many workers --ray asks for.",
)
features = click.option(
    "--features",
    default="fashion-mnist",
    help='"fashion-mnist", "inception", a folder of `train-features`, or of a DINOv2 or CLIP model.',
)
weights = click.option("--weights", type=PATH, help="For the features inception: a local file.")
bootstrap = click.option(
    "--bootstrap", default=50, type=click.IntRange(2, 100_000), help="Replicates for the error of FID."
)
seed = click.option("--seed", default=0, type=click.IntRange(0), help="Seed of the noise.")
plot = click.option("--plot", type=PATH, help="Also draw a picture, as PNG; needs matplotlib.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def shares(ctx: click.Context) -> tuple[int, int]:
    """Rank and number of processes that the options or the launcher say."""
    found = processes(ctx.params["rank"], ctx.params["world_size"], os.environ)
    if ctx.params["ray"] is not None and (ctx.params["rank"] is not None or found[1] > 1):
        raise ValueError("--ray shares the work itself; it goes without --rank, --world-size, RANK and WORLD_SIZE.")
    return found


@contextlib.contextmanager
def ray_workers(ctx: click.Context) -> Iterator[RayWorkers | None]:
    """The workers that --ray asks for, where --device says or else on GPUs if the cluster has any; or None."""
    address, count = ctx.params["ray"], ctx.params["workers"]
    if address is None:
        if count is not None:
            raise ValueError("--workers is for --ray.")
        yield None
        return
    with RayWorkers.connected(address, count) as found:
        asked = ctx.params["device"]
        if ctx.get_parameter_source("device") is not ParameterSource.DEFAULT:
            if asked.index is not None or asked.type not in ("cpu", found.device):
                raise ValueError(f"--device of --ray must be cpu or, if the cluster has GPUs, cuda; got {asked}.")
            found.device = asked.type
        yield found
