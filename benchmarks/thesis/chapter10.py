r"""Tables 10.1, D.2 and D.3 of the thesis: which claims hold with an exact score, and which with a learned one?

docs/measured/algorithm6.md has what was found.

`exact`: the digits mixture under the VP and VE processes of the tables. In place of FID the Frechet distance between
the moments of the samples and the exact ones, over that of as many exact samples. Algorithm 6 redraws the noise of
rejected steps, as published, with the published settings. DDIM walks the process's own alpha(t); the published one did
not. The ablations of D.2 and D.3 are at rtol 0.02 (the thesis does not say at which theirs are).

`network`: the VP column and Table D.2 with the packaged network, classes in turn, one seed for all rows, at rtol 0.05.
RD & Langevin has half the published steps. Cells are those of `fastsde bench`: a folder that survives being killed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import RUNS, Row, command, floor_of, swept
from problems import digits

import fastsde
from fastsde.evaluation.sweep import Cell

SDES = {"VP": fastsde.VPSDE(), "VE": fastsde.VESDE()}
RTOLS = (0.01, 0.02, 0.05, 0.1, 0.5)
PUBLISHED = {
    ("VP", "RD & Langevin"): (1999, 3.41),
    ("VP", "Euler-Maruyama"): (1000, 2.55),
    ("VP", "DDIM"): (1000, 2.86),
    ("VP", "probability flow"): (142, 3.11),
    ("VE", "RD & Langevin"): (1999, 2.40),
    ("VE", "Euler-Maruyama"): (1000, 2.98),
    ("VE", "probability flow"): (183, 7.64),
}
OURS = {
    "VP": ((329, 2.70), (274, 2.74), (179, 2.59), (147, 2.95), (49, 72.29)),
    "VE": ((738, 2.91), (490, 2.87), (271, 3.23), (170, 8.85), (52, 266.75)),
}
SAME = {
    ("VP", "Euler-Maruyama"): (10.28, 14.18, 25.49, 31.38, 92.99),
    ("VP", "DDIM"): (4.81, 5.75, 9.20, 11.53, 37.24),
    ("VE", "Euler-Maruyama"): (2.99, 3.05, 3.48, 5.12, 169.32),
}
ABLATIONS = {
    "no change": ({}, {}, (4.70, 3972), (4.89, 8856)),
    "delta(x')": ({"reference": "proposal"}, {}, (4.69, 4166), (4.99, 17514)),
    "no extrapolation": ({"extrapolate": False}, {}, (11.73, 3978), (6.57, 8802)),
    "q = infinity": ({}, {"norm": math.inf}, (4.90, 14462), (5.03, 39500)),
    "r = 0.5": ({}, {"r": 0.5}, (4.69, 4104), (4.87, 9594)),
    "r = 0.8": ({}, {"r": 0.8}, (4.68, 3938), (4.84, 8952)),
    "r = 1": ({}, {"r": 1.0}, (4.69, 4048), (4.93, 8784)),
    "Lamba, r = 0.5": ({"lamba": True, "extrapolate": False}, {"r": 0.5}, (52.98, 1468), (18.28, 2492)),
    "Lamba, r = 0.5, extrapolation": ({"lamba": True}, {"r": 0.5}, (64.65, 1438), (169.78, 2252)),
    "Lamba, r = 0.5, q = infinity": (
        {"lamba": True, "extrapolate": False},
        {"r": 0.5, "norm": math.inf},
        (21.09, 2360),
        (6.80, 5886),
    ),
    "Lamba, r = 0.5, q = infinity, theta = 0.8": (
        {"lamba": True, "extrapolate": False},
        {"r": 0.5, "norm": math.inf, "safety": 0.8},
        (18.82, 2346),
        (6.20, 2970),
    ),
}
"""Arguments of solver and controller, then published FID and NFE (of ten batches together), VP and VE."""
Known = tuple[float, float] | None
Planned = tuple[str, Cell, Known]

main = click.Group(help=__doc__)


def published_calls(name: str, rtols: tuple[float, ...], seed: int) -> Iterator[Planned]:
    """Algorithm 6 at the tolerances of Table 10.1, which say how many calls the rows beside them get."""
    for rtol in rtols:
        cell = Cell(fastsde.ExtrapolatedEM(keep_path=False), "Algorithm 6", None, rtol, seed)
        yield "10.1", cell, OURS[name][RTOLS.index(rtol)]


def same_calls(name: str, row: Planned, calls: float, seed: int) -> Iterator[Planned]:
    """Euler-Maruyama and DDIM with the calls that Algorithm 6 took, and what was published of it."""
    _, cell, known = row
    for rival, solver in (("Euler-Maruyama", fastsde.EulerMaruyama()), ("DDIM", fastsde.DDIM())):
        if (name, rival) in SAME:
            beside = Cell(solver, f"{rival}, as rtol {cell.rtol:g}", max(2, round(calls)), None, seed)
            yield "10.1", beside, (float(known[0]), SAME[name, rival][RTOLS.index(cell.rtol)])


def others(name: str, rtol: float, steps: int, corrected: int, tight: float, seed: int) -> Iterator[Planned]:
    """The rows of Table D.2 or D.3, and those of Table 10.1 with a number of calls of their own.

    Args:
        name: of the process.
        rtol: of the ablations.
        steps: of the baselines.
        corrected: calls of the predictor with Langevin steps.
        tight: tolerance of the probability flow.
        seed: of all rows.
    """
    for label, (solver, rule, vp, ve) in ABLATIONS.items():
        method, controller = fastsde.ExtrapolatedEM(keep_path=False, **solver), fastsde.Adaptive(rtol, 2 / 256, **rule)
        fid, nfe = vp if name == "VP" else ve
        yield {"VP": "D.2", "VE": "D.3"}[name], Cell(method, label, None, rtol, seed, controller), (nfe, fid)
    flow, langevin = fastsde.ProbabilityFlow(), fastsde.Langevin(snr=0.01 if name == "VP" else 0.16)
    options = {"growth": 2.0, "resolution": flow.resolution, "clock": SDES[name]}
    rule = fastsde.Adaptive(tight, tight, flow.error_power, 0.8, 1.0, **options)
    for cell in (
        Cell(fastsde.PredictorCorrector(fastsde.ReverseDiffusion(), langevin), "RD & Langevin", corrected, None, seed),
        Cell(fastsde.EulerMaruyama(), "Euler-Maruyama", steps, None, seed),
        Cell(fastsde.DDIM(), "DDIM", steps, None, seed),
        Cell(flow, "probability flow", None, tight, seed, rule),
    ):
        if (name, cell.label) in PUBLISHED:
            yield "10.1", cell, PUBLISHED[name, cell.label]


def shown(row: Planned, **found: object) -> Row:
    """A row of results."""
    part, cell, known = row
    published = {"published_nfe": known and known[0], "published_fid": known and known[1]}
    return {"part": part, "method": cell.label, "setting": cell.setting} | found | published


@command("thesis_tables", main, samples=100, processes=["VP"], rtols=[0.5], rtol=0.5, steps=20)
def exact(
    samples: int = 1000,
    processes: tuple[str, ...] = tuple(SDES),
    rtols: tuple[float, ...] = RTOLS,
    rtol: float = 0.02,
    steps: int = 1000,
) -> Row:
    """With an exact score?"""
    rows, floors, problem = list[Row](), {}, digits(samples)
    for name in processes:
        floors[name], model = problem.floor(50), problem.model(SDES[name])

        def run(row: Planned, name: str = name, model: fastsde.ScoreModel = model) -> float:
            cell, more = row[1], {"n": samples, "batch_size": 2000, "seed": 0}
            how = {"controller": cell.controller} if cell.controller else {"nfe": cell.nfe, "rtol": cell.rtol}
            r = fastsde.sample(model, solver=cell.solver, **how, **more)
            enough = int(r.success.sum()) > problem.d
            ratio = problem.distance(r.samples[r.success]) / floors[name][0] if enough else math.inf
            found = {"nfe": float(r.nfe.double().mean()), "ratio": ratio, "failed": int((~r.success).sum())}
            setting = "" if cell.nfe else f", {cell.setting}"
            rows.append({"process": name} | shown(row, **found) | {"method": cell.label + setting})
            return found["nfe"]

        for row in tqdm(list(published_calls(name, rtols, 0)), f"{name}, tolerances", disable=None):
            for rival in same_calls(name, row, run(row), 0):
                run(rival)
        for row in tqdm(list(others(name, rtol, steps, 2 * steps + 1, 1e-5, 0)), f"{name}, others", disable=None):
            run(row)
    rows.sort(key=lambda row: (processes.index(row["process"]), row["part"]))
    return {"floors": floors, "rows": rows}


@command("thesis_network", main, samples=130, rtols=[0.5], rtol=0.5, few=1, work=RUNS / "quick_thesis")
def network(
    samples: int = 320,
    rtols: tuple[float, ...] = RTOLS,
    rtol: float = 0.05,
    seed: int = 0,
    few: int = 0,
    work: Path = RUNS / "thesis_network",
    device: str = "cpu",
) -> Row:
    """With the packaged network?"""
    model, _ = fastsde.pretrained("fashion-mnist", device=device)

    def run(rows: list[Planned]) -> list[Row]:
        cells = [cell for _, cell, _ in rows]
        return swept(work, model, cells, samples, batch_size=80 if device == "cpu" else 160, shard_size=160)

    first, beside = list(published_calls("VP", rtols, seed)), list[Planned]()
    for row, found in zip(first, run(first), strict=True):
        beside += same_calls("VP", row, found["mean_nfe"], seed)
    # Published with 1e-5, which is near the rounding of a network in single precision.
    more = [row for row in others("VP", rtol, 1000, 1001, 1e-3, seed) if row[1].label not in ("no change", "DDIM")]
    more.append(("10.1", Cell(fastsde.ExponentialPC(), "ExponentialPC", None, 0.05, seed), None))
    more.append(("10.1", Cell(fastsde.ExponentialPC(eta=1.0), "ExponentialPC, eta 1", None, 0.02, seed), None))
    rows, keys = first + (beside + more)[: few or None], ("mean_nfe", "rejected", "fid", "fid_error")
    found = [shown(row, **{key: one[key] for key in keys}) for row, one in zip(rows, run(rows), strict=True)]
    return {"real_images": floor_of(samples), "rows": sorted(found, key=lambda row: row["part"])}


if __name__ == "__main__":
    main()
