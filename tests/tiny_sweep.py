"""A sweep that takes seconds: exact Gaussian images, pixels as features. Also a program, for processes that die."""

import sys
from pathlib import Path

import torch

import fastsde
from fastsde.cli.bench import build_cells, write_report
from fastsde.evaluation.features import Features
from fastsde.evaluation.reference import Reference
from fastsde.evaluation.sweep import Problem, Sweep
from fastsde.score import GaussianScore

SHAPE = (1, 4, 4)
MEAN = torch.linspace(-0.4, 0.4, 16, dtype=torch.float64).reshape(SHAPE)
STD = torch.linspace(0.05, 0.3, 16, dtype=torch.float64).reshape(SHAPE)


def pixels(x):
    """A feature network: the pixels themselves, in [-1, 1]."""
    return x.flatten(1), x.flatten(1)[:, :3]


def problem(model=None, **record):
    sde = fastsde.VPSDE()
    features = Features(pixels, "pixels", 1, shape=SHAPE)
    generator = torch.Generator().manual_seed(0)
    feats = (MEAN + STD * torch.randn(200, *SHAPE, generator=generator, dtype=torch.float64)).flatten(1).float()
    described = {"features": features.describe(), "image_shape": list(SHAPE), "n": 200, "source": "exact"}
    reference = Reference(MEAN.flatten(), torch.diag(STD.flatten() ** 2), feats, described)
    return Problem(
        GaussianScore(sde, MEAN, STD) if model is None else model, features, reference, {"model": "tiny"} | record
    )


def sweep(folder, solvers="ExponentialPC DDIM", nfe=(5, 8), rtol=(0.1,), seeds=2, n=60, **options):
    task = options.pop("problem", None) or problem()
    cells = build_cells(task.model, solvers.split(), nfe, rtol, range(seeds))
    settings = {"shard_size": 20, "draws": 4, "batch_size": 20} | options
    return Sweep(folder, task, cells, n, **settings)


def finish(folder, rank=0, world_size=1, **options):
    """Runs what is left, and writes the report if all is there."""
    work = sweep(folder, **options)
    list(work.run(rank=rank, world_size=world_size))
    if len(work.rows()) == len(work.cells):
        write_report(work)
    return work


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write("started\n")
    sys.stdout.flush()
    finish(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
