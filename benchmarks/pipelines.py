"""Which pipeline classes of diffusers run in their own loop behind `sample_pipeline`, and where do they lead?

Tiny pipelines with random weights (tests/tiny_pipelines.py), each by its own scheduler, by `sample_pipeline` and with
`FastSDEScheduler`, from the same noise; then three samples at times of their own beside one of them alone, and a
restart. Schedulers that add noise are followed along their flow, by DPM-Solver++. Writes docs/pipelines.md.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import click
import diffusers
import torch
from common import save, table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from loop_checks import agreement, mixed, restarted
from tiny_pipelines import PIPELINES, drop_in

PAGE = Path(__file__).parents[1] / "docs" / "pipelines.md"
HEAD = """# Pipeline classes

Written by `benchmarks/pipelines.py`: tiny pipelines of diffusers {version} with random weights, {steps} steps.

`sample_pipeline`: {works} of {all} entries run in their own loop and lead where that loop leads, {refused} are refused
with the reason, {other} are neither. The first number is || ours - own || / || own || of the pipeline's output from the
same noise, the second that distance of the own loop from itself with half as many steps: own loops are of first order,
so theirs to the limit is about as large, and ours counts as right below 2.5 times it and 0.01. Schedulers that add
noise are followed along their flow, by DPM-Solver++.

"Alone" is the distance of one of three samples in a batch (other prompts and scales, adaptive steps, so other times) to
itself alone: rounding, or what chaotic networks make of it (thresholding). "Joined" is calls over forwards: 3 is all
three samples in one forward, more where guidance doubles the batch. "Restart" is the distance of samples that were sent
back to the same without. A class that draws noise inside of its loop, or whose guidance remembers earlier steps,
has more.

| class | in its own loop | alone | joined | restart | drop-in `FastSDEScheduler` |
|---|---|---|---|---|---|
"""


def said(distances: Callable[[], tuple[float, float]]) -> str:
    """The distances, or why there are none."""
    try:
        ours, own = distances()
    except (ValueError, TypeError) as error:
        return f"refused: {first_sentence(error)}"
    except Exception as error:  # noqa: BLE001 - it stands in the table
        return f"FAILS: {type(error).__name__}: {first_sentence(error)}"
    return f"{'right' if ours < 2.5 * own + 0.01 else 'WRONG'}: {ours:.4f} ({own:.4f})"


def first_sentence(error: Exception) -> str:
    """The beginning of a message, without line breaks."""
    whole = " ".join(str(error).split()).replace("|", "/")
    return re.split(r"(?<=[a-z)])[.;] ", whole)[0][:200]


def row(name: str, steps: int) -> tuple[str, ...]:
    """What is found of one class."""
    loop = said(lambda: agreement(name, steps))
    found = ["", "", ""]
    if loop.startswith(("right", "WRONG")):
        try:
            alone, r, _ = mixed(name)
            found[:2] = [f"{alone:.0e}", f"{int(r.result.nfe.sum()) / max(1, r.forwards):.1f}"]
            found[2] = f"{restarted(name)[0]:.0e}"
        except Exception as error:  # noqa: BLE001 - it stands in the table
            found[2] = f"FAILS: {type(error).__name__}: {first_sentence(error)}"
    return name, loop, *found, said(lambda: drop_in(name, steps))


@click.command()
@click.option("--steps", default=50, show_default=True, help="Half of it should divide 1000, as DDIM wants.")
@click.option("--only", multiple=True, help="Classes to run; all by default, which writes the page.")
@click.option("--discard", is_flag=True, help="Write nothing.")
def main(steps: int, only: tuple[str, ...], discard: bool) -> None:
    """Runs the classes, prints a table and writes the page."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = []
    for name in only or PIPELINES:
        rows.append(row(name, steps))
        print(*rows[-1], sep=" | ", flush=True)
    header = ["class", "in its own loop", "alone", "joined", "restart", "drop-in"]
    table(header, [(r[0], r[1][:60], *r[2:5], r[5][:40]) for r in rows])
    if not discard and not only:
        save("pipelines", {"steps": steps}, [dict(zip(header, r, strict=True)) for r in rows])
        counts = [sum(r[1].startswith(word) for r in rows) for word in ("right", "refused")]
        numbers = {"works": counts[0], "refused": counts[1], "all": len(rows), "other": len(rows) - sum(counts)}
        lines = [f"| {' | '.join(r)} |" for r in rows]
        PAGE.write_text(HEAD.format(version=diffusers.__version__, steps=steps, **numbers) + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
