r"""Every sampler on the digits mixture: which reach the floor of exact samples, and which cannot?

The problem, the distance and the floor are those of `digits.py`: 64 dimensions, VP, exact score, the Frechet distance
of 8000 samples over that of 8000 exact ones. Each entry of `fastsde.SOLVERS` runs, in its variants, with few (about
16), some (64) and many (500) network calls; methods of higher order need no 500. A row reaches the floor if its ratio,
averaged over its seeds, is below 1 plus three standard errors of such an average of exact samples.

What held: every solver but `AnnealedLangevin` reaches the floor with 500 calls or fewer; none of 1.4 million samples
failed. With 16 calls `ExponentialPC`, `UniPC`, `DPMSolverPP` (orders 2 and 3) and `DEIS` (3) on the ODE are there
already; of the first-order ones none is with 64. `AnnealedLangevin` is at 4.6 (n 1) and 5.7 (n 5) times the floor with
500. Expected, but too small to see at this sample size: the bias of the Langevin corrector (1.18 at snr 0.16, one
seed), the noise of t_min without the denoising call (0.004), and errors below atol in `ExtrapolatedEM`, at the floor at
rtol 0.05 and 0.02 (and far above it at 0.5). Two seeds of a stochastic solver differ by up to 0.45.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import click
import torch
from common import RESULTS, save, table
from digits import digits_mixture, floor, measure
from torch import Tensor
from tqdm import tqdm

import fastsde
from fastsde.score.analytic import MixtureScore

FEW, MANY = (16, 64), 500
CALLS = (*FEW, MANY)
FLOOR = "floor"
FIRST = "floor, slowly: first order"
PANELS = {
    "Exponential Adams": ("ExponentialPC", "DPMSolverPP", "UniPC", "DEIS", "SASolver"),
    "DDIM, Runge-Kutta, Heun": ("DDIM", "ProbabilityFlow", "Heun"),
    "Reverse SDE": ("ExtrapolatedEM", "EulerMaruyama", "ReverseDiffusion", "Ancestral", "PredictorCorrector"),
    "Annealed": ("AnnealedLangevin", "ConsistentAnnealed"),
}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^v<>p"
TICKS = (16, 32, 64, 128, 250, 500)
TOP = 1e6
"""Top of the figure: room for the legend above the points."""


class Stacked(MixtureScore):
    """The same score for full covariances in two matrix products, twice as fast."""

    def exact_score(self, x: Tensor, t: Tensor) -> Tensor:
        k, d = self.means.shape
        # On a grid all rows have one time.
        alpha, sigma2 = self._scales(x, t[:1] if (t == t[0]).all() else t)
        basis = self.bases.to(x).permute(1, 0, 2).reshape(d, k * d)
        centres = torch.einsum("kd,kdr->kr", self.means.to(x), self.bases.to(x))
        along = alpha[..., None] * centres - (x @ basis).reshape(-1, k, d)
        variance = alpha[..., None] ** 2 * self.variances.to(x) + sigma2[..., None]
        scaled = along / variance
        logits = self.weights.to(x).log() - 0.5 * ((along * scaled).sum(2) + variance.log().sum(2))
        return (logits.softmax(1)[..., None] * scaled).flatten(1) @ basis.T


@dataclasses.dataclass(frozen=True)
class Case:
    """One run: a solver with its settings, and what theory says of it with many calls; `key` rows get every seed."""

    family: str
    settings: str
    calls: int | None
    options: dict[str, object]
    expected: str = FLOOR
    key: bool = False


def cases(sde: fastsde.SDE) -> list[Case]:
    """Every entry of `fastsde.SOLVERS`, in its variants, at each number of calls (the denoising one included)."""
    found: list[Case] = []

    def add(
        kind: type[fastsde.Solver],
        settings: str = "",
        expected: str = FLOOR,
        *,
        calls: tuple[int, ...] = CALLS,
        per_step: int = 1,
        grid: Callable[[fastsde.SDE, int], fastsde.Grid] | None = None,
        key: bool = False,
        **arguments: object,
    ) -> None:
        for k in calls:
            steps = (k - 1) // per_step
            options = (
                {"solver": kind(steps=steps, **arguments)}
                if grid is None
                else {"solver": kind(**arguments), "controller": grid(sde, steps)}
            )
            found.append(Case(kind.__name__, settings, k, options, expected, key or k < MANY))

    def other(solver: fastsde.Solver, settings: str, calls: int | None, expected: str, **options: object) -> None:
        key = options.pop("key", False) or calls is None or calls < MANY
        found.append(Case(type(solver).__name__, settings, calls, {"solver": solver} | options, expected, bool(key)))

    level, blind = 2 / 256, "above: blind to errors below atol"
    for rtol in (0.5, 0.05, 0.02):
        other(fastsde.ExtrapolatedEM(), f"rtol {rtol:g}, atol 1/128", None, blind, rtol=rtol, atol=level)
    other(fastsde.ExtrapolatedEM(), "rtol 0.02, atol 1/1024", None, FLOOR, rtol=0.02, atol=level / 8)

    add(fastsde.ExponentialPC, "eta 0", calls=FEW, eta=0)
    add(fastsde.ExponentialPC, "eta 1", key=True, eta=1)
    add(fastsde.DDIM, "eta 0, uniform t", FIRST, key=True, eta=0)
    add(fastsde.DDIM, "eta 0, log-SNR", FIRST, eta=0, grid=fastsde.Grid.log_snr)
    add(fastsde.DDIM, "eta 1, uniform t", FIRST, calls=FEW, eta=1)
    for order in (1, 2, 3):
        # Order 1 is DDIM on the same grid.
        add(fastsde.DPMSolverPP, f"{order}, eta 0", FLOOR if order > 1 else FIRST, calls=FEW, order=order)
    for order in (1, 2, 3):
        expected = FLOOR if order > 1 else FIRST
        add(fastsde.DPMSolverPP, f"{order}, eta 1", expected, key=order == 2, order=order, eta=1)
    for order in (2, 3):
        add(fastsde.UniPC, f"{order}", calls=FEW, order=order)
    for order in (2, 3):
        add(fastsde.DEIS, f"{order}", calls=FEW, order=order)
    add(fastsde.SASolver, "eta 1", key=True, eta=1)
    add(fastsde.SASolver, "eta 1 for rho in (0.05, 1)", eta=lambda rho: (rho > 0.05) * (rho < 1.0) * 1.0)

    for tableau, rtols in ((fastsde.DORMAND_PRINCE, (0.05, 1e-3)), (fastsde.HEUN, (0.02, 1e-3))):
        for rtol in rtols:
            solver, settings = fastsde.ProbabilityFlow(tableau=tableau), f"{tableau}, rtol {rtol:g}"
            other(solver, settings, None, FLOOR, rtol=rtol, atol=rtol / 10)
    add(fastsde.ProbabilityFlow, "RK4", calls=FEW, per_step=4, tableau=fastsde.RK4)
    add(fastsde.ProbabilityFlow, "EULER", FIRST, calls=FEW, tableau=fastsde.EULER)
    for name, grid in (("Karras", fastsde.Grid.karras), ("log-SNR", fastsde.Grid.log_snr)):
        add(fastsde.Heun, f"{name}, no churn", calls=FEW, per_step=2, grid=grid)
    for k in CALLS:
        # S_churn as published, divided by the number of steps.
        steps = (k - 1) // 2
        solver, grid = fastsde.Heun(churn=min(40 / steps, math.sqrt(2) - 1)), fastsde.Grid.karras(sde, steps)
        other(solver, "Karras, S_churn 40", k, FIRST, controller=grid)

    add(fastsde.EulerMaruyama, "", FIRST, key=True)
    add(fastsde.ReverseDiffusion, "", FIRST)
    add(fastsde.Ancestral, "posterior variance", FIRST)
    add(fastsde.Ancestral, "forward variance", FIRST, key=True, posterior=False)
    for snr in (0.01, 0.04, 0.16):
        expected = FIRST if snr == 0.01 else "above: Langevin bias O(snr^2)"
        for k in CALLS:
            solver = fastsde.PredictorCorrector(fastsde.ReverseDiffusion((k - 1) // 2), fastsde.Langevin(snr))
            other(solver, f"ReverseDiffusion, snr {snr}", k, expected)
    for n_sigma in (1, 5):
        for k in CALLS:
            solver = fastsde.AnnealedLangevin((k - 1) // n_sigma, n_sigma)
            other(solver, f"n {n_sigma}, EDS", k, "above: excess noise at finite n_sigma", key=n_sigma == 1)
        solver = fastsde.AnnealedLangevin(MANY // n_sigma, n_sigma)
        other(solver, f"n {n_sigma}, no EDS", MANY, "above: excess noise, and sigma(t_min)", denoise=False)
    for n_sigma in (1, 5):
        for k in CALLS if n_sigma == 1 else (MANY,):
            solver = fastsde.ConsistentAnnealed((k - 1) // n_sigma + 1, n_sigma)
            other(solver, f"n {n_sigma}, EDS", k, FIRST, key=n_sigma == 1)
    solver = fastsde.ConsistentAnnealed(MANY + 1)
    other(solver, "n 1, no EDS", MANY, "floor, and sigma(t_min)", denoise=False)
    return found


def not_denoised(model: MixtureScore, n_floor: float) -> float:
    """What sigma(t_min) adds to the ratio: the distance of the exact law at t_min, over the floor."""
    mean, covariance = model.moments()
    t = torch.tensor([model.sde.t_min], dtype=torch.float64)
    alpha, sigma = model.sde.alpha(t), model.sde.sigma(t)
    values = torch.linalg.eigvalsh(covariance)
    spread = ((alpha**2 * values + sigma**2).sqrt() - values.sqrt()).square().sum()
    return float((spread + ((1 - alpha) * mean).square().sum()) / n_floor)


def line_of(row: dict[str, object]) -> str:
    """The line of the figure that a row belongs to: its solver and settings, whatever the rtol."""
    parts = [part for part in str(row["settings"]).split(", ") if not part.startswith("rtol")]
    return f"{row['family']} {', '.join(parts)}".strip()


def draw(rows: list[dict[str, object]], limit: float, path: Path) -> None:
    """Calls against the ratio to the floor, one panel for each kind of solver."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(13, 10), sharex=True, layout="constrained")
    for (title, families), axis in zip(PANELS.items(), axes.flat, strict=True):
        axis.axhspan(2 - limit, limit, color="0.88", zorder=0, label="floor, 3 standard deviations of one draw")
        axis.axhline(1, color="black", linewidth=1, zorder=1)
        lines: dict[str, list[tuple[float, float]]] = {}
        for r in rows:
            if r["family"] in families:
                lines.setdefault(line_of(r), []).append((float(r["nfe"]), float(r["ratio"])))
        for k, (name, points) in enumerate(lines.items()):
            calls, ratios = zip(*sorted(points), strict=True)
            style = {"color": COLORS[k % len(COLORS)], "linestyle": ("-", "--", ":")[k // len(COLORS)]}
            axis.plot(calls, ratios, marker=MARKERS[k % len(MARKERS)], markersize=5, linewidth=1.3, label=name, **style)
        axis.set(xscale="log", yscale="log", title=title, ylim=(0.5, TOP))
        axis.set_xticks(TICKS, map(str, TICKS))
        axis.set_xticks([], minor=True)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8, loc="upper right")
    for axis in axes[-1]:
        axis.set_xlabel("network calls per sample, the denoising one included")
    for axis in axes[:, 0]:
        axis.set_ylabel("Frechet distance / that of exact samples")
    figure.savefig(path, dpi=130)
    plt.close(figure)


@click.command(help=__doc__.split("\n", 1)[0], context_settings={"show_default": True})
@click.option("--samples", "-n", default=8000, help="Samples of each run and of the floor.")
@click.option("--seeds", default=2, help="Runs of each row, but for those with many calls that are not key: one.")
@click.option("--ridge", default=4e-4, help="Added to the diagonal of each covariance.")
@click.option("--floor-draws", default=50, help="Draws of exact samples behind the floor.")
@click.option("--batch-size", default=2000)
@click.option("--threads", default=2, help="Threads of torch.")
@click.option("--only", default="", help="Run the solvers whose name contains this.")
@click.option("--keep/--discard", default=True, help="Whether to write results/samplers.json and .png.")
def main(
    samples: int, seeds: int, ridge: float, floor_draws: int, batch_size: int, threads: int, only: str, keep: bool
) -> None:
    """Prints the table, and writes it and the figure."""
    settings = click.get_current_context().params
    torch.set_num_threads(threads)
    exact = digits_mixture(ridge)
    unit, spread = floor(exact, samples, floor_draws)
    share, blur = spread / unit, not_denoised(exact, unit)
    print(f"floor: {unit:.4f}, standard deviation of one draw {100 * share:.0f} %, {floor_draws} draws;")
    print(f"sigma(t_min), where it is not removed, adds {blur:.3f} to the ratio\n")
    model = Stacked(exact.sde, exact.weights, exact.means, exact.bases, exact.variances)
    todo = cases(exact.sde)
    missing = {kind.__name__ for kind in fastsde.SOLVERS} - {case.family for case in todo}
    if missing:
        raise SystemExit(f"no case for {', '.join(sorted(missing))}")
    rows = []
    for case in tqdm([case for case in todo if only in case.family], disable=None):
        runs = seeds if case.key else 1
        row = measure(model, case.settings, unit, runs, samples, batch_size, **case.options)
        limit = 1 + 3 * share / runs**0.5
        rows.append(
            {"family": case.family, "settings": case.settings, "expected": case.expected}
            | {key: row[key] for key in ("nfe", "nfe_max", "ratio", "spread", "ratios", "failed")}
            | {"limit": limit, "reached": row["ratio"] < limit}
        )
    header = ("solver", "settings", "NFE", "ratio", "spread", "failed", "", "expected with many calls")
    body = [
        (
            r["family"],
            r["settings"],
            f"{r['nfe']:.0f}",
            f"{r['ratio']:.2f}" if r["ratio"] < 100 else f"{r['ratio']:.0f}",
            "-" if r["spread"] is None else f"{r['spread']:.2f}",
            r["failed"],
            "floor" if r["reached"] else "",
            r["expected"],
        )
        for r in rows
    ]
    table(header, body)
    print(f"\n'floor': below 1 + 3 standard errors, {1 + 3 * share:.2f} for one seed, of the floor's own spread")
    if keep:
        save("samplers", settings, {"floor": unit, "floor_spread": spread, "not_denoised": blur, "solvers": rows})
        draw(rows, 1 + 3 * share, RESULTS / "samplers.png")
        print("written: results/samplers.png")


if __name__ == "__main__":
    main()
