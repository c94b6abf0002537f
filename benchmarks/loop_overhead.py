"""What does a pipeline cost in its own loop behind `sample_pipeline`, beside that loop itself?

Tiny pipelines (tests/tiny_pipelines.py) whose networks take a set time for a forward, whatever they compute: a fixed
part, and a part for each row. "Ratio" is the wall time of four samples of one prompt over that of the pipeline's own
call for a batch of four, at as many forwards. "Gain" is how much faster four samples of different prompts at rtol 0.05
are in one batch than one after another.
"""

from __future__ import annotations

import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from common import save, table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from loop_checks import PROMPTS, built

import fastsde

NAMES = ("StableDiffusionPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "QwenImagePipeline", "WanPipeline")


def clocked(network: Any, fixed: float, a_row: float) -> None:
    """Lets a network's forward take `fixed + a_row * rows` seconds."""
    own = network.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        out = own(*args, **kwargs)
        state = next(v for v in (*args, *kwargs.values()) if torch.is_tensor(v) and v.ndim > 1)
        time.sleep(max(0.0, fixed + a_row * len(state) - (time.perf_counter() - start)))
        return out

    network.forward = forward


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def spread(ratios: list[float]) -> str:
    """The median and the range."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def measure(name: str, steps: int, pairs: int) -> tuple[str, str, str]:
    """The ratio and the gain of one class."""
    pipe, arguments = built(name)
    network = getattr(pipe, "unet", None) or pipe.transformer
    own_forward = network.forward
    clocked(network, 0.02, 0.0)
    each = "num_videos_per_prompt" if name == "WanPipeline" else "num_images_per_prompt"
    shared = {**arguments, "num_inference_steps": steps}

    def theirs() -> object:
        return pipe(**shared, **{each: 4})

    def ours() -> object:
        return fastsde.sample_pipeline(pipe, n=4, batch_size=4, seed=0, progress=False, **shared)

    theirs(), ours()
    ratios = [seconds(ours) / seconds(theirs) for _ in range(pairs)]
    network.forward = own_forward
    clocked(network, 0.02, 0.002)
    mixed = dict(arguments)
    if "prompt" in mixed:
        mixed["prompt"] = [*PROMPTS, "a house"]

    def at_once(batch: int) -> Callable[[], object]:
        return lambda: fastsde.sample_pipeline(pipe, n=4, rtol=0.05, batch_size=batch, seed=0, progress=False, **mixed)

    gains = [seconds(at_once(1)) / seconds(at_once(4)) for _ in range(pairs)]
    return name, spread(ratios), spread(gains)


@click.command(help=__doc__.split("\n", 1)[0], context_settings={"show_default": True})
@click.option("--steps", default=28, help="Evaluations of each sample, for the ratio.")
@click.option("--pairs", default=7, help="Repeats of each pair.")
@click.option("--discard", is_flag=True, help="Write nothing.")
def main(steps: int, pairs: int, discard: bool) -> None:
    """Measures all classes."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = [measure(name, steps, pairs) for name in NAMES]
    header = ["class", "ratio", "gain"]
    table(header, rows)
    if not discard:
        rows_ = [dict(zip(header, row, strict=True)) for row in rows]
        save("loop_overhead", {"steps": steps, "pairs": pairs, "forward_ms": 20, "row_ms": 2, "device": "cpu"}, rows_)


if __name__ == "__main__":
    main()
