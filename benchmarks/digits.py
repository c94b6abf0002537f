r"""Frechet distance on the digits mixture: how close to exact samples, at how many calls?

Data: scikit-learn's 8x8 digits scaled to [-1, 1], one full-covariance Gaussian per class with the class's mean and
covariance, weights the class frequencies; VP with beta 0.1 .. 20 and t_min 1e-3; exact score, so there is no network
error. The covariances get a ridge of 4e-4, which is 1e-4 for pixels in [0, 1]: some pixels are constant. (Of the ridges
tried, from 0 to 1e-2, it gives the NFE measured before; a factor of 2 in it moves them by 1 %, at rtol 0.5 by 5 %.)

Quality is the Frechet distance between the moments of 8000 samples and the exact moments, divided by the floor: the
mean distance of 8000 exact samples. 1 is perfect, and a ratio below 1 is chance: one draw of exact samples has a spread
of about 12 %, which the `spread` column (standard deviation over seeds) shows for the solvers.

ExponentialPC and DDIM walk a grid uniform in log-SNR; the number of calls counts the first, at t_max, and the last,
which gives the denoised sample.

Algorithm 6 runs with the library's defaults (atol = 2/256, h_init 0.01, reference "previous"), once with the Brownian
path kept through rejections and once with the noise drawn anew, as published. NFE count the final denoising call. The
columns `notes` hold what an independent implementation measured on this problem, with the noise redrawn; whether it
denoised is not recorded (without, Euler-Maruyama at 100 steps comes out near 1.9 here, with it near 1.4).
"""

from __future__ import annotations

from itertools import product

import click
import torch
from common import save, table
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm

import fastsde
from fastsde.evaluation.statistics import Moments, frechet_distance
from fastsde.score.analytic import MixtureScore

NOTES = {
    "Algorithm 6, rtol 0.02, redrawn": (303, 1.33),
    "Algorithm 6, rtol 0.05, redrawn": (170, 1.28),
    "Algorithm 6, rtol 0.1, redrawn": (107, 1.53),
    "Algorithm 6, rtol 0.5, redrawn": (44, 105.0),
    "Euler-Maruyama, 1000 steps": (1000, 0.99),
    "Euler-Maruyama, 180 steps": (180, 1.12),
    "Euler-Maruyama, 100 steps": (100, 1.70),
    "ExponentialPC, eta 0, 10 calls": (10, 1.35),
    "ExponentialPC, eta 0, 12 calls": (12, 1.17),
    "ExponentialPC, eta 0, 20 calls": (20, 1.06),
    "ExponentialPC, eta 1, 10 calls": (10, 3.92),
    "ExponentialPC, eta 1, 12 calls": (12, 2.85),
    "ExponentialPC, eta 1, 20 calls": (20, 1.20),
}
"""Calls and ratio measured before, with another implementation."""


def digits_mixture(ridge: float) -> MixtureScore:
    """One Gaussian per digit, with the class's mean, covariance and frequency."""
    pixels, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    classes = [(pixels[labels == k] / 8 - 1).double() for k in range(10)]
    weights = torch.tensor([len(c) for c in classes], dtype=torch.float64) / len(labels)
    means = torch.stack([c.mean(0) for c in classes])
    covariances = torch.stack([c.T.cov() for c in classes]) + ridge * torch.eye(64, dtype=torch.float64)
    return MixtureScore.from_covariances(fastsde.VPSDE(), weights, means, covariances)


def frechet(x: Tensor, mean: Tensor, covariance: Tensor) -> float:
    """The Frechet distance between the moments of samples x, with shape (n, d), and the exact ones."""
    own = Moments.of(x)
    return frechet_distance(own.mean, own.covariance, mean, covariance)


def floor(model: MixtureScore, n: int, draws: int) -> tuple[float, float]:
    """Mean and standard deviation of the Frechet distance of n exact samples."""
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([frechet(model.draw(n, generator), *model.moments()) for _ in range(draws)])
    return float(values.mean()), float(values.std())


