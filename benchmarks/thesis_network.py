r"""Table 10.1's VP column and Table D.2 with the packaged network: which claims hold where the score is learned?

The packaged Fashion-MNIST network (VP) in bfloat16, classes in turn, one seed for all rows; the Frechet distance in the
features of the packaged classifier, against those of the training images. Rows are those of `thesis_tables.py`, which
has the published figures; the ablations are at rtol 0.05. Two rows of ours stand beside them. RD & Langevin has 500
steps, half the published number, and DDIM with 1000 is left out, as it does not move from 36 calls on. Cells are those
of `fastsde bench`: a folder that survives being killed, which several processes share (`--rank`, `--world-size`).
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import torch
from common import packaged_model, provenance, save, table
from thesis_tables import ABLATIONS, BASE, OURS, PUBLISHED, RTOLS, SAME
from torch import nn
from tqdm import tqdm

import fastsde
from fastsde.evaluation.features import open_features
from fastsde.evaluation.reference import Reference, packaged_reference
from fastsde.evaluation.statistics import frechet
from fastsde.evaluation.sweep import Cell, Problem, Sweep, result_of

VP = "VP"
Known = tuple[float, float] | None
Row = tuple[str, Cell, Known]


def algorithm_6(seed: int) -> list[Row]:
    """The five tolerances of Table 10.1, which say how many calls the rows beside them get."""
    solver = fastsde.ExtrapolatedEM(keep_path=False)
    cells = [Cell(solver, "Algorithm 6", None, rtol, seed) for rtol in RTOLS]
    return [("10.1", cell, OURS[VP][k]) for k, cell in enumerate(cells)]


def ablations(rtol: float, seed: int) -> list[Row]:
    """The rows of Table D.2; its first is Algorithm 6 as it is."""
    rows = []
    for label, (solver, rule, (fid, nfe), _) in ABLATIONS.items():
        method = fastsde.ExtrapolatedEM(keep_path=False, **solver)
        controller = fastsde.Adaptive(rtol, 2 / 256, **rule)
        rows.append(("D.2", Cell(method, label, None, rtol, seed, controller), (nfe, fid)))
    return rows


def baselines(sde: fastsde.SDE, seed: int) -> list[Row]:
    """The rows of Table 10.1 with a number of calls of their own, and two of ours."""
    flow = fastsde.ProbabilityFlow()
    # Published with 1e-5, which is below what a network in bfloat16 can be told apart by.
    tight = fastsde.Adaptive(1e-3, 1e-3, flow.error_power, 0.8, 1.0, growth=2.0, resolution=flow.resolution, clock=sde)
    pc = fastsde.PredictorCorrector(fastsde.ReverseDiffusion(), fastsde.Langevin(snr=0.01))
    cells = [
        Cell(fastsde.ExponentialPC(), "ExponentialPC", None, 0.05, seed),
        Cell(fastsde.ExponentialPC(eta=1.0), "ExponentialPC, eta 1", None, 0.02, seed),
        Cell(flow, "probability flow", None, 1e-3, seed, tight),
        Cell(fastsde.EulerMaruyama(), "Euler-Maruyama", 1000, None, seed),
        Cell(pc, "RD & Langevin", 1001, None, seed),
    ]
    return [("10.1", cell, PUBLISHED.get((VP, cell.label))) for cell in cells]


def same_calls(sweep: Sweep, rows: list[Row], seed: int) -> list[Row]:
    """Euler-Maruyama and DDIM with the calls that Algorithm 6 took."""
    found = []
    for k, (_, cell, _) in enumerate(rows):
        calls = round(sweep.row(cell)["mean_nfe"])
        for name, rival in (("Euler-Maruyama", fastsde.EulerMaruyama()), ("DDIM", fastsde.DDIM())):
            known = (float(OURS[VP][k][0]), SAME[VP, name][k])
            found.append(("10.1", Cell(rival, f"{name}, as rtol {cell.rtol:g}", calls, None, seed), known))
    return found


def floor_of(reference: Reference, n: int, draws: int = 20) -> torch.Tensor:
    """Frechet distances of n training images at a time."""
    feats, seeded = reference.feats, torch.Generator().manual_seed(0)
    chosen = [torch.randperm(len(feats), generator=seeded)[:n] for _ in range(draws)]
    found = [frechet(feats[k], reference.mean, reference.covariance, draws=2).value for k in chosen]
    return torch.tensor(found)


@click.command(help=__doc__.split("\n", 1)[0], context_settings={"show_default": True})
@click.option("--samples", "-n", default=320)
@click.option("--rtol", default=0.05, help="Of the ablations.")
@click.option("--seed", default=0)
@click.option("--rank", default=0, help="Which process this is.")
@click.option("--world-size", default=1, help="How many share the work, each with one thread.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/thesis_network"), help="Where cells go.")
@click.option("--keep/--discard", default=True, help="Whether to write results/thesis_network.json.")
def main(samples: int, rtol: float, seed: int, rank: int, world_size: int, work: Path, keep: bool) -> None:
    """Draws what is missing; the process that finds all rows there prints the table and writes it."""
    settings = {key: v for key, v in click.get_current_context().params.items() if key not in ("rank", "work")}
    torch.set_num_threads(1 if world_size > 1 else 2)
    model = packaged_model(untrained=False)
    nn.Module.to(model.network, torch.bfloat16)
    reference = packaged_reference("fashion-mnist")
    problem = Problem(model, open_features("fashion-mnist"), reference, provenance({"dtype": "bfloat16"}), 10)

    def sweep(rows: list[Row]) -> Sweep:
        cells = [cell for _, cell, _ in rows]
        return Sweep(work, problem, cells, samples, batch_size=80, shard_size=160)

    def run(rows: list[Row]) -> Sweep:
        done = sweep(rows)
        with tqdm(total=len(rows) * samples, desc=f"rank {rank}", unit="", disable=None) as bar:
            for cell in done.run(rank=rank, world_size=world_size, progress=bar.update):
                tqdm.write(result_of(done.row(cell)))
        return done

    first = algorithm_6(seed)
    others = ablations(rtol, seed)
    run(first + others)
    while len(sweep(first).rows()) < len(first):  # another process draws the calls that the next rows need
        time.sleep(1)
    rows = first + same_calls(sweep(first), first, seed) + baselines(model.sde, seed) + others
    done = run(rows)
    if len(found := done.rows()) < len(rows):
        return
    floor = floor_of(reference, samples)
    keys = ("mean_nfe", "rejected", "fid", "fid_error", "fid_infinite", "kid", "inception_score")
    results = [
        {"part": part, "method": cell.label, "setting": cell.setting, "failed": samples - row["status"]["SUCCESS"]}
        | {key: row[key] for key in keys}
        | {"published_nfe": known and known[0], "published_fid": known and known[1]}
        for (part, cell, known), row in zip(rows, found, strict=True)
    ]
    base = BASE[VP]
    print(f"{samples} training images: FID {floor.mean():.3f}, spread {floor.std():.3f}; D.2 unchanged: {base}\n")
    shown = ("part", "method", "setting", "mean_nfe", "rejected", "fid", "fid_error", "published_nfe", "published_fid")
    table(shown, [[f"{v:.4g}" if isinstance(v := row[k], float) else v or "-" for k in shown] for row in results])
    if keep:
        real = {"mean": float(floor.mean()), "spread": float(floor.std())}
        save("thesis_network", settings, {"real_images": real, "rows": results})


if __name__ == "__main__":
    main()
