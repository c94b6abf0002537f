"""How near does `sample_pipeline` come under guidance, beside DDIM in the pipeline's own loop?

The pipeline of examples/own_pipeline.py (the packaged network), ten garments from the same noise. Distance to 200
evaluations of ours, as a share of their size; 200 steps of DDIM are 0.01 from those.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import click
import torch
from common import save, table

import fastsde

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_pipeline.py"
SOLVERS = {"default": fastsde.ExponentialPC(), "2M": fastsde.DPMSolverPP(order=2), "UniPC": fastsde.UniPC(order=2)}


@click.command(help=__doc__.split("\n", 1)[0])
@click.option("--discard", is_flag=True, help="Write nothing.")
def main(discard: bool) -> None:
    """Runs all pairs."""
    example = runpy.run_path(str(EXAMPLE))
    pipe, noise, classes = (example[name] for name in ("pipe", "noise", "classes"))
    rows = []
    for scale in (1.0, 2.0, 3.0):

        def ours(n: int, solver: fastsde.Solver, scale: float = scale) -> torch.Tensor:
            said = {"class_labels": classes, "guidance_scale": scale, "num_inference_steps": n}
            r = fastsde.sample_pipeline(pipe, **said, solver=solver, generator=noise(), progress=False, batch_size=10)
            return r.images

        exact = ours(200, SOLVERS["default"])
        for n in (6, 8, 12, 16, 24):
            ddim = pipe(classes, num_inference_steps=n, guidance_scale=scale, generator=noise()).images
            found = {"DDIM": ddim} | {name: ours(n, solver) for name, solver in SOLVERS.items()}
            rows.append((scale, n, *(round(float((x - exact).norm() / exact.norm()), 3) for x in found.values())))
    header = ["guidance", "evaluations", "DDIM", *SOLVERS]
    table(header, rows)
    if not discard:
        save("guided_pipeline", {"samples": 10, "device": "cpu"}, [dict(zip(header, r, strict=True)) for r in rows])


if __name__ == "__main__":
    main()
