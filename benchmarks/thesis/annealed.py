r"""Which step sizes work for annealed Langevin (ALS) and consistent annealed sampling (CAS)?

Figure 8.3 of the thesis with an exact score: the digits mixture under the VE process of app. C.2, 232 levels from 50 to
0.01. n_sigma is the number of steps at a level for ALS, and dilates the levels for CAS, so that both take the same
calls. eta is the step size, eps / sigma_L^2. Distances are over that of as many exact samples; `raw` is the state with
the noise of the last level. That ALS carries more noise than its schedule, and CAS exactly as much, is in the tests.
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import click
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Row, command, table
from problems import digits

import fastsde

LEVELS, SIGMA_MIN, SIGMA_MAX = 232, 0.01, 50.0
SAMPLERS = {"ALS": fastsde.AnnealedLangevin, "CAS": fastsde.ConsistentAnnealed}
VE = fastsde.VESDE(SIGMA_MIN, SIGMA_MAX, t_min=1e-9)
"""From t_min = 0: the last level is sigma_min itself."""


@command(__doc__, "annealed_steps", samples=64, etas=[0.1])
@click.option("--samples", "-n", default=1000)
@click.option("--eta", "etas", type=float, multiple=True, default=(0.01, 0.02, 0.04, 0.06, 0.1, 0.2, 0.4, 0.7))
def main(samples: int, etas: tuple[float, ...]) -> Row:
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
