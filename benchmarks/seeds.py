r"""The packaged network over three seeds: ours, Algorithm 6, Euler-Maruyama and five peers at matched calls.

Frechet distance of 10,000 images, classes in turn, in the features of the packaged classifier, against those of the
training images. Algorithm 6 takes no budget: Euler-Maruyama gets the calls that rtol 0.5 takes of it. Cells are those
of `fastsde bench`: a folder that survives being killed, and that several runs of this script share. The study has
parts, the most telling first; `--count` says how far to go.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from common import RUNS, Row, command, swept

import fastsde
from fastsde.cli.bench import build_cells
from fastsde.evaluation.sweep import Cell, summarise
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


@command("seeds", samples=130, count=1, seeds=1, few=1, work=RUNS / "seeds_quick")
def main(
    samples: int = 10_000,
    count: int = 6,
    seeds: int = 3,
    few: int = 0,
    work: Path = RUNS / "seeds",
    device: str = "cpu",
) -> Row:
    """The first `count` of the six parts, of them the first `few` cells, if that is not 0."""
    model, _ = fastsde.pretrained("fashion-mnist", device=device)
    cells = list(itertools.chain(*parts(model, seeds)[:count]))[: few or None]
    rows = swept(work, model, cells, samples, batch_size=128 if device == "cpu" else 1024, shard_size=1024)
    return {"cells": rows, "summary": summarise(rows)}


if __name__ == "__main__":
    main()
