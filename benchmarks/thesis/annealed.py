r"""Annealed Langevin (ALS) and consistent annealed sampling (CAS): Figures 8.1 and 8.3 of the thesis, exact scores.

`noise`: does the noise keep to its schedule? Data: a single point in many dimensions, so that the noise left in a
sample is its distance from alpha times the point. ALS carries, after n steps at a level rho from noise v_0, the
variance of Proposition 1,

    v_n^2 = v_0^2 (1 - eta)^{2n} + 2 rho^2 (1 - (1 - eta)^{2n}) / (2 - eta),    eta = eps / sigma_L^2

which stays above rho^2 whatever n; CAS has exactly rho^2 (Proposition 2). Step sizes are those of table C.1. Mark: the
measured standard deviation is within five standard errors of the closed form at every level.

`steps`: which step sizes work? The digits mixture under the VE process of app. C.2, 232 levels from 50 to 0.01. n_sigma
is the number of steps at a level for ALS, and dilates the levels for CAS, so that both take the same calls. Distances
are over that of as many exact samples; `raw` is the state with the noise of the last level.
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import click
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Row, command, table
from problems import digits

import fastsde

POINT, LEVELS, SIGMA_MIN, SIGMA_MAX = 0.3, 232, 0.01, 50.0
SAMPLERS = {"ALS": fastsde.AnnealedLangevin, "CAS": fastsde.ConsistentAnnealed}
CASES = (("ALS", 1, 3.6e-6), ("ALS", 1, 1.8e-5), ("ALS", 5, 3.6e-6), ("ALS", 25, 3.6e-6), ("CAS", 1, 5.6e-6))
"""Sampler, n_sigma and eps."""
VE = fastsde.VESDE(SIGMA_MIN, SIGMA_MAX, t_min=1e-9)
"""From t_min = 0: the last level is sigma_min itself."""


@click.group(help=__doc__)
def main() -> None:
    """Both figures."""


def measured(sde: fastsde.SDE, solver: fastsde.Solver, samples: int, dimension: int) -> tuple[Tensor, Tensor]:
    """The levels, and the standard deviation of the noise in x / alpha at the end of each, both with shape (L,).

    No trajectory keeps the work at the first level: its entry is the start, before any step.
    """
    model = fastsde.ScoreModel(lambda x, t: torch.full_like(x, POINT), sde, "sample", event_shape=(dimension,))
    start = {"x_data": torch.full((samples, dimension), POINT), "batch_size": samples, "seed": 0}
    r = fastsde.sample(model, solver=solver, trajectory=True, denoise=False, **start)
    t = r.trajectory[0].t
    noise = [(path.x.double() / sde.alpha(t)[:, None] - POINT).square().mean(1) for path in r.trajectory]
    return sde.sigma(t) / sde.alpha(t), (sum(noise) / samples).sqrt()


def closed_form(name: str, n: int, eta: float, levels: Tensor) -> Tensor:
    """The standard deviations that Propositions 1 (ALS) and 2 (CAS) give, with shape (L,)."""
    if name == "CAS":
        return levels
    kept, variances = (1 - eta) ** (2 * n), [float(levels[0]) ** 2]
    for level in levels.tolist():
        variances.append(variances[-1] * kept + 2 * level**2 / (2 - eta) * (1 - kept))
    # After the start come the ends of all levels; the first entry is the start, as measured.
    return torch.tensor([variances[0], *variances[2:]], dtype=torch.float64).sqrt()


@command("Does the noise keep to its schedule?", "annealing", main, samples=4, dimension=64)
@click.option("--samples", default=64)
@click.option("--dimension", default=1024, help="Dimension of the data.")
def noise(samples: int, dimension: int) -> list[Row]:
    """Prints the table: shares of the standard deviation."""
    error, rows = (1 / (2 * samples * dimension)) ** 0.5, list[Row]()
    for (sde_name, sde), (name, n, eps) in tqdm(list(product({"VE": VE, "VP": fastsde.VPSDE()}.items(), CASES))):
        eta = eps / SIGMA_MIN**2
        levels, found = measured(sde, SAMPLERS[name](levels=LEVELS, n_sigma=n, eta=eta), samples, dimension)
        expected = closed_form(name, n, eta, levels)
        row: Row = {"sde": sde_name, "sampler": name, "n_sigma": n, "eps": eps}
        row["deviation in standard errors"] = float((found / expected - 1).abs().max()) / error
        row |= {"largest excess": float((found / levels - 1)[1:].max()), "at the end": float((found / levels - 1)[-1])}
        rows.append(row | {"ok": row["deviation in standard errors"] < 5})
    table(rows)
    return rows


@command("Which step sizes work?", "annealed_steps", main, samples=64, etas=[0.1])
@click.option("--samples", "-n", default=1000)
@click.option("--eta", "etas", type=float, multiple=True, default=(0.01, 0.02, 0.04, 0.06, 0.1, 0.2, 0.4, 0.7))
def steps(samples: int, etas: tuple[float, ...]) -> Row:
    """Prints the table."""
    problem, last = digits(samples), torch.full((samples,), SIGMA_MIN, dtype=torch.float64)
    floor, spread = problem.floor(50)
    model, generator, rows = problem.model(VE), torch.Generator().manual_seed(1), list[Row]()
    exact = problem.draw(samples, generator)
    noisy = problem.distance(exact + SIGMA_MIN * torch.randn(exact.shape, generator=generator)) / floor
    for n_sigma, name, eta in tqdm(list(product((1, 5), SAMPLERS, etas)), disable=None):
        row: Row = {"sampler": name, "n_sigma": n_sigma, "eta": eta}
        try:
            solver = SAMPLERS[name](levels=LEVELS, n_sigma=n_sigma, eta=eta)
            r = fastsde.sample(model, n=samples, solver=solver, batch_size=2000, seed=0, denoise=False)
        except ValueError:  # CAS below 1 - gamma: its noise would be imaginary
            continue
        row |= {"nfe": float(r.nfe.double().mean()), "raw": problem.distance(r.samples) / floor}
        rows.append(row | {"denoised": problem.distance(problem.denoise(r.samples, last)) / floor})
    print(f"exact samples with noise {SIGMA_MIN}: {noisy:.2f}; spread of exact samples: {spread / floor:.2f}")
    table(rows)
    return {"floor": floor, "spread": spread, "exact_with_noise": noisy, "rows": rows}


if __name__ == "__main__":
    main()
