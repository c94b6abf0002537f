r"""How much of DDIM's poor showing in Table 10.1 of the thesis is DDIM's, and how much that of its schedule?

The code behind the table gave DDIM the alphas of N betas linspace(beta_min / N, beta_max / N), with N the number of
calls, while the network was conditioned on continuous t and its output divided by the continuous sigma(t). The betas
sum to the right integral, but level 0 has the noise of a whole first step, sqrt(beta_min / N), where the network is
told t_min: the fewer calls, the more the state's noise exceeds the one that the network is told. (With 20 calls or
fewer the last beta is not below 1, and there is no table.)

Here both run on the digits mixture of `digits.py` with its exact continuous score. DDIM reads nothing of its process
but alpha(t) and sigma(t), and turns a score into a noise by sigma(t): `TableVP`, a VP process that reads them off the
table at level floor(t (N - 1)), is the whole handicap. As in that code, both take N - 1 steps over uniform times from
t_max to t_min and end with a denoising call at the continuous sigma(t_min): N calls. The fair one is `DDIM` on the
continuous VP process.

What held: the errors of the half-log-SNR at t_min are those computed from the published code, 1.46, 0.91, 0.51 and 0.05
for 49, 147, 329 and 1000 calls. With 49 calls the table puts DDIM at 7.4 times the floor rather than 2.9, with 24 at 33
rather than 8.7, with 147 at 1.55 rather than 1.19; from 274 calls on the two are the same within their spread. So the
schedule explains most of the distance at few calls, and next to nothing of it above 200.
"""

from __future__ import annotations

import click
import torch
from common import save, table
from digits import digits_mixture, floor, frechet, measure
from samplers import Stacked
from torch import Tensor
from tqdm import tqdm

import fastsde
from fastsde.score.analytic import MixtureScore

NOTES = {49: 1.46, 147: 0.91, 329: 0.51, 1000: 0.05}
"""Error of the half-log-SNR at t_min, computed before from the published code."""
PUBLISHED = (49, 147, 179, 274, 329)
"""The numbers of calls at which Table 10.1 lists DDIM on VP, those of Algorithm 6."""


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


def handicapped(model: MixtureScore, calls: int, n: int, seed: int, batch_size: int) -> Tensor | None:
    """Samples of DDIM on the table, with shape (n, d); None if the table has no noise level at its end."""
    process = TableVP(calls)
    if not process.table.isfinite().all():
        return None
    told = fastsde.ScoreModel(model.exact_score, process, "score", event_shape=model.event_shape)
    r = fastsde.sample(told, n=n, seed=seed, batch_size=batch_size, solver=fastsde.DDIM(calls - 1), denoise=False)
    t = torch.full((n,), model.sde.t_min, dtype=torch.float64)
    return model(r.samples, t).x_0


def half_log_snr_error(calls: int) -> float:
    """The continuous half-log-SNR at t_min minus that of the table."""
    process = TableVP(calls)
    t = torch.tensor([process.t_min], dtype=torch.float64)
    return float(fastsde.VPSDE().log_snr(t) - process.log_snr(t)) / 2


@click.command(help=__doc__.split("\n", 1)[0], context_settings={"show_default": True})
@click.option("--samples", "-n", default=8000, help="Samples of each run and of the floor.")
@click.option("--seeds", default=2, help="Runs of each row.")
@click.option("--calls", type=int, multiple=True, default=(20, 24, *PUBLISHED, 1000))
@click.option("--ridge", default=4e-4, help="Added to the diagonal of each covariance.")
@click.option("--floor-draws", default=50, help="Draws of exact samples behind the floor.")
@click.option("--batch-size", default=2000)
@click.option("--threads", default=2, help="Threads of torch.")
@click.option("--keep/--discard", default=True, help="Whether to write results/ddim.json.")
def main(
    samples: int,
    seeds: int,
    calls: tuple[int, ...],
    ridge: float,
    floor_draws: int,
    batch_size: int,
    threads: int,
    keep: bool,
) -> None:
    """Prints the table and writes it."""
    settings = click.get_current_context().params
    torch.set_num_threads(threads)
    exact = digits_mixture(ridge)
    unit, spread = floor(exact, samples, floor_draws)
    print(f"floor: {unit:.4f}, standard deviation of one draw {100 * spread / unit:.0f} %, {floor_draws} draws\n")
    model = Stacked(exact.sde, exact.weights, exact.means, exact.bases, exact.variances)
    rows = []
    for k in tqdm(calls, disable=None):
        fair = measure(model, f"{k} calls", unit, seeds, samples, batch_size, solver=fastsde.DDIM(steps=k - 1))
        draws = [handicapped(model, k, samples, seed, batch_size) for seed in range(seeds)]
        ratios = torch.tensor([frechet(x, *model.moments()) / unit for x in draws if x is not None])
        rows.append(
            {
                "calls": k,
                "nfe": fair["nfe"],
                "half_log_snr_error": half_log_snr_error(k),
                "notes": NOTES.get(k),
                "table_ratio": float(ratios.mean()) if len(ratios) else None,
                "table_spread": float(ratios.std()) if len(ratios) > 1 else None,
                "table_ratios": ratios.tolist(),
                "ratio": fair["ratio"],
                "spread": fair["spread"],
                "ratios": fair["ratios"],
            }
        )
    header = ("calls", "error of half-log-SNR", "notes", "ratio: table", "spread", "ratio: continuous", "spread")
    body = [
        (
            r["calls"],
            f"{r['half_log_snr_error']:.2f}",
            r["notes"] or "-",
            "no table" if r["table_ratio"] is None else f"{r['table_ratio']:.2f}",
            "-" if r["table_spread"] is None else f"{r['table_spread']:.2f}",
            f"{r['ratio']:.2f}",
            "-" if r["spread"] is None else f"{r['spread']:.2f}",
        )
        for r in rows
    ]
    table(header, body)
    if keep:
        save("ddim", settings, {"floor": unit, "floor_spread": spread, "rows": rows})


if __name__ == "__main__":
    main()
