r"""Which samplers reach the law of the digits mixture, and at how many calls?

Data: `problems.digits`, 64 dimensions, VP, exact score, so there is no network error. `ratio` is the Frechet distance
between the moments of the samples and the exact ones, over the mean distance of as many exact samples: 1 is perfect,
and one draw of exact samples has a spread of about 12 %. Every entry of `fastsde.SOLVERS` that starts from noise runs,
with few (about 16), some (64) and many (500) calls, on the grid that is usual for it; Algorithm 6 with the noise kept
through rejections, its default, and drawn anew, as published. `reached`: below 1 and three standard errors of the
floor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from common import Row, command, described
from problems import Mixture, digits
from tqdm import tqdm

import fastsde

CALLS, FEW = (16, 64, 500), (16, 64)
ELSEWHERE = {"Resampling": "posterior.py", "FittedSolver": "fitted.py"}


def cases(sde: fastsde.SDE) -> Iterator[Row]:
    """The arguments of `sample` of every row, its solver among them."""
    for kept in (True, False):
        for rtol in (0.02, 0.05, 0.1, 0.5):
            yield {"solver": fastsde.ExtrapolatedEM(keep_path=kept), "rtol": rtol}
    for steps in (99, 179, 999):
        yield {"solver": fastsde.EulerMaruyama(steps)}
    for calls in (10, 12, 20):
        yield {"solver": fastsde.DDIM(), "grid": "log-SNR", "controller": fastsde.Grid.log_snr(sde, calls - 1)}
        for eta in (0.0, 0.5, 1.0):
            yield {"solver": fastsde.ExponentialPC(eta=eta), "nfe": calls}
    for solver in (
        fastsde.ExponentialPC(),
        *(fastsde.DPMSolverPP(order=k) for k in (2, 3)),
        *(fastsde.UniPC(order=k) for k in (2, 3)),
        *(fastsde.DEIS(order=k) for k in (2, 3)),
        fastsde.ProbabilityFlow(tableau=fastsde.RK4),
    ):
        for calls in FEW:
            yield {"solver": solver, "nfe": calls}
    for rtol in (0.05, 1e-3):
        yield {"solver": fastsde.ProbabilityFlow(), "rtol": rtol}
    for calls in CALLS:
        for eta in (0.0, 1.0):
            yield {"solver": fastsde.DDIM(eta=eta), "nfe": calls}
        for eta in (0.5, 1.0):
            yield {"solver": fastsde.ExponentialPC(eta=eta), "nfe": calls}
        yield {"solver": fastsde.DPMSolverPP(order=2, eta=1.0), "nfe": calls}
        yield {"solver": fastsde.SASolver(), "nfe": calls}
        yield {"solver": fastsde.ReverseDiffusion(), "nfe": calls}
        yield {"solver": fastsde.Ancestral(posterior=False), "nfe": calls}
        steps = (calls - 1) // 2
        for churn in (0.0, min(40 / steps, math.sqrt(2) - 1)):
            grid = fastsde.Grid.karras(sde, steps)
            yield {"solver": fastsde.Heun(churn=churn), "grid": "Karras", "controller": grid}
        corrected = fastsde.PredictorCorrector(fastsde.ReverseDiffusion(steps), fastsde.Langevin(0.04))
        yield {"solver": corrected}
        yield {"solver": fastsde.AnnealedLangevin(calls - 1)}
        yield {"solver": fastsde.ConsistentAnnealed(calls)}


def measure(problem: Mixture, unit: float, seeds: int, options: Row) -> Row:
    """Calls and ratios over several seeds."""
    said = ", ".join(f"{k} {options[k]:g}" for k in ("nfe", "rtol") if k in options) or options.pop("grid", "")
    many = isinstance(options["solver"], (fastsde.AnnealedLangevin, fastsde.EulerMaruyama)) or options.get("nfe") == 500
    rows = {"n": problem.n, "batch_size": 2000}
    runs = [fastsde.sample(problem.model(), seed=k, **rows, **options) for k in range(1 if many else seeds)]
    ratios = torch.tensor([problem.distance(r.samples[r.success]) / unit for r in runs])
    return {
        "solver": described(options["solver"]),
        "setting": said,
        "nfe": sum(float(r.nfe.double().mean()) for r in runs) / len(runs),
        "ratio": float(ratios.mean()),
        "spread": float(ratios.std()) if len(runs) > 1 else None,
        "seeds": len(runs),
    }


@command("digits", samples=100, seeds=1, only="DDIM")
def main(samples: int = 8000, seeds: int = 3, only: str = "") -> Row:
    """The table."""
    problem = digits(samples)
    unit, spread = problem.floor(20)
    todo = list(cases(problem.model().sde))
    known = {described(case["solver"]).split("(")[0] for case in todo} | set(ELSEWHERE)
    if missing := {kind.__name__ for kind in fastsde.SOLVERS} - known:
        raise SystemExit(f"no case for {', '.join(sorted(missing))}")
    rows = []
    for case in tqdm([case for case in todo if only in described(case["solver"])], disable=None):
        row = measure(problem, unit, seeds, case)
        rows.append(row | {"reached": row["ratio"] < 1 + 3 * spread / unit / row["seeds"] ** 0.5})
    return {"floor": unit, "floor_spread": spread, "rows": rows}


if __name__ == "__main__":
    main()
