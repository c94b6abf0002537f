r"""Algorithms 6 and 9 of the thesis: the published calls, the law, and what rejections do.

docs/measured/algorithm6.md and docs/explanation/sources.md have what was found.

`calls`: a zero-mean Gaussian in 3072 dimensions with its exact score, in place of CIFAR-10: to first order the number
of function evaluations (NFE) is set by the SDE and the tolerances. The spectrum was chosen once, not fitted. The
settings are those of the released code: the relative tolerance refers to max(|x'|, |x_t|) (reference="current"); h_init
0.5 on VE, 0.01 on VP; atol is one 8-bit level of the data range. The published NFE are maxima over a batch, ours are
means, both without the denoising call. Beside that the second moment at t_min
over its exact value, averaged over thirds of the spectrum, with its standard error across samples.

`rejections`: the error of the mean at time 1 by Algorithm 9 (appendix D.3), with the error estimate corrected and a
step at most ten times as long as the one before, with three kinds of noise after a rejection; beside
`fastsde.integrate`, which does not reject, and as many equal steps. Where the path is kept, the error is that to the
solution on the same path: exact for geometric Brownian motion, 512 equal steps for the double wells. Where it is not,
it is that to the exact mean, with more samples: for the wells by the backward Kolmogorov equation on a grid.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import NamedTuple

import click
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Row, command

import fastsde
from fastsde.noise import RESOLUTION, BrownianPath
from fastsde.score.analytic import GaussianScore

main = click.Group(help=__doc__)


class Published(NamedTuple):
    """One column of Table 10.1 and the settings it was made with."""

    sde: fastsde.SDE
    atol: float
    h_init: float
    data_range: tuple[float, float]
    nfe: dict[float, int]


PUBLISHED = {
    "VE": Published(fastsde.VESDE(), 0.0039, 0.5, (0.0, 1.0), {0.01: 738, 0.02: 490, 0.05: 271, 0.1: 170}),
    "VP": Published(fastsde.VPSDE(), 0.0078, 0.01, (-1.0, 1.0), {0.01: 329, 0.02: 274, 0.05: 179, 0.1: 147}),
}


def problem(case: Published, dimension: int) -> GaussianScore:
    """The Gaussian with standard deviations from 0.3 down to 0.0095."""
    std = torch.logspace(torch.tensor(0.3).log10(), torch.tensor(0.0095).log10(), dimension, dtype=torch.float64)
    return GaussianScore(case.sde, torch.zeros_like(std), std, data_range=case.data_range)


def algorithm_6(case: Published, rtol: float, kept: bool) -> Row:
    """Arguments of `sample` for Algorithm 6 with the published settings."""
    solver = fastsde.ExtrapolatedEM(reference="current", keep_path=kept)
    return {"solver": solver, "controller": fastsde.Adaptive(rtol, case.atol, h_init=case.h_init)}


def nfe_of(name: str, rtol: float, kept: bool, dimension: int, samples: int) -> Row:
    """Mean NFE in double precision, beside the published number."""
    case = PUBLISHED[name]
    options = algorithm_6(case, rtol, kept)
    r = fastsde.sample(problem(case, dimension), n=samples, denoise=False, dtype=torch.float64, seed=0, **options)
    ours, published = float(r.nfe.double().mean()), case.nfe[rtol]
    row: Row = {"sde": name, "rtol": rtol, "noise": "path kept" if kept else "redrawn", "published": published}
    rejected = float(r.rejected.sum() / (r.accepted + r.rejected).sum())
    return row | {"ours": ours, "rejected_percent": 100 * rejected}


def law(name: str, label: str, dimension: int, samples: int, **options: object) -> Row:
    """Second moment over its exact value, for each third of the spectrum, in single precision."""
    model = problem(PUBLISHED[name], dimension)
    r = fastsde.sample(model, n=samples, seed=0, denoise=False, **options)
    t = torch.tensor([model.sde.t_min], dtype=torch.float64)
    variance = model.sde.alpha(t) ** 2 * model.std**2 + model.sde.sigma(t) ** 2
    parts = torch.stack([part.mean(1) for part in (r.samples.double() ** 2 / variance).tensor_split(3, dim=1)], 1)
    row: Row = {"sde": name, "solver": label, "nfe": float(r.nfe.double().mean())}
    for third, mean, error in zip(("large", "middle", "small"), parts.mean(0), parts.std(0), strict=True):
        row |= {third: float(mean), f"{third} +-": float(error) / samples**0.5}
    return row


@command("thesis_nfe", main, rtols=[0.1], samples=4, dimension=32, law_samples=8, law_steps=10)
def calls(
    rtols: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1),
    samples: int = 64,
    dimension: int = 3072,
    law_samples: int = 512,
    law_steps: int = 1000,
) -> Row:
    """Does Algorithm 6 take the published number of calls, and does it sample the right law?"""
    cases = list(product(PUBLISHED, (True, False), rtols))
    rows = [nfe_of(name, rtol, kept, dimension, samples) for name, kept, rtol in tqdm(cases, "NFE", disable=None)]
    laws = []
    for name, case in PUBLISHED.items():
        for kept, rtol in product((True, False), rtols[1::2] or rtols):
            label = f"Algorithm 6, rtol {rtol:g}, {'path kept' if kept else 'redrawn'}"
            laws.append(law(name, label, dimension, law_samples, **algorithm_6(case, rtol, kept)))
        euler = fastsde.EulerMaruyama(law_steps)
        laws.append(law(name, f"Euler-Maruyama, {law_steps} steps", dimension, law_samples, solver=euler))
    return {"nfe": rows, "law": laws}


class Equation(NamedTuple):
    """dx = drift(x) dt + diffusion(x) dw, from x0."""

    drift: Callable[[Tensor], Tensor]
    diffusion: Callable[[Tensor], Tensor]
    x0: float
    ito: bool = False
    additive: bool = False

    def step(self, x: Tensor, h: Tensor, dw: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
        """The improved Euler step of Algorithm 9 and Euler-Maruyama's."""
        shift = sign * h.sqrt() if self.ito else torch.zeros_like(dw)
        low = x + h * self.drift(x) + self.diffusion(x) * (dw - shift)
        high = (low + x + h * self.drift(low) + self.diffusion(low) * (dw + shift)) / 2
        return high, low + shift * self.diffusion(x)

    def mean(self) -> float:
        """E x(1): u(x0, 1) of du/dt = drift u' + diffusion^2 u'' / 2, u(x, 0) = x, for states within [-4, 4]."""
        x, h = torch.linspace(-4, 4, 801, dtype=torch.float64), 0.01
        g, one = self.diffusion(x), torch.ones(800, dtype=torch.float64)
        slope = self.drift(x) + (0.0 if self.ito else torch.gradient(g, spacing=h)[0] * g / 2)
        first, second = (one.diag(1) - one.diag(-1)) / (2 * h), (one.diag(1) + one.diag(-1)) / h**2
        second -= 2 / h**2 * torch.eye(801, dtype=torch.float64)
        law = slope[:, None] * first + g.square()[:, None] / 2 * second
        law[[0, -1]] = 0.0
        return float((torch.matrix_exp(law) @ x)[round((self.x0 + 4) / h)])

    def solved(self, n: int, elements: int, seed: int, **options: object) -> fastsde.SampleResult:
        """By `fastsde.integrate`."""
        x0 = torch.full((n, elements), self.x0, dtype=torch.float64)
        terms = (lambda x, t: self.drift(x)), (lambda x, t: self.diffusion(x))
        kind = {"ito": self.ito, "additive": self.additive}
        return fastsde.integrate(*terms, x0, 0.0, 1.0, **kind, seed=seed, batch_size=n, **options)


