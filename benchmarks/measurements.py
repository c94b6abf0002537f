r"""Do samples of a trained network stay in range under a measurement, clipped or not?

The upper half of eight garments is given; the law of the measurement has noise 0.05. The packaged network, 16 calls,
along the flow and with noise in the dynamics.
"""

from __future__ import annotations

import warnings

import click
import torch
from common import described, packaged_model, save, table

import fastsde
from fastsde.score import DPS, MMPS, Clipped, Mask, PiGDM

GUIDES = (MMPS, PiGDM, DPS)
NOISE, CALLS = 0.05, 16


@click.command(context_settings={"show_default": True})
@click.option("-n", default=8, help="Garments.")
@click.option("--seed", default=3)
@click.option("--threads", default=2)
@click.option("--untrained", is_flag=True, help="Random weights, to see that it runs.")
def main(n: int, seed: int, threads: int, untrained: bool) -> None:
    """Largest value, misfit on the given half and samples outside of twice the range, for each guide."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore", fastsde.DataRangeWarning)  # what is counted here
    model = packaged_model(untrained=untrained)
    given = fastsde.sample(model, n=n, nfe=16, seed=11, cond={"class_labels": torch.arange(n) % 10}).samples
    known = torch.zeros(1, 28, 28)
    known[:, :14] = 1
    rows = []
    for solver in (fastsde.ExponentialPC(), fastsde.ExponentialPC(eta=1.0)):
        for guide in GUIDES:
            for clipped in (False, True):
                posterior: fastsde.ScoreModel = guide(model, Mask(known), NOISE)
                posterior = Clipped(posterior) if clipped else posterior
                r = fastsde.sample(posterior, n=n, nfe=CALLS, seed=seed, solver=solver, cond={"measurement": given})
                misfit = float((r.samples - given)[:, :, :14].square().mean().sqrt()) / NOISE
                name = f"{'Clipped(' * clipped}{guide.__name__}{')' * clipped}"
                rows.append([name, described(solver), float(r.samples.abs().max()), misfit, int(r.outside.sum())])
    table(
        ["model", "solver", "largest", "misfit / noise", "outside"],
        [[*r[:2], f"{r[2]:.3g}", f"{r[3]:.3g}", r[4]] for r in rows],
    )
    if not untrained:
        keys = ("model", "solver", "largest", "misfit", "outside")
        save(
            "measurements", {"n": n, "seed": seed, "calls": CALLS}, [dict(zip(keys, row, strict=True)) for row in rows]
        )


if __name__ == "__main__":
    main()
