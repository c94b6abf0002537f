r"""What continuous batching saves: no step waits for the slowest sample.

1. Rows evaluated by the network over the sum of the samples' NFE, counted in a wrapper around the network: 1 means that
   every row of every forward served a sample. Pass mark: 1.03, for 256 samples in batches of 32.
2. The same for "waiting": 8 batches one after the other, each running all its 32 rows until its slowest sample is done.
   Samples do not depend on their neighbours, so each batch's number of calls is the largest NFE among its 32 samples.
3. On the packaged network, the wall time too. Waiting is emulated by bare forwards on full batches of 32, as many as
   it would take. It pays nothing for steps, noise or bookkeeping, while `sample` is timed whole: the ratio is a lower
   bound.

The first problem costs little: a mixture of Gaussians of very unequal widths, so samples are of unequal difficulty.
"""

from __future__ import annotations

import click
import torch
from common import packaged_model, recorded, replay, save, table
from torch import Tensor

import fastsde
from fastsde.score.analytic import MixtureScore

SOLVER = fastsde.ExtrapolatedEM()
"""Samples differ most in their number of calls where steps follow errors alone."""


def unequal_mixture(dimension: int = 16) -> MixtureScore:
    """Four well-separated Gaussians with standard deviations 0.5, 0.05, 0.005 and 0.0005."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(4, dimension, dtype=torch.float64, generator=generator)
    basis = torch.eye(dimension, dtype=torch.float64).expand(4, dimension, dimension)
    variances = torch.tensor([0.5, 0.05, 0.005, 0.0005], dtype=torch.float64)[:, None].expand(4, dimension) ** 2
    return MixtureScore(fastsde.VPSDE(), torch.full((4,), 0.25, dtype=torch.float64), means, basis, variances)


def count(
    name: str, model: fastsde.ScoreModel, n: int, batch_size: int, rtol: float, cond: dict[str, Tensor] | None = None
) -> tuple[dict[str, object], list[int], list[int]]:
    """Rows evaluated against rows needed; also the batch sizes of all forwards, and those that waiting would make."""
    counting, rows = recorded(model)
    r = fastsde.sample(counting, n=n, batch_size=batch_size, rtol=rtol, cond=cond, solver=SOLVER)
    needed = int(r.nfe.sum())
    waiting = [len(batch) for batch in r.nfe.split(batch_size) for _ in range(int(batch.max()))]
    summary = {
        "problem": name,
        "nfe_min": int(r.nfe.min()),
        "nfe_mean": float(r.nfe.double().mean()),
        "nfe_max": int(r.nfe.max()),
        "rows_needed": needed,
        "rows_continuous": sum(rows),
        "rows_waiting": sum(waiting),
        "ratio_continuous": sum(rows) / needed,
        "ratio_waiting": sum(waiting) / needed,
        "failed": int((~r.success).sum()),
    }
    return summary, list(rows), waiting


@click.command(help=__doc__.split("\n", 1)[0], context_settings={"show_default": True})
@click.option("--samples", "-n", default=256)
@click.option("--batch-size", default=32)
@click.option("--rtol", default=0.05)
@click.option("--untrained", is_flag=True, help="Random weights in place of the packaged model.")
@click.option("--network/--no-network", default=True, help="Whether to run the packaged network too.")
@click.option("--threads", default=2, help="Threads of torch.")
@click.option("--keep/--discard", default=True, help="Whether to write results/batching.json.")
def main(samples: int, batch_size: int, rtol: float, untrained: bool, network: bool, threads: int, keep: bool) -> None:
    """Prints both tables and writes them."""
    settings = click.get_current_context().params
    torch.set_num_threads(threads)
    counts, walls = [count("unequal mixture", unequal_mixture(), samples, batch_size, rtol)[0]], {}
    if network:
        model = packaged_model(untrained=untrained)
        cond = {"class_labels": torch.arange(samples) % 10}
        name = "small UNet, untrained" if untrained else "fashion-mnist"
        summary, continuous, waiting = count(name, model, samples, batch_size, rtol, cond)
        counts.append(summary)
        # The count above has warmed the network up.
        whole = fastsde.sample(model, n=samples, batch_size=batch_size, rtol=rtol, cond=cond, solver=SOLVER).seconds
        walls = {
            "sample": whole,
            "bare_continuous": replay(model, continuous),
            "bare_waiting": replay(model, waiting),
        }
        walls["waiting_over_sample"] = walls["bare_waiting"] / whole
        walls["waiting_over_continuous"] = walls["bare_waiting"] / walls["bare_continuous"]

    table(
        ("problem", "NFE min", "mean", "max", "continuous: rows / needed", "waiting: rows / needed", "pass mark 1.03"),
        [
            (
                c["problem"],
                c["nfe_min"],
                f"{c['nfe_mean']:.1f}",
                c["nfe_max"],
                f"{c['ratio_continuous']:.4f}",
                f"{c['ratio_waiting']:.4f}",
                "ok" if c["ratio_continuous"] <= 1.03 and not c["failed"] else "MISSED",
            )
            for c in counts
        ],
    )
    if walls:
        print(f"\nsample, continuous batching          {walls['sample']:7.1f} s")
        print(f"bare forwards, continuous            {walls['bare_continuous']:7.1f} s")
        print(f"bare forwards, waiting               {walls['bare_waiting']:7.1f} s")
        print(f"waiting / sample (a lower bound)     {walls['waiting_over_sample']:7.3f}")
        print(f"waiting / continuous, bare           {walls['waiting_over_continuous']:7.3f}")
    if keep:
        save("batching", settings, {"rows": counts, "wall_seconds": walls})


if __name__ == "__main__":
    main()
