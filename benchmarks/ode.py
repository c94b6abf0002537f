r"""The probability flow: what do steps per sample save, and are the bits per dimension right?

`flow`: torchdiffeq's dopri5 integrates `fastsde.ProbabilityFlowODE`, dx/dt = f x - g^2 score / 2, with one step size
for the batch; `fastsde.ProbabilityFlow()`, the same Dormand-Prince pair, integrates dy/drho = eps in y = x / alpha,
with a step size for each sample. Both start from the same noise in float64, are given the same rtol and atol = rtol /
10, and end at t_min without a denoising call. Errors are root mean squares to `ProbabilityFlow` at rtol 1e-11. They are
to be compared at equal error, not at equal tolerance: `calls at equal error` are their calls over ours at the errors of
ours. Two problems: two Gaussians in three dimensions, of which a rare one (10 %) has standard deviations a hundred
times smaller, so that its samples are harder; and the digits mixture, whose samples are much alike.

`likelihood`: on the digits mixture the density at t_min is known: means alpha m_k and covariances alpha^2 C_k + sigma^2
I. Points are drawn from it, in float64. The trace is computed exactly (64 backward passes for each call) or estimated
by Rademacher or Gaussian probes; errors are bits per dimension, measured minus closed form. `covered` is the share of
points whose closed form lies within the interval of two standard errors, widened for k probes to the quantile of
Student's t with k - 1 degrees of freedom: 95.4 % if honest.
"""

from __future__ import annotations

import math

import click
import numpy as np
import torch
from common import Row, command
from problems import digits_law
from scipy import stats
from torch import Tensor
from torchdiffeq import odeint
from tqdm import tqdm

import fastsde
from fastsde.score.analytic import MixtureScore

PROBABILITY = 2 * stats.norm.cdf(2) - 1

main = click.Group(help=__doc__)


def two_clusters() -> MixtureScore:
    """A wide component, and a rare one so narrow that samples near it need more steps."""
    means = torch.tensor([[1.0, 0.5, -0.5], [-1.0, 0.0, 0.3]], dtype=torch.float64)
    basis = torch.eye(3, dtype=torch.float64).expand(2, 3, 3).contiguous()
    variances = torch.tensor([[0.3, 0.2, 0.25], [1e-5, 2e-5, 1e-5]], dtype=torch.float64)
    return MixtureScore(fastsde.VPSDE(), torch.tensor([0.9, 0.1], dtype=torch.float64), means, basis, variances)


def ours(model: MixtureScore, x: Tensor, rtol: float) -> fastsde.SampleResult:
    """Our solution at one tolerance."""
    limits = {"rtol": rtol, "atol": rtol / 10, "max_nfe": 1_000_000}
    return fastsde.sample(model, x_init=x, solver=fastsde.ProbabilityFlow(), denoise=False, batch_size=500, **limits)


def theirs(model: MixtureScore, x: Tensor, rtol: float) -> tuple[Tensor, int]:
    """torchdiffeq's end states and number of calls, each of the whole batch."""
    ode = fastsde.ProbabilityFlowODE(model)
    times = torch.tensor([model.sde.t_max, model.sde.t_min], dtype=torch.float64)
    # Without step_t it steps beyond t_min, where no diffusion is, and interpolates back.
    end = odeint(ode, x, times, method="dopri5", rtol=rtol, atol=rtol / 10, options={"step_t": times[1:]})[-1]
    return end, ode.nfe


def compare(name: str, model: MixtureScore, n: int, rtols: tuple[float, ...]) -> list[Row]:
    """Errors and calls of both at each tolerance."""
    noise = torch.randn(n, *model.event_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, rows = model.sde.prior(noise), list[Row]()
    reference = ours(model, x, min(rtols) / 100).samples
    for rtol in tqdm(rtols, name, disable=None):
        (end, calls), r = theirs(model, x, rtol), ours(model, x, rtol)
        row: Row = {"problem": name, "rtol": rtol}
        for who, samples in (("theirs", end), ("ours", r.samples)):
            row[f"{who}: error"] = float((samples - reference).square().mean().sqrt())
        row |= {"theirs: calls": calls, "ours: calls": float(r.nfe.double().mean())}
        rows.append(row | {"apart": float((r.samples - end).abs().max())})
    error, calls = (np.log([row[f"theirs: {key}"] for row in rows][::-1]) for key in ("error", "calls"))
    for row in rows:
        if error[0] <= (own := np.log(row["ours: error"])) <= error[-1]:
            row["calls at equal error"] = float(np.exp(np.interp(own, error, calls)) / row["ours: calls"])
    return rows


@command("ode", main, samples=8, digits=4, rtols=[1e-2, 1e-3])
def flow(
    samples: int = 2000, digits: int = 500, rtols: tuple[float, ...] = tuple(10.0**-k for k in range(2, 10))
) -> list[Row]:
    """What do steps per sample save?"""
    return compare("two clusters", two_clusters(), samples, rtols) + compare("digits", digits_law(), digits, rtols)


@command("likelihood", main, points=4, probes=[2], exact_rtol=[1e-2], rtol=1e-2)
def likelihood(
    points: int = 600,
    probes: tuple[int, ...] = (1, 4, 16),
    rtol: float = 1e-4,
    exact_rtol: tuple[float, ...] = (1e-2, 1e-4, 1e-6),
) -> Row:
    """Are the bits per dimension right, and their error bars honest?"""
    model, generator = digits_law(), torch.Generator().manual_seed(0)
    data = model.draw(points, generator)
    noise = torch.randn(data.shape, dtype=data.dtype, generator=generator)
    t = torch.full((points,), model.sde.t_min, dtype=torch.float64)
    x = model.sde.marginal(data, t, noise)
    truth = -model.log_density(x, t) / (x.shape[1] * math.log(2))
    jobs: list[tuple[str, int, float, Row]] = [(f"exact, rtol {v:g}", 0, v, {"exact": True}) for v in exact_rtol]
    jobs += [
        (
            f"{'Gaussian' if gaussian else 'Rademacher'}, {k} probe{'s'[: k > 1]}",
            k,
            rtol,
            {"probes": k, "gaussian": gaussian},
        )
        for gaussian in (False, True)
        for k in probes
    ]
    rows: list[Row] = []
    for label, k, tolerance, options in tqdm(jobs, disable=None):
        r = fastsde.log_likelihood(model, x=x, rtol=tolerance, atol=tolerance, seed=0, batch_size=300, **options)
        error = r.bits_per_dim - truth
        row: Row = {"trace": label, "mean_error": float(error.mean()), "rms_error": float(error.square().mean().sqrt())}
        if k > 1:
            limit = stats.t.ppf((1 + PROBABILITY) / 2, k - 1) * r.standard_error
            row |= {"standard_error": float(r.standard_error.square().mean().sqrt())}
            row |= {"covered": float((error.abs() <= limit).double().mean())}
        rows.append(row)
    return {"closed_form": float(truth.mean()), "rows": rows}


if __name__ == "__main__":
    main()
