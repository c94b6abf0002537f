r"""Figure 8.3 and the shape of Table 8.1: ALS and CAS against step size, levels dilated or not, denoised or not.

Data: the digits mixture of `digits.py` with an exact score, under the VE process of app. C.2 of the thesis: levels from
50 to 0.01, geometric, 232 of them. n_sigma is the number of Langevin steps at a level for ALS, and dilates the levels
for CAS, so that both take the same calls. The step size is eta = eps / sigma_L^2. CAS takes any eta from 1 - gamma on:
gamma is 0.964 with n_sigma 1 and 0.993 with 5, so its range is wider there. In place of FID the Frechet distance over
that of as many exact samples: 1 is perfect, one draw has a spread of about 12 %. "Not denoised" is the state with the
noise of the last level; exact samples with that noise have the distance that is printed first.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import torch
from common import RESULTS, save, table
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from problems import Mixture, digits

import fastsde

SIGMA_MAX, SIGMA_MIN, LEVELS = 50.0, 0.01, 232
ETAS = (0.01, 0.02, 0.04, 0.06, 0.1, 0.2, 0.4, 0.7)
COLORS = {"ALS": "#d55e00", "CAS": "#0072b2"}


def ve_model(problem: Mixture) -> fastsde.ScoreModel:
    """The mixture under the VE process, from t_min = 0: the last level is sigma_min itself."""
    sde = fastsde.VESDE(SIGMA_MIN, SIGMA_MAX, t_min=1e-9)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return problem.denoise(x, sde.sigma(t.double()))

    return fastsde.ScoreModel(network, sde, "sample", event_shape=(problem.d,))


def solver_of(name: str, n_sigma: int, eta: float) -> fastsde.Solver:
    """ALS or CAS with that many steps."""
    kind = {"ALS": fastsde.AnnealedLangevin, "CAS": fastsde.ConsistentAnnealed}[name]
    return kind(levels=LEVELS, n_sigma=n_sigma, eta=eta)


def plot(rows: list[dict[str, object]], floor: float) -> None:
    """Draws results/annealed_steps.png."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=110, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for panel, n_sigma in zip(axes, (1, 5), strict=True):
        for name, color in COLORS.items():
            for key, style in (("raw", "--"), ("denoised", "-")):
                own = [r for r in rows if r["sampler"] == name and r["n_sigma"] == n_sigma]
                label = f"{name}, {'denoised' if key == 'denoised' else 'not denoised'}"
                panel.plot(
                    [r["eta"] for r in own], [r[key] for r in own], style, color=color, marker="o", ms=3, label=label
                )
        panel.axhline(1.0, color="0.6", linewidth=0.8)
        panel.axhline(floor, color="0.6", linewidth=0.8, linestyle=":")
        panel.set(xscale="log", yscale="log", xlabel="step size, eps / sigma_L$^2$", title=f"n_sigma = {n_sigma}")
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("distance / that of exact samples")
    axes[0].legend(fontsize=8)
    figure.savefig(RESULTS / "annealed_steps.png")


@click.command(help=__doc__.split("\n", 1)[0], context_settings={"show_default": True})
@click.option("--samples", "-n", default=1000)
@click.option("--threads", default=2)
@click.option("--keep/--discard", default=True, help="Whether to write results/annealed_steps.json and .png.")
def main(samples: int, threads: int, keep: bool) -> None:
    """Prints the table and writes it."""
    settings = click.get_current_context().params
    torch.set_num_threads(threads)
    problem = digits(samples)
    model, (floor, spread) = ve_model(problem), problem.floor(50)
    generator = torch.Generator().manual_seed(1)
    exact = problem.draw(samples, generator)
    noisy = problem.distance(exact + SIGMA_MIN * torch.randn(exact.shape, generator=generator)) / floor
    rows: list[dict[str, object]] = []
    jobs = [(n_sigma, name, eta) for n_sigma in (1, 5) for name in COLORS for eta in ETAS]
    for n_sigma, name, eta in tqdm(jobs, disable=None):
        row: dict[str, object] = {"sampler": name, "n_sigma": n_sigma, "eta": eta}
        try:
            r = fastsde.sample(model, n=samples, solver=solver_of(name, n_sigma, eta), batch_size=2000, denoise=False)
        except ValueError as error:  # CAS below 1 - gamma: its noise would be imaginary
            rows.append(row | {"note": str(error)[:60]})
            continue
        last = torch.full((samples,), SIGMA_MIN, dtype=torch.float64)
        row["nfe"] = float(r.nfe.double().mean())
        row["raw"] = problem.distance(r.samples) / floor
        row["denoised"] = problem.distance(problem.denoise(r.samples, last)) / floor
        rows.append(row)
    keys = ("sampler", "n_sigma", "eta", "nfe", "raw", "denoised")
    print(f"exact samples with noise {SIGMA_MIN}: {noisy:.2f}; spread of exact samples: {spread / floor:.2f}\n")
    table(keys, [[f"{v:.4g}" if isinstance(v := row.get(k, "-"), float) else v for k in keys] for row in rows])
    if keep:
        plot([row for row in rows if "raw" in row], noisy)
        save("annealed_steps", settings, {"floor": floor, "spread": spread, "exact_with_noise": noisy, "rows": rows})


if __name__ == "__main__":
    main()
