"""Which pipeline classes of diffusers does the drop-in lead right, and which does `from_diffusers` read?

Tiny pipelines with random weights (tests/tiny_pipelines.py), each with its own scheduler and with `FastSDEScheduler`,
from the same noise. The number is the relative distance of the two last states; beside it, that of the own loop from
itself with half as many steps. Schedulers that add noise are followed along their flow, by DPM-Solver++. Writes
docs/pipelines.md.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import click
import diffusers
import torch
from common import save, table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny_pipelines import AS_TEXT, PIPELINES, READ, drop_in, read

import fastsde

PAGE = Path(__file__).parents[1] / "docs" / "pipelines.md"
HEAD = """# Pipeline classes

Written by `benchmarks/pipelines.py`: tiny pipelines of diffusers {version} with random weights, {steps} steps.

"Right" means that the last state goes where the pipeline's own loop goes, from the same noise. The first number is
|| ours - own || / || own ||, the second that distance of the own loop from itself with half as many steps: own loops
are of first order, so theirs to the limit is about as large. Schedulers that add noise are followed along their flow,
by DPM-Solver++. `from_diffusers` is compared unguided, with the empty prompt.

| class | drop-in `FastSDEScheduler` | `from_diffusers` |
|---|---|---|
"""


def said(distances: Callable[[], tuple[float, float]]) -> str:
    """The distances, or why there are none."""
    try:
        ours, own = distances()
    except (ValueError, TypeError) as error:
        return f"refused: {' '.join(str(error).split())}"
    verdict = "right" if ours < 2.5 * own + 0.01 else "WRONG"
    return f"{verdict}: {ours:.4f} ({own:.4f})"


def reading(name: str, steps: int) -> str:
    """What `from_diffusers` makes of a class."""
    if name in READ:
        return said(lambda: read(name, steps))
    try:
        fastsde.from_diffusers(PIPELINES[name]()[0], **({"event_shape": (4, 8, 8)} if "Flux" in name else {}))
    except (ValueError, TypeError) as error:
        return f"refused: {' '.join(str(error).split())}"
    return "its network, as by the text-to-image pipeline" if name in AS_TEXT else "NOT COMPARED"


@click.command()
@click.option("--steps", default=100, show_default=True)
@click.option("--only", multiple=True, help="Classes to run; all by default, which writes the page.")
@click.option("--discard", is_flag=True, help="Write nothing.")
def main(steps: int, only: tuple[str, ...], discard: bool) -> None:
    """Runs the classes, prints a table and writes the page."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = []
    for name in only or PIPELINES:
        rows.append((name, said(lambda name=name: drop_in(name, steps)), reading(name, steps)))  # type: ignore[misc]
        print(*rows[-1], sep=" | ", flush=True)
    table(["class", "drop-in", "from_diffusers"], [(a, b[:40], c[:60]) for a, b, c in rows])
    if not discard and not only:
        save(
            "pipelines",
            {"steps": steps},
            [dict(zip(("class", "drop_in", "from_diffusers"), r, strict=True)) for r in rows],
        )
        lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
        PAGE.write_text(HEAD.format(version=diffusers.__version__, steps=steps) + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