MU, SIGMA = 0.5, 0.8
EQUATIONS = {
    "geometric, Ito": Equation(lambda x: MU * x, lambda x: SIGMA * x, 1.0, ito=True),
    "geometric, Stratonovich": Equation(lambda x: (MU - SIGMA**2 / 2) * x, lambda x: SIGMA * x, 1.0),
    "double well, additive": Equation(lambda x: x - x**3, lambda x: 0.5 + 0 * x, 0.5, additive=True),
    "double well, Stratonovich": Equation(lambda x: x - x**3, lambda x: 0.5 + 0.25 * (3 * x).sin(), 0.5),
}
"""Of the geometric Brownian motions both have x(1) = exp(mu - sigma^2 / 2 + sigma w(1))."""


def brownian(index: Tensor, t: Tensor | float, s: Tensor | float, elements: int, seed: int) -> Tensor:
    """w(s) - w(t) of the path that `integrate` walks, for times in [0, 1]."""
    path = BrownianPath(seed, (elements,), torch.float64, t_min=-1.0, t_max=0.0)
    at = [-torch.as_tensor(time, dtype=torch.float64).expand(len(index)) for time in (t, s)]
    return path(index, at[0]) - path(index, at[1])


def algorithm_9(sde: Equation, n: int, elements: int, rtol: float, noise: str, seed: int) -> tuple[Tensor, float]:
    """States at time 1 and mean calls of the drift."""
    drawn, index = torch.Generator().manual_seed(seed), torch.arange(n)

    def normals(rows: int) -> Tensor:
        return torch.randn(rows, elements, generator=drawn, dtype=torch.float64)

    x = torch.full((n, elements), sde.x0, dtype=torch.float64)
    t, h, calls = torch.zeros(n, dtype=torch.float64), torch.full((n,), 0.01, dtype=torch.float64), torch.zeros(n)
    previous, z, sign = x.clone(), normals(n), normals(n).sign()
    while len(k := (t < 1).nonzero()[:, 0]):
        step = torch.minimum(h[k], 1 - t[k])
        end = torch.where(step < h[k], 1.0, t[k] + step)
        kept = noise == "path kept"
        dw = brownian(index[k], t[k], end, elements, seed) if kept else z[k] * step.sqrt()[:, None]
        high, euler = sde.step(x[k], step[:, None], dw, sign[k])
        tolerance = (rtol * torch.maximum(euler.abs(), previous[k].abs())).clamp(min=rtol / 5)
        error = ((euler - high) / tolerance).square().mean(1).sqrt()
        good = (error <= 1) | (step <= RESOLUTION)
        h[k] = torch.minimum(0.9 * step * error**-0.9, 10 * step).clamp(min=RESOLUTION)
        calls[k] += 2
        on = k[good]
        x[on], previous[on], t[on] = high[good], euler[good], end[good]
        sign[on] = normals(len(on)).sign()
        new = k if noise == "z drawn again" else on
        z[new] = normals(len(new))
    return x, float(calls.mean())


