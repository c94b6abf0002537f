r"""What do restarts buy? `AdaptiveGrid` against the plain grid at equal mean calls, and who pays.

The base grid is that of `sample(rtol=...)`, the finer ones have twice and four times its steps.

`rare`: 97 % one smooth Gaussian, 3 % tight clusters near each other (512 dimensions). `digits`: all samples are about
as hard. `scales`: sixteen components from narrow to wide (peers/problems.py has all three). Errors are root mean square
distances to a run with 400 steps from the same noise, eta 0; `grid at k` are ExponentialPC's own grids with the nearest
numbers of calls, `equal steps` in log-SNR with the mean, rounded up. `ratio` is the error over that of the grid between
its two nearest numbers of calls, squares interpolated; its interval is that of 200 bootstrap samples. Errors are ruled
by the few samples that end in another cluster: take 20,000.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from common import RESULTS, save, table
from problems import Mixture, digits, rare, scales
from torch import Tensor

import fastsde
from fastsde.arguments import resolve_controller

RTOLS = (0.2, 0.1, 0.05, 0.02)


def with_restarts(model: fastsde.ScoreModel, rtol: float) -> fastsde.AdaptiveGrid:
    """The grid of a tolerance, and two finer ones behind it."""
    plain = resolve_controller(model, model.sde, fastsde.ExponentialPC(), None, rtol, None)
    assert isinstance(plain, fastsde.AdaptiveGrid)
    grids = [fastsde.Grid.tapered(model.sde, plain.grids[0].steps << k) for k in range(3)]
    return fastsde.AdaptiveGrid(grids, rtol, plain.atol)


def errors(each: Tensor, hard: Tensor) -> dict[str, float]:
    """Root mean squares over all samples and the hard ones, and the median, of squared errors."""
    found = {"rms": float(each.mean().sqrt()), "median": float(each.median().sqrt())}
    return found | ({"rms, hard": float(each[hard].mean().sqrt())} if hard.any() else {})


def ratio(own: Tensor, calls: Tensor, low: Tensor, high: Tensor) -> dict[str, object]:
    """Error over that of the grid at the same mean calls, with the range of 95 % of 200 bootstrap samples.

    Squared errors and calls of each sample, and the grid's squared errors at the two nearest numbers of calls; the same
    samples are drawn for all.
    """

    def once(rows: Tensor) -> float:
        part = calls[rows].mean() - math.floor(calls.mean())
        return float((own[rows].mean() / ((1 - part) * low[rows].mean() + part * high[rows].mean())).sqrt())

    n = len(own)
    generator = torch.Generator().manual_seed(0)
    drawn = sorted(once(torch.randint(n, (n,), generator=generator)) for _ in range(200))
    return {"ratio": once(torch.arange(n)), "ratio_range": [drawn[4], drawn[-5]]}


def study(problem: Mixture) -> tuple[list[dict[str, object]], dict[str, list[int]]]:
    """Rows of the table, and the calls of easy and hard samples at rtol 0.05."""
    model, rows, histogram = problem.model(), [], {}
    options = {"n": problem.n, "batch_size": 2000}
    exact = fastsde.sample(model, controller=fastsde.Grid.log_snr(model.sde, 400), **options).samples
    nearest = torch.cdist(exact, problem.means).argmin(1)
    hard = (nearest > 0) if problem.name == "rare" else torch.zeros(problem.n, dtype=torch.bool)

    def add(steps: str, x: Tensor, calls: float, most: int) -> Tensor:
        each = (x - exact).double().square().mean(1)
        row = {"problem": problem.name, "steps": steps, "calls": round(calls, 2), "max": most}
        rows.append(row | errors(each, hard) | {"distance": problem.distance(x)})
        return each

    for rtol in RTOLS:
        r = fastsde.sample(model, controller=with_restarts(model, rtol), **options)
        each = r.nfe.double()
        calls = float(each.mean())
        own, place = add(f"rtol {rtol:g}", r.samples, calls, int(r.nfe.max())), len(rows) - 1
        if rtol == 0.05:
            histogram = {"easy": r.nfe[~hard].tolist(), "hard": r.nfe[hard].tolist()}
        low, high = (
            add(f"grid at {k}", fastsde.sample(model, nfe=k, **options).samples, k, k)
            for k in (math.floor(calls), math.floor(calls) + 1)
        )
        rows[place] |= ratio(own, each, low, high)
        k = math.ceil(calls)
        equal = fastsde.sample(model, controller=fastsde.Grid.log_snr(model.sde, k - 1), **options)
        add(f"equal steps at {k}", equal.samples, k, k)
    return rows, histogram


@click.command(help=__doc__.split("\n", 1)[0], context_settings={"show_default": True})
@click.option("--samples", "-n", default=20_000)
@click.option("--threads", default=2)
@click.option("--keep/--discard", default=True, help="Whether to write results/adaptivity.json and .png.")
def main(samples: int, threads: int, keep: bool) -> None:
    """Prints the table, writes it and draws the histogram."""
    settings = click.get_current_context().params
    torch.set_num_threads(threads)
    rows, histograms = [], {}
    for problem in (rare(samples), digits(samples), scales(samples)):
        unit = problem.floor(6)[0]
        found, histograms[problem.name] = study(problem)
        rows += [row | {"distance": row["distance"] / unit} for row in found]
    header = ("problem", "steps", "calls", "max", "rms", "median", "rms, hard", "distance", "ratio")
    table(header, [[f"{v:.5f}" if isinstance(v := r.get(h, "-"), float) else v for h in header] for r in rows])
    if keep:
        save("adaptivity", settings, rows)
        figure(histograms)


def figure(histograms: dict[str, dict[str, list[int]]]) -> None:
    """How many samples took how many calls, easy and hard ones apart."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(11, 3), layout="constrained")
    for ax, (name, parts) in zip(fig.subplots(1, len(histograms)), histograms.items(), strict=True):
        top = max(max(calls) for calls in parts.values() if calls)
        for label, color in (("easy", "0.6"), ("hard", "#D55E00")):
            if parts[label]:
                shown = label if parts["hard"] else "all"
                ax.hist(
                    parts[label], range(14, top + 3, 2), color=color, label=f"{shown} samples", align="left", alpha=0.8
                )
        ax.set(yscale="log", xlabel="network calls", ylabel="samples", title=f"{name}, rtol 0.05")
        ax.legend()
    fig.savefig(RESULTS / "adaptivity.png", dpi=110)


if __name__ == "__main__":
    main()
