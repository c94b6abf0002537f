r"""The packaged network over three seeds: ours, Algorithm 6, Euler-Maruyama and five peers at matched calls.

Frechet distance of 10,000 images, classes in turn, in the features of the packaged classifier, against those of the
training images. The network runs in bfloat16, compiled; its roundings are not those of a network that is not.
Algorithm 6 takes no budget: Euler-Maruyama gets the calls that rtol 0.5 takes of it. Cells are those of `fastsde
bench`: a folder that survives being killed, which several processes share (`--rank`, `--world-size`). The study has
parts, the most telling first; `--parts` says how far to go.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import click
import torch
from common import RUNS, Row, command, table, versions
from torch import nn
from tqdm import tqdm

import fastsde
from fastsde.cli.bench import build_cells
from fastsde.evaluation.features import open_features
from fastsde.evaluation.reference import packaged_reference
from fastsde.evaluation.sweep import Cell, Problem, Sweep, result_of, summarise
from fastsde.score.base import ScoreModel

OURS = ("ExponentialPC", "ExponentialPC:eta=1")
NEAR, FAR = ("UniPC", "DPMSolverPP:eta=1"), ("DPMSolverPP:order=3", "DEIS:order=3,grid=karras", "DDIM")
"""The best five peers of an earlier sweep and of fitted.py; those that are near ours at 10 calls, and the others."""
RTOL, ITS_CALLS = 0.5, 36
"""The coarsest tolerance of Table 10.1, and the calls it takes here (thesis/chapter10.py)."""


def parts(model: ScoreModel, seeds: int) -> list[list[Cell]]:
    """What to draw, the most telling first."""

    def cells(solvers: tuple[str, ...], nfe: tuple[int, ...], rtol: tuple[float, ...] = ()) -> list[Cell]:
        return list(itertools.chain(*(build_cells(model, solvers, nfe, rtol, [seed]) for seed in range(seeds))))

    return [
        cells((*OURS, *NEAR, *FAR), (10,)),
        cells(("ExtrapolatedEM",), (), (RTOL,)) + cells(("EulerMaruyama",), (10, ITS_CALLS)),
        cells((*OURS, *NEAR), (8,)),
        cells(FAR, (8,)),
        build_cells(model, OURS[:1], (ITS_CALLS,), (), [0]),
        cells((*OURS, *NEAR, *FAR), (15,)),
    ]


@command(__doc__, "seeds", samples=130, count=1, seeds=1, few=1, compiled=False, work=RUNS / "seeds_quick")
@click.option("--samples", "-n", default=10_000)
@click.option("--parts", "count", default=6, help="How many of the six parts of the study to draw.")
@click.option("--seeds", default=3)
@click.option("--few", default=0, help="So many cells; 0: all.")
@click.option("--compile/--no-compile", "compiled", default=True, help="Whether to compile the network.")
@click.option("--rank", default=0, help="Which process this is.")
@click.option("--world-size", default=1, help="How many share the work.")
@click.option("--work", type=click.Path(path_type=Path), default=RUNS / "seeds", show_default=False, help="Of cells.")
def main(
    samples: int, count: int, seeds: int, few: int, compiled: bool, rank: int, world_size: int, work: Path
) -> Row | None:
    """Draws what is missing; the process that finds all there prints the table and returns it."""
    model, _ = fastsde.pretrained("fashion-mnist")
    network = nn.Module.to(model.network, torch.bfloat16).to(memory_format=torch.channels_last)
    if compiled:
        network.compile()
    record = versions({"dtype": "bfloat16, compiled" if compiled else "bfloat16"})
    problem = Problem(model, open_features("fashion-mnist"), packaged_reference("fashion-mnist"), record, 10)
    cells = list(itertools.chain(*parts(model, seeds)[:count]))[: few or None]
    sweep = Sweep(work, problem, cells, samples, batch_size=128, shard_size=1024)
    with tqdm(total=len(cells) * samples, desc=f"rank {rank}", unit="", smoothing=0.05, disable=None) as bar:
        for cell in sweep.run(rank=rank, world_size=world_size, progress=bar.update):
            tqdm.write(result_of(sweep.row(cell)))
    rows = sweep.rows()
    if len(rows) < len(cells):
        return None
    summary = summarise(rows)
    table(summary, "solver", "setting", "seeds", "mean_nfe", "fid", "fid_error", "precision", "recall", "rank")
    return {"cells": rows, "summary": summary}


if __name__ == "__main__":
    main()
