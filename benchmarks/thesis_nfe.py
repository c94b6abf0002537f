r"""Does Algorithm 6 take the published number of calls, and does it sample the right law?

Data: a zero-mean Gaussian in 3072 dimensions, standard deviations log-spaced from 0.3 to 0.0095, with its exact score.
To first order the number of function evaluations (NFE) is set by the SDE and the tolerances rather than by the images,
so this stands in for CIFAR-10. The spectrum was chosen once, not fitted: it is a regression oracle, no proof of parity.

1. NFE beside Table 10.1 of the thesis, with the settings of the released code rather than those of the text: the
   relative tolerance refers to max(|x'|, |x_t|) (reference="current"); h_init 0.5 on VE, 0.01 on VP; atol is one 8-bit
   level of the data range, 0.0039 for [0, 1] (VE) and 0.0078 for [-1, 1] (VP). The published NFE leave the final
   denoising call out, and so do ours (denoise=False); they are maxima over a batch, ours are means.
2. The law at t_min, not denoised: the second moment over its exact value alpha^2 std^2 + sigma^2, averaged over thirds
   of the spectrum. Samples are independent, so z is (ratio - 1) over the standard error across samples. Adaptive steps
   have a bias that no number of samples removes: on VP, components with std near atol come out low at each of these
   rtol, because errors below atol are not seen.
"""

from __future__ import annotations

import dataclasses
from itertools import product

import click
import torch
from common import save, table
from tqdm import tqdm

import fastsde
from fastsde.score.analytic import GaussianScore


@dataclasses.dataclass(frozen=True)
class Published:
    """One column of Table 10.1 and the settings it was made with."""

    sde: fastsde.SDE
    atol: float
    h_init: float
    data_range: tuple[float, float]
    nfe: dict[float, int]
    within: float


PUBLISHED = {
    "VE": Published(fastsde.VESDE(), 0.0039, 0.5, (0.0, 1.0), {0.01: 738, 0.02: 490, 0.05: 271, 0.1: 170}, 6.0),
    "VP": Published(fastsde.VPSDE(), 0.0078, 0.01, (-1.0, 1.0), {0.01: 329, 0.02: 274, 0.05: 179, 0.1: 147}, 12.0),
}
THIRDS = ("large", "middle", "small")


def problem(case: Published, dimension: int) -> GaussianScore:
    """The Gaussian with standard deviations from 0.3 down to 0.0095."""
    std = torch.logspace(torch.tensor(0.3).log10(), torch.tensor(0.0095).log10(), dimension, dtype=torch.float64)
    return GaussianScore(case.sde, torch.zeros_like(std), std, data_range=case.data_range)


def algorithm_6(case: Published, rtol: float, *, keep_path: bool) -> dict[str, object]:
    """Arguments of `sample` for Algorithm 6 with the published settings."""
    solver = fastsde.ExtrapolatedEM(reference="current", keep_path=keep_path)
    return {"solver": solver, "controller": fastsde.Adaptive(rtol, case.atol, h_init=case.h_init)}


def nfe(name: str, rtol: float, keep_path: bool, dimension: int, samples: int, seed: int) -> dict[str, object]:
    """Mean NFE in double precision, beside the published number."""
    case = PUBLISHED[name]
    options = algorithm_6(case, rtol, keep_path=keep_path)
    model = problem(case, dimension)
    r = fastsde.sample(model, n=samples, seed=seed, denoise=False, dtype=torch.float64, **options)
    ours, published = float(r.nfe.double().mean()), case.nfe[rtol]
    deviation = 100 * (ours / published - 1)
    return {
        "sde": name,
        "rtol": rtol,
        "noise": "path kept" if keep_path else "redrawn",
        "published": published,
        "ours": ours,
        "max": int(r.nfe.max()),
        "deviation_percent": deviation,
        "rejected_percent": 100 * float(r.rejected.sum() / (r.accepted + r.rejected).sum()),
        "success": int(r.success.sum()),
        "within_percent": case.within,
        "ok": abs(deviation) <= case.within and bool(r.success.all()),
    }