@command("rejections", main, samples=50, many=100, rtols=[0.05], elements=[2])
def rejections(
    samples: int = 10_000,
    many: int = 200_000,
    rtols: tuple[float, ...] = (0.05, 0.01, 0.002),
    elements: tuple[int, ...] = (16, 256),
    seed: int = 3,
) -> list[Row]:
    """Do rejections bias?"""
    rows, solutions = list[Row](), dict[tuple[str, int], Tensor]()
    jobs = [(name, 1, rtol) for name in EQUATIONS for rtol in rtols]
    for name, d, rtol in tqdm(jobs + [("double well, additive", d, rtols[0]) for d in elements], disable=None):
        sde, n = EQUATIONS[name], max(50, samples // d)
        if (name, d) not in solutions:
            w = SIGMA * brownian(torch.arange(n), 0.0, 1.0, d, seed)
            known = name.startswith("geometric")
            solutions[name, d] = (MU - SIGMA**2 / 2 + w).exp() if known else sde.solved(n, d, seed, steps=512).samples
        exact, mean = solutions[name, d], math.exp(MU) if name.startswith("geometric") else sde.mean()
        adaptive = sde.solved(n, d, seed, rtol=rtol, atol=rtol / 5)
        calls = float(adaptive.nfe.double().mean())
        equal = sde.solved(n, d, seed, steps=round(calls / 2))
        kept, kept_calls = algorithm_9(sde, n, d, rtol, "path kept", seed)
        found = {"rejections, path kept": (kept - exact, kept_calls)}
        for noise in ("z kept", "z drawn again") if d == 1 else ():
            x, own = algorithm_9(sde, many, d, rtol, noise, seed)
            found[f"rejections, {noise}"] = x - mean, own
        found["no rejections, as now"] = adaptive.samples - exact, calls
        found["equal steps"] = equal.samples - exact, float(equal.nfe.double().mean())
        for steps, (errors, own) in found.items():
            each = errors.mean(1)  # elements of a sample share its steps
            row: Row = {"sde": name, "elements": d, "rtol": rtol, "steps": steps, "calls": own}
            rows.append(row | {"error": float(each.mean()), "standard error": float(each.std()) / len(each) ** 0.5})
    return rows


if __name__ == "__main__":
    main()
