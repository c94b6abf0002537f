r"""Are the bits per dimension of `log_likelihood` right, and their error bars honest?

On the digits mixture the density at t_min is known: means alpha m_k and covariances alpha^2 C_k + sigma^2 I. Points are
drawn from it, in float64. The trace is computed exactly (64 backward passes for each call) or estimated by Rademacher
or Gaussian probes; errors are bits per dimension, measured minus closed form. `covered` is the share of points whose
closed form lies within the interval of two standard errors, widened for k probes to the quantile of Student's t with
k - 1 degrees of freedom: 95.4 % if honest.
"""

from __future__ import annotations

import math

import click
import torch
from common import Row, command, table
from problems import digits_law
from scipy import stats
from tqdm import tqdm

import fastsde

PROBABILITY = 2 * stats.norm.cdf(2) - 1


@command(__doc__, "likelihood", points=4, probes=[2], exact_rtol=[1e-2], rtol=1e-2)
@click.option("--points", "-n", default=600, help="Points whose density is computed.")
@click.option("--probes", type=int, multiple=True, default=(1, 4, 16))
@click.option("--rtol", default=1e-4, help="Relative and absolute tolerance of the rows with probes.")
@click.option("--exact-rtol", type=float, multiple=True, default=(1e-2, 1e-4, 1e-6), help="Those of the exact trace.")
def main(points: int, probes: tuple[int, ...], rtol: float, exact_rtol: tuple[float, ...]) -> Row:
    """Prints the table."""
    model, generator = digits_law(), torch.Generator().manual_seed(0)
    data = model.draw(points, generator)
    noise = torch.randn(data.shape, dtype=data.dtype, generator=generator)
    t = torch.full((points,), model.sde.t_min, dtype=torch.float64)
    x = model.sde.marginal(data, t, noise)
    truth = -model.log_density(x, t) / (x.shape[1] * math.log(2))
    jobs: list[tuple[str, int, float, Row]] = [(f"exact, rtol {v:g}", 0, v, {"exact": True}) for v in exact_rtol]
    jobs += [
        (f"{'Gaussian' if gaussian else 'Rademacher'}, {k} probes", k, rtol, {"probes": k, "gaussian": gaussian})
        for gaussian in (False, True)
        for k in probes
    ]
    rows: list[Row] = []
    for label, k, tolerance, options in tqdm(jobs, disable=None):
        r = fastsde.log_likelihood(model, x=x, rtol=tolerance, atol=tolerance, seed=0, batch_size=300, **options)
        error = r.bits_per_dim - truth
        row: Row = {"trace": label, "bits_per_dim": float(r.bits_per_dim.mean()), "mean_error": float(error.mean())}
        row |= {"mean_error_se": float(error.std()) / points**0.5, "rms_error": float(error.square().mean().sqrt())}
        if k > 1:
            limit = stats.t.ppf((1 + PROBABILITY) / 2, k - 1) * r.standard_error
            row |= {"standard_error": float(r.standard_error.square().mean().sqrt())}
            row |= {"covered": float((error.abs() <= limit).double().mean())}
        rows.append(row | {"nfe": float(r.nfe.double().mean()), "seconds": r.seconds})
    print(f"closed form: {float(truth.mean()):.4f} bits per dimension")
    table(rows)
    return {"closed_form": float(truth.mean()), "rows": rows}


if __name__ == "__main__":
    main()
