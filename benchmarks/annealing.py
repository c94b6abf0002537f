r"""Does the noise of annealed sampling keep to its schedule? Figure 8.1 of the thesis, by running the samplers.

Data: a single point, whose score is known exactly, in many dimensions, so that the noise left in a sample is its
distance from alpha times the point. Sampling starts from that point with the noise of the first level. The levels are
geometric in rho = sigma / alpha, the noise level of y = x / alpha: on VE those of app. C.2 of the thesis (50 to 0.01 in
232 levels); on VP the same number of levels over the range of the process.

Annealed Langevin sampling (ALS) carries, after n steps at a level rho from noise v_0, the variance of Proposition 1,

    v_n^2 = v_0^2 (1 - eta)^{2n} + 2 rho^2 (1 - (1 - eta)^{2n}) / (2 - eta),    eta = eps / sigma_L^2

which stays above rho^2 whatever n. Consistent annealed sampling (CAS) has exactly rho^2 (Proposition 2). The step
sizes are those of table C.1; the one tuned for n = 5 is also used with fewer and more steps at each level.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import click
import torch
from common import RESULTS, save, table
from torch import Tensor
from tqdm import tqdm

import fastsde

POINT = 0.3
SIGMA_L = 0.01
LEVELS = 232
KEPT = 11
"""Every which level is kept in the results and drawn as a dot."""


def brief(number: float) -> str:
    """Two digits, and an exponent without leading zeros."""
    return f"{number:.1e}".replace("e-0", "e-")


@dataclasses.dataclass(frozen=True)
class Case:
    """One sampler with the step size it is run with, and its colour (Okabe and Ito's palette)."""

    name: str
    n_sigma: int
    eps: float
    color: str

    @property
    def eta(self) -> float:
        """The step size as a share."""
        return self.eps / SIGMA_L**2

    @property
    def solver(self) -> fastsde.Solver:
        """The solver."""
        kind = {"ALS": fastsde.AnnealedLangevin, "CAS": fastsde.ConsistentAnnealed}[self.name]
        return kind(levels=LEVELS, n_sigma=self.n_sigma, eta=self.eta)

    @property
    def label(self) -> str:
        """What it is called in table and figure."""
        return f"{self.name}, n = {self.n_sigma}, eps = {brief(self.eps)}"


CASES = (
    Case("ALS", 1, 3.6e-6, "#D55E00"),
    Case("ALS", 1, 1.8e-5, "#E69F00"),
    Case("ALS", 5, 3.6e-6, "#009E73"),
    Case("ALS", 25, 3.6e-6, "#0072B2"),
    Case("CAS", 1, 5.6e-6, "#CC79A7"),
)
PROCESSES = {"VE": fastsde.VESDE(SIGMA_L, 50.0, t_min=1e-9), "VP": fastsde.VPSDE()}


def schedule(sde: fastsde.SDE, t: Tensor) -> Tensor:
    """The level rho = sigma / alpha at each time."""
    return sde.sigma(t) / sde.alpha(t)


def measure(sde: fastsde.SDE, case: Case, samples: int, dimension: int, seed: int) -> tuple[Tensor, Tensor]:
    """The levels, and the standard deviation of the noise in y at the end of each, both with shape (L,).

    No trajectory keeps the work at the first level: its entry is the start, before any step.
    """
    model = fastsde.ScoreModel(lambda x, t: torch.full_like(x, POINT), sde, "sample", event_shape=(dimension,))
    data = torch.full((samples, dimension), POINT)
    r = fastsde.sample(
        model, x_data=data, solver=case.solver, seed=seed, batch_size=samples, trajectory=True, denoise=False
    )
    t = r.trajectory[0].t
    total = torch.zeros(len(t), dtype=torch.float64)
    for path in r.trajectory:
        noise = path.x.double() / sde.alpha(t)[:, None] - POINT
        total += noise.square().mean(1)
    return schedule(sde, t), (total / samples).sqrt()


def closed_form(case: Case, levels: Tensor) -> Tensor:
    """The standard deviations that Propositions 1 (ALS) and 2 (CAS) give, with shape (L,)."""
    if case.name == "CAS":
        return levels
    kept = (1 - case.eta) ** (2 * case.n_sigma)
    variances = [float(levels[0]) ** 2]
    for level in levels.tolist():
        variances.append(variances[-1] * kept + 2 * level**2 / (2 - case.eta) * (1 - kept))
    # After the start come the ends of all levels; the first entry is the start, as measured.
    return torch.tensor([variances[0], *variances[2:]], dtype=torch.float64).sqrt()


def draw(curves: dict[tuple[str, Case], tuple[Tensor, Tensor]], path: Path) -> None:
    """Redraws Figure 8.1: a row for each process; the noise on the left, its excess on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(PROCESSES), 2, figsize=(11, 8), sharex=True, layout="constrained")
    number = range(1, LEVELS + 1)
    for name, (left, right) in zip(PROCESSES, axes, strict=True):
        for k, case in enumerate(CASES):
            levels, measured = curves[name, case]
            # Dots of different samplers at different levels, so that they do not hide each other.
            expected, some = closed_form(case, levels), slice(2 + 2 * k, None, KEPT)
            dots = {"linestyle": "none", "marker": "o", "markersize": 4.5, "color": case.color}
            if k == 0:
                left.plot(number, levels, color="black", linewidth=1, label="schedule")
            left.plot(number[some], measured[some], **dots, label=case.label, zorder=3)
            if case.name == "ALS":
                left.plot(number, expected, color=case.color, linewidth=1.2)
                right.plot(number[1:], (expected / levels - 1)[1:], color=case.color, linewidth=1.2)
                right.plot(number[some], (measured / levels - 1)[some], **dots)
        limit = math.sqrt(2 / (2 - CASES[0].eta)) - 1
        right.axhline(limit, color="black", linestyle="--", linewidth=1)
        right.annotate(
            f"eps = {brief(CASES[0].eps)}, however many steps: {limit:.4f}",
            (LEVELS, limit),
            xytext=(0, -5),
            textcoords="offset points",
            ha="right",
            va="top",
        )
        first, last = (f"{float(v):.3g}" for v in levels[[0, -1]])
        left.set(
            yscale="log",
            ylabel="standard deviation $v$ of the noise in $y$",
            title=f"{name}: levels from {first} to {last}",
        )
        right.set(
            yscale="log",
            ylim=(4e-3, 12),
            ylabel="excess over the schedule, $v/\\rho - 1$",
            title=f"{name}: ALS, never on schedule",
        )
        for axis in (left, right):
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel(f"number of the noise level, of {LEVELS}; n steps at each")
    axes[0][0].legend(loc="lower left", frameon=False, title="dots: measured; lines: closed form", alignment="left")
    figure.savefig(path, dpi=130)
    plt.close(figure)


@click.command(help=__doc__.split("\n", 1)[0], context_settings={"show_default": True})
@click.option("--samples", default=64)
@click.option("--dimension", default=1024, help="Dimension of the data.")
@click.option("--seed", default=0)
@click.option("--threads", default=2, help="Threads of torch.")
@click.option("--keep/--discard", default=True, help="Whether to write results/annealing.json and .png.")
def main(samples: int, dimension: int, seed: int, threads: int, keep: bool) -> None:
    """Prints the table, and writes it and the figure."""
    settings = click.get_current_context().params
    torch.set_num_threads(threads)
    error = (1 / (2 * samples * dimension)) ** 0.5
    rows, curves = [], {}
    runs = [(name, case) for name in PROCESSES for case in CASES]
    for name, case in tqdm(runs, desc="runs", disable=None):
        levels, measured = measure(PROCESSES[name], case, samples, dimension, seed)
        expected = closed_form(case, levels)
        curves[name, case] = levels, measured
        deviation, excess = measured / expected - 1, expected / levels - 1
        worst = float(deviation.abs().max())
        rows.append(
            {
                "sde": name,
                "solver": case.name,
                "n_sigma": case.n_sigma,
                "eps": case.eps,
                "eta": case.eta,
                "deviation": worst,
                "deviation_in_standard_errors": worst / error,
                "measured_excess_largest": float((measured / levels - 1)[1:].max()),
                "measured_excess_last": float((measured / levels - 1)[-1]),
                "excess_largest": float(excess[1:].max()),
                "excess_smallest": float(excess[1:].min()),
                # Five standard errors; 231 levels, of which neighbours see nearly the same noise.
                "ok": worst < 5 * error,
                "levels": levels[::KEPT].tolist(),
                "measured": measured[::KEPT].tolist(),
                "closed_form": expected[::KEPT].tolist(),
            }
        )
    table(
        ("SDE, sampler", "max deviation", "in SE", "largest excess", "smallest", "at the end", "pass mark"),
        [
            (
                f"{r['sde']}, {r['solver']}, n = {r['n_sigma']}, eps = {brief(r['eps'])}",
                f"{100 * r['deviation']:.2f} %",
                f"{r['deviation_in_standard_errors']:.1f}",
                f"{100 * r['measured_excess_largest']:.2f} %",
                f"{100 * r['excess_smallest']:.2f} %",
                f"{100 * r['measured_excess_last']:.2f} %",
                f"5 SE {'ok' if r['ok'] else 'MISSED'}",
            )
            for r in rows
        ],
    )
    print(
        f"\ndeviation: measured standard deviation from the closed form, standard error {100 * error:.2f} %;\n"
        "excess over the schedule: largest and at the end measured, smallest by the closed form"
    )
    if keep:
        save("annealing", settings, rows)
        draw(curves, RESULTS / "annealing.png")
        print("written: results/annealing.png")


if __name__ == "__main__":
    main()
