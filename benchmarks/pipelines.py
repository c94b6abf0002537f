r"""What does `sample_pipeline` do with the pipelines of diffusers, at what cost, and how near is it under guidance?

`classes`: tiny pipelines with random weights (tests/tiny_pipelines.py), each by its own scheduler, by `sample_pipeline`
and with `FastSDEScheduler`, from the same noise; then three samples at times of their own beside one of them alone, and
a restart. Schedulers that add noise are followed along their flow. The table is in docs/measured/pipelines.md.

`cost`: networks that take 20 ms for a forward, whatever they compute, and for `gain` 2 ms more for each row. `ratio` is
the wall time of four samples of one prompt over that of the pipeline's own call for a batch of four, at as many
forwards; `gain` how much faster four samples of different prompts at rtol 0.05 are in one batch than one after another.

`guidance`: the pipeline of examples/own_pipeline.py, ten garments from the same noise: distance to 200 evaluations of
ours, as a share of their size, beside DDIM in the pipeline's own loop.
"""

from __future__ import annotations

import logging
import re
import runpy
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import diffusers
import torch
from common import Row, command, timed

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from loop_checks import PROMPTS, agreement, built, mixed, restarted
from tiny_pipelines import PIPELINES

import fastsde

COSTED = ("StableDiffusionPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "QwenImagePipeline", "WanPipeline")
EXAMPLE = Path(__file__).parents[1] / "examples" / "own_pipeline.py"


@click.group(help=__doc__)
def main() -> None:
    """The three questions."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


def first_sentence(error: Exception) -> str:
    """The beginning of a message, without line breaks."""
    whole = " ".join(str(error).split()).replace("|", "/")
    return re.split(r"(?<=[a-z)])[.;] ", whole)[0][:200]


def said(distances: Callable[[], tuple[float, float]]) -> str:
    """The distances, or why there are none."""
    try:
        ours, own = distances()
    except (ValueError, TypeError) as error:
        return f"refused: {first_sentence(error)}"
    except Exception as error:  # noqa: BLE001 - it stands in the table
        return f"FAILS: {type(error).__name__}: {first_sentence(error)}"
    return f"{'right' if ours < 2.5 * own + 0.01 else 'WRONG'}: {ours:.4f} ({own:.4f})"


@command("pipelines", main, steps=4, only=COSTED[:1])
def classes(steps: int = 50, only: tuple[str, ...] = ()) -> list[Row]:
    """Which classes run in their own loop, and where do they lead?"""
    rows: list[Row] = []
    for name in only or PIPELINES:
        row: Row = {"class": name, "in its own loop": said(lambda name=name: agreement(name, steps))}
        row |= {"alone": "", "joined": "", "restart": ""}
        if str(row["in its own loop"]).startswith(("right", "WRONG")):
            try:
                alone, r, _ = mixed(name)
                row |= {"alone": f"{alone:.0e}", "joined": f"{int(r.result.nfe.sum()) / max(1, r.forwards):.1f}"}
                row["restart"] = f"{restarted(name)[0]:.0e}"
            except Exception as error:  # noqa: BLE001 - it stands in the table
                row["restart"] = f"FAILS: {type(error).__name__}: {first_sentence(error)}"
        rows.append(row | {"diffusers": diffusers.__version__})
        print(*rows[-1].values(), sep=" | ", flush=True)
    return rows


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


@command("loop_overhead", main, steps=2, pairs=1)
def cost(steps: int = 28, pairs: int = 7) -> list[Row]:
    """What does a pipeline cost in its own loop, beside that loop itself?"""
    rows: list[Row] = []
    for name in COSTED:
        pipe, arguments = built(name)
        network = getattr(pipe, "unet", None) or pipe.transformer
        own_forward = network.forward
        each = "num_videos_per_prompt" if name == "WanPipeline" else "num_images_per_prompt"
        shared, mixed_prompts = {**arguments, "num_inference_steps": steps}, {**arguments, "rtol": 0.05}
        if "prompt" in arguments:
            mixed_prompts["prompt"] = [*PROMPTS, "a house"]

        def ours(batch: int, pipe: Any = pipe, **more: Any) -> float:
            options = {"n": 4, "batch_size": batch, "seed": 0, "progress": False, **more}
            return timed(lambda: fastsde.sample_pipeline(pipe, **options))

        def theirs(pipe: Any = pipe, more: Any = shared | {each: 4}) -> float:
            return timed(lambda: pipe(**more))

        clocked(network, 0.02, 0.0)
        theirs(), ours(4, **shared)
        ratios = [ours(4, **shared) / theirs() for _ in range(pairs)]
        network.forward = own_forward
        clocked(network, 0.02, 0.002)
        gains = [ours(1, **mixed_prompts) / ours(4, **mixed_prompts) for _ in range(pairs)]
        row: Row = {"class": name}
        for key, found in (("ratio", ratios), ("gain", gains)):
            row |= {key: statistics.median(found), f"{key} range": [min(found), max(found)]}
        rows.append(row)
    return rows


@command("guided_pipeline", main, calls=[6], scales=[2.0])
def guidance(calls: tuple[int, ...] = (6, 8, 12, 16, 24), scales: tuple[float, ...] = (1.0, 2.0, 3.0)) -> list[Row]:
    """How near under guidance, beside DDIM in the pipeline's own loop?"""
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = [str(EXAMPLE), f"{folder}/picture.png"]
        example = runpy.run_path(str(EXAMPLE))
    pipe, noise, labels = (example[name] for name in ("pipe", "noise", "classes"))
    solvers = {"ours": fastsde.ExponentialPC(), "2M": fastsde.DPMSolverPP(order=2), "UniPC": fastsde.UniPC(order=2)}
    rows: list[Row] = []
    for scale in scales:

        def ours(n: int, solver: fastsde.Solver, scale: float = scale) -> torch.Tensor:
            asked = {"class_labels": labels, "guidance_scale": scale, "num_inference_steps": n}
            options = {"solver": solver, "generator": noise(), "progress": False, "batch_size": 10}
            return fastsde.sample_pipeline(pipe, **asked, **options).images

        exact = ours(200 if len(calls) > 1 else 20, solvers["ours"])
        for n in calls:
            ddim = pipe(labels, num_inference_steps=n, guidance_scale=scale, generator=noise()).images
            found = {name: ours(n, solver) for name, solver in solvers.items()} | {"DDIM": ddim}
            row: Row = {"guidance": scale, "evaluations": n}
            rows.append(row | {name: float((x - exact).norm() / exact.norm()) for name, x in found.items()})
    return rows


if __name__ == "__main__":
    main()