def law(model: GaussianScore, label: str, samples: int, seed: int, **options: object) -> dict[str, object]:
    """Second moment over its exact value, for each third of the spectrum, in single precision."""
    r = fastsde.sample(model, n=samples, seed=seed, denoise=False, **options)
    t = torch.tensor([model.sde.t_min], dtype=torch.float64)
    variance = model.sde.alpha(t) ** 2 * model.std**2 + model.sde.sigma(t) ** 2
    ratio = (r.samples.double() ** 2 / variance).tensor_split(3, dim=1)
    per_sample = torch.stack([part.mean(1) for part in ratio], 1)
    mean, error = per_sample.mean(0), per_sample.std(0) / samples**0.5
    return {
        "sde": type(model.sde).__name__.removesuffix("SDE"),
        "solver": label,
        "nfe": float(r.nfe.double().mean()),
        "samples": samples,
        "ratio": dict(zip(THIRDS, mean.tolist(), strict=True)),
        "standard_error": dict(zip(THIRDS, error.tolist(), strict=True)),
        "z": dict(zip(THIRDS, ((mean - 1) / error).tolist(), strict=True)),
        "success": int(r.success.sum()),
    }


def print_nfe(rows: list[dict[str, object]]) -> None:
    """The first table."""
    header = ("SDE, noise", "rtol", "published", "ours", "max", "deviation %", "rejected %", "pass mark")
    table(
        header,
        [
            (
                f"{r['sde']}, {r['noise']}",
                r["rtol"],
                r["published"],
                f"{r['ours']:.1f}",
                r["max"],
                f"{r['deviation_percent']:+.1f}",
                f"{r['rejected_percent']:.1f}",
                f"{r['within_percent']:g} % {'ok' if r['ok'] else 'MISSED'}",
            )
            for r in rows
        ],
    )


def print_law(rows: list[dict[str, object]]) -> None:
    """The second table."""
    print(
        "\nsecond moment at t_min / exact value -+ standard error (z), by thirds of the spectrum (large: std > 0.095)"
    )
    table(
        ("SDE, solver", "NFE", *THIRDS),
        [
            (
                f"{r['sde']}, {r['solver']}",
                f"{r['nfe']:.0f}",
                *(f"{r['ratio'][k]:.4f} -+ {r['standard_error'][k]:.4f} ({r['z'][k]:+.1f})" for k in THIRDS),
            )
            for r in rows
        ],
    )


@click.command(help=__doc__.split("\n", 1)[0], context_settings={"show_default": True})
@click.option("--rtol", "rtols", type=float, multiple=True, default=(0.01, 0.02, 0.05, 0.1), help="Rows of the table.")
@click.option("--samples", default=64, help="Samples behind each NFE.")
@click.option("--dimension", default=3072, help="Dimension of the data.")
@click.option("--law-samples", default=512, help="Samples behind each line of the law; 0 leaves it out.")
@click.option("--law-rtol", "law_rtols", type=float, multiple=True, default=(0.02, 0.1), help="Tolerances of the law.")
@click.option("--law-steps", default=1000, help="Steps of Euler-Maruyama, for comparison.")
@click.option("--seed", default=0)
@click.option("--threads", default=2, help="Threads of torch.")
@click.option("--keep/--discard", default=True, help="Whether to write results/thesis_nfe.json.")
def main(
    rtols: tuple[float, ...],
    samples: int,
    dimension: int,
    law_samples: int,
    law_rtols: tuple[float, ...],
    law_steps: int,
    seed: int,
    threads: int,
    keep: bool,
) -> None:
    """Prints both tables and writes them."""
    settings = click.get_current_context().params
    torch.set_num_threads(threads)
    modes = (True, False)
    cases = list(product(PUBLISHED, modes, rtols))
    calls = [
        nfe(name, rtol, kept, dimension, samples, seed) for name, kept, rtol in tqdm(cases, desc="NFE", disable=None)
    ]
    print_nfe(calls)
    laws = []
    for case in tqdm(PUBLISHED.values(), desc="law", disable=None) if law_samples else ():
        model = problem(case, dimension)
        for kept, rtol in product(modes, law_rtols):
            label = f"Algorithm 6, rtol {rtol:g}, {'path kept' if kept else 'redrawn'}"
            laws.append(law(model, label, law_samples, seed, **algorithm_6(case, rtol, keep_path=kept)))
        euler = fastsde.EulerMaruyama(steps=law_steps)
        laws.append(law(model, f"Euler-Maruyama, {law_steps} steps", law_samples, seed, solver=euler))
    if laws:
        print_law(laws)
    if keep:
        save("thesis_nfe", settings, {"nfe": calls, "law": laws})


if __name__ == "__main__":
    main()