def measure(
    model: MixtureScore, label: str, unit: float, seeds: int, n: int, batch_size: int, **options: object
) -> dict[str, object]:
    """NFE, rejections and the Frechet ratio over several seeds."""
    runs = [fastsde.sample(model, n=n, seed=k, batch_size=batch_size, **options) for k in range(seeds)]
    ratio = torch.tensor([frechet(r.samples[r.success], *model.moments()) / unit for r in runs])
    steps = sum(int((r.accepted + r.rejected).sum()) for r in runs)
    notes = NOTES.get(label)
    return {
        "solver": label,
        "nfe": sum(float(r.nfe.double().mean()) for r in runs) / seeds,
        "nfe_max": max(int(r.nfe.max()) for r in runs),
        "rejected_percent": 100 * sum(int(r.rejected.sum()) for r in runs) / steps,
        "ratio": float(ratio.mean()),
        "spread": float(ratio.std()) if seeds > 1 else None,
        "ratios": ratio.tolist(),
        "failed": sum(int((~r.success).sum()) for r in runs),
        "notes_nfe": notes and notes[0],
        "notes_ratio": notes and notes[1],
    }


@click.command(help=__doc__.split("\n", 1)[0], context_settings={"show_default": True})
@click.option("--samples", "-n", default=8000, help="Samples of each run and of the floor.")
@click.option("--seeds", default=3, help="Runs of each solver.")
@click.option("--rtol", "rtols", type=float, multiple=True, default=(0.02, 0.05, 0.1, 0.5))
@click.option("--steps", type=int, multiple=True, default=(1000, 180, 100), help="Steps of Euler-Maruyama.")
@click.option("--calls", type=int, multiple=True, default=(10, 12, 20), help="Calls of ExponentialPC and DDIM.")
@click.option("--ridge", default=4e-4, help="Added to the diagonal of each covariance.")
@click.option("--floor-draws", default=50, help="Draws of exact samples behind the floor.")
@click.option("--batch-size", default=2000)
@click.option("--threads", default=2, help="Threads of torch.")
@click.option("--keep/--discard", default=True, help="Whether to write results/digits.json.")
def main(
    samples: int,
    seeds: int,
    rtols: tuple[float, ...],
    steps: tuple[int, ...],
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
    model = digits_mixture(ridge)
    unit, spread = floor(model, samples, floor_draws)
    print(f"floor: {unit:.4f}, standard deviation of one draw {100 * spread / unit:.0f} %, {floor_draws} draws\n")
    jobs: list[tuple[str, dict[str, object]]] = []
    for name, kept in (("redrawn", False), ("path kept", True)):
        solver = fastsde.ExtrapolatedEM(keep_path=kept)
        jobs += [(f"Algorithm 6, rtol {rtol:g}, {name}", {"solver": solver, "rtol": rtol}) for rtol in rtols]
    jobs += [(f"Euler-Maruyama, {k} steps", {"solver": fastsde.EulerMaruyama(steps=k)}) for k in steps]
    for eta, k in product((0, 1), calls):
        solver = fastsde.ExponentialPC(steps=k - 1, eta=eta)
        jobs.append((f"ExponentialPC, eta {eta}, {k} calls", {"solver": solver}))
    grid = {k: fastsde.Grid.log_snr(model.sde, k - 1) for k in calls}
    jobs += [(f"DDIM on the same grid, {k} calls", {"solver": fastsde.DDIM(), "controller": grid[k]}) for k in calls]
    rows = [
        measure(model, label, unit, seeds, samples, batch_size, **options)
        for label, options in tqdm(jobs, disable=None)
    ]
    header = ("solver", "NFE", "max", "rejected %", "ratio", "spread", "failed", "notes: NFE", "notes: ratio")
    table(
        header,
        [
            (
                r["solver"],
                f"{r['nfe']:.1f}",
                r["nfe_max"],
                f"{r['rejected_percent']:.1f}",
                f"{r['ratio']:.2f}",
                "-" if r["spread"] is None else f"{r['spread']:.2f}",
                r["failed"],
                r["notes_nfe"] or "-",
                r["notes_ratio"] or "-",
            )
            for r in rows
        ],
    )
    if keep:
        save("digits", settings, {"floor": unit, "floor_spread": spread, "solvers": rows})


if __name__ == "__main__":
    main()
