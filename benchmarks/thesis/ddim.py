r"""How much of DDIM's poor showing in Table 10.1 of the thesis is DDIM's, and how much that of its schedule?

The code behind the table gave DDIM the alphas of N betas linspace(beta_min / N, beta_max / N), with N the number of
calls, while the network was conditioned on continuous t and its output divided by the continuous sigma(t). The betas
sum to the right integral, but level 0 has the noise of a whole first step, where the network is told t_min: the fewer
calls, the more the state's noise exceeds the one that the network is told.

Here both run on the digits mixture with its exact continuous score. DDIM reads nothing of its process but alpha(t) and
sigma(t), and turns a score into a noise by sigma(t): `TableVP`, a VP process that reads them off the table at level
floor(t (N - 1)), is the whole handicap. As in that code, both take N - 1 steps over uniform times and end with a
denoising call at the continuous sigma(t_min): N calls.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Row, command, table
from problems import SDE, digits

import fastsde


class TableVP(fastsde.VPSDE):
    """VP whose alpha and sigma are those of N discrete betas, at the level below t."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        ends = torch.tensor([self.beta_min, self.beta_max], dtype=torch.float64) / levels
        betas = torch.linspace(float(ends[0]), float(ends[1]), levels, dtype=torch.float64)
        self.table = 0.5 * torch.log1p(-betas).cumsum(0)

    def log_alpha(self, t: Tensor) -> Tensor:
        # The last digits of t must not take the first time to the level below.
        return self.table[(t * (len(self.table) - 1) + 1e-9).floor().long()]


def handicapped(model: fastsde.ScoreModel, calls: int, n: int, seed: int) -> Tensor:
    """Samples of DDIM on the table, with shape (n, d)."""
    told = fastsde.ScoreModel(lambda x, t: model(x, t).score, TableVP(calls), "score", event_shape=model.event_shape)
    r = fastsde.sample(told, n=n, seed=seed, batch_size=2000, solver=fastsde.DDIM(calls - 1), denoise=False)
    return model(r.samples, torch.full((n,), SDE.t_min, dtype=torch.float64)).x_0


@command(__doc__, "ddim", samples=100, seeds=1, calls=[24])
@click.option("--samples", "-n", default=8000, help="Samples of each run and of the floor.")
@click.option("--seeds", default=2, help="Runs of each row.")
@click.option("--calls", type=int, multiple=True, default=(24, 49, 147, 179, 274, 329, 1000))
def main(samples: int, seeds: int, calls: tuple[int, ...]) -> list[Row]:
    """Prints the table: ratios to the floor, and the error of the half-log-SNR at t_min."""
    problem, rows = digits(samples), list[Row]()
    model, unit, t = problem.model(), problem.floor(20)[0], torch.tensor([SDE.t_min], dtype=torch.float64)
    for k in tqdm(calls, disable=None):
        row: Row = {"calls": k, "half_log_snr_error": float(SDE.log_snr(t) - TableVP(k).log_snr(t)) / 2}
        options = {"n": samples, "batch_size": 2000, "solver": fastsde.DDIM(k - 1)}
        fair = [fastsde.sample(model, seed=seed, **options).samples for seed in range(seeds)]
        on_table = [handicapped(model, k, samples, seed) for seed in range(seeds)]
        for key, runs in (("table_ratio", on_table), ("ratio", fair)):
            row[key] = sum(problem.distance(x) / unit for x in runs) / seeds
        rows.append(row)
    table(rows)
    return rows


if __name__ == "__main__":
    main()
