r"""Annealed sampling and adversarial score matching: Figure 8.2, the shape of Table 8.1, Figure 8.3, appendix C.9.

ALS is annealed Langevin, CAS consistent annealed sampling. n_sigma is the number of steps at a level for ALS, and
dilates the levels for CAS, so that both take the same calls. eta is the step size, eps / sigma_L^2. `raw` is the last
state, `denoised` its expected denoised sample. docs/measured/training.md and algorithm6.md have the settings.

`steps`: the digits mixture under the VE process of app. C.2; distances are over that of as many exact samples.
`points`: data in two dimensions, VP down to noise over signal of 0.05; a perceptron trained plain, adversarial, or
plain with the Adam of the adversarial one, which has no momentum. "gap" is the root mean square distance to the data.
`langevin`: a perceptron trained at the one level 0.1, and Langevin dynamics there. Their epsilon, 0.2, is taken in
units of sigma^2, as in Algorithm 4: in units of x^2 a step would overshoot 20 times.
`images`: Fashion-MNIST without labels, a small UNet on VP that predicts v, along 123 levels.
`inception`: the packaged network, and of each run also the state at noise over signal near 0.05.
"""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import click
import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Row, command, floor_of, labels, pixels, trained
from problems import digits

import fastsde
from fastsde.evaluation.features import open_features
from fastsde.evaluation.reference import packaged_reference
from fastsde.evaluation.statistics import frechet, inception_score
from fastsde.training.adversarial import Adversary
from fastsde.training.config import TrainConfig
from fastsde.training.data import load_images
from fastsde.training.networks import MLP, Discriminator, small_unet

SIGMA_MIN = 0.01
VE = fastsde.VESDE(SIGMA_MIN, 50.0, t_min=1e-9)
"""From t_min = 0: the last level is sigma_min itself."""
PLAIN, BARE, ADVERSARIAL = "plain", "plain, no momentum", "adversarial"
SAMPLERS = {"ALS": fastsde.AnnealedLangevin, "CAS": fastsde.ConsistentAnnealed}
LAST, SPREAD, CENTRES = 0.05, 0.03, torch.cartesian_prod(*[torch.linspace(-1.4, 1.4, 5)] * 2)
"""Of the points: the lowest noise over signal, the deviation of each Gaussian, and their means."""

main = click.Group(help=__doc__)


@torch.no_grad()
def denoised(model: fastsde.ScoreModel, x: Tensor, t: float, cond: dict[str, Tensor] | None = None) -> Tensor:
    """E[x_0 | x_t] for states with shape (n, *event) at one time, 80 rows at a time."""
    times = torch.full((len(x),), t, dtype=torch.float64)
    parts = [(x[k], times[k], {key: v[k] for key, v in (cond or {}).items()}) for k in torch.arange(len(x)).split(80)]
    return torch.cat([model(*part).x_0 for part in parts])


@command("annealed_steps", main, samples=64, etas=[0.1])
def steps(samples: int = 1000, etas: tuple[float, ...] = (0.01, 0.02, 0.04, 0.06, 0.1, 0.2, 0.4, 0.7)) -> Row:
    """Which step sizes work with an exact score?"""
    problem, last = digits(samples), torch.full((samples,), SIGMA_MIN, dtype=torch.float64)
    floor, spread = problem.floor(50)
    model, generator, rows = problem.model(VE), torch.Generator().manual_seed(1), list[Row]()
    exact = problem.draw(samples, generator)
    noisy = problem.distance(exact + SIGMA_MIN * torch.randn(exact.shape, generator=generator)) / floor
    for n_sigma, name, eta in tqdm(list(itertools.product((1, 5), SAMPLERS, etas)), disable=None):
        row: Row = {"sampler": name, "n_sigma": n_sigma, "eta": eta}
        try:
            solver = SAMPLERS[name](levels=232, n_sigma=n_sigma, eta=eta)
            r = fastsde.sample(model, n=samples, solver=solver, batch_size=2000, seed=0, denoise=False)
        except ValueError:  # CAS below 1 - gamma: its noise would be imaginary
            continue
        row |= {"nfe": float(r.nfe.double().mean()), "raw": problem.distance(r.samples) / floor}
        rows.append(row | {"denoised": problem.distance(problem.denoise(r.samples, last)) / floor})
    return {"floor": floor, "spread": spread, "exact_with_noise": noisy, "rows": rows}


def roll(u: Tensor) -> Tensor:
    """Points of the roll's curve, u in [0, 1], with mean near 0 and spread near 1."""
    angle = 1.5 * math.pi * (1 + 2 * u)
    return torch.stack([angle * angle.cos(), angle * angle.sin()], -1) / 6.6


def draw(name: str, n: int, seed: int) -> Tensor:
    """Data with shape (n, 2)."""
    generator = torch.Generator().manual_seed(seed)
    if name == "swiss roll":
        return roll(torch.rand(n, generator=generator))
    centre = CENTRES[torch.randint(25, (n,), generator=generator)]
    return centre + SPREAD * torch.randn(n, 2, generator=generator)


def gap(name: str, x: Tensor) -> float:
    """Root mean square distance to the curve, or to the nearest centre."""
    curve = roll(torch.linspace(0, 1, 4000)) if name == "swiss roll" else CENTRES
    return float(torch.cdist(x, curve).amin(1).square().mean().sqrt())


class Critic(nn.Sequential):
    """A perceptron from points (B, 2) to numbers (B,)."""

    def __init__(self) -> None:
        layers = (nn.Linear(2, 256), nn.LeakyReLU(0.2), nn.Linear(256, 256), nn.LeakyReLU(0.2), nn.Linear(256, 1))
        super().__init__(*layers, nn.Flatten(0))


@command("adversarial_2d", main, steps=2, samples=10, seeds=1)
def points(steps: int = 6000, samples: int = 4000, seeds: int = 2) -> Row:
    """Does the expected denoised sample come nearer?"""
    end = fastsde.VPSDE().t_of_log_snr(torch.tensor(-2 * math.log(LAST), dtype=torch.float64))
    sde, rows = fastsde.VPSDE(t_min=float(end)), list[Row]()
    names = ("swiss roll", "25 Gaussians")
    for name, kind, seed in tqdm(list(itertools.product(names, (PLAIN, BARE, ADVERSARIAL), range(seeds)))):
        torch.manual_seed(seed)
        model = fastsde.ScoreModel(
            MLP(2, depth=4, octaves=5),
            sde,
            "epsilon",
            event_shape=(2,),
            data_range=(-2.0, 2.0),
            timestep=lambda t: 0.5 + sde.log_snr(t) / 20,
        )
        adversary = Adversary(Critic(), weight=10.0) if kind == ADVERSARIAL else None
        betas = (0.9, 0.999) if kind == PLAIN else (0.0, 0.9)
        # The adversarial loss has lambda / 2 of the sum over two coordinates where the plain one has the mean.
        clip = adversary.weight if adversary else 1.0
        config = TrainConfig(steps, 256, 2e-3, betas=betas, seed=seed, bf16=False, levels=200, grad_clip=clip)
        trained(model, draw(name, 50_000, 1), config, adversary)
        solver = fastsde.ConsistentAnnealed(levels=200, eta=0.2)
        r = fastsde.sample(model, n=samples, solver=solver, seed=seed, batch_size=samples, denoise=False)
        row: Row = {"data": name, "training": kind, "seed": seed, "sampler": "CAS"}
        row |= {"gap_last": gap(name, r.samples / float(sde.alpha(end)))}
        rows.append(row | {"gap_denoised": gap(name, denoised(model, r.samples, sde.t_min))})
    return {"data": {name: gap(name, draw(name, samples, 6)) for name in names}, "rows": rows}


@command("langevin_2d", main, steps=2, samples=10, seeds=1)
def langevin(steps: int = 2000, samples: int = 4000, seeds: int = 3, n_sigma: int = 10, eta: float = 0.2) -> list[Row]:
    """And by Langevin dynamics at one level?"""
    sde, rows = fastsde.VESDE(0.1, 0.1001), list[Row]()  # one level, to a thousandth
    kernel = fastsde.LangevinDynamics(eta, relative=True)
    for name, seed in itertools.product(("swiss roll", "25 Gaussians"), range(seeds)):
        torch.manual_seed(seed)
        network = MLP(2, depth=4, octaves=5)
        model = fastsde.ScoreModel(network, sde, "epsilon", event_shape=(2,), data_range=(-2.0, 2.0))
        data = draw(name, 50_000, 1)
        config = TrainConfig(steps, 256, 2e-3, seed=seed, bf16=False)
        trained(model, data, config)
        normals = torch.randn(samples, 2, generator=torch.Generator().manual_seed(seed + 10))
        for start, x in (("data", draw(name, samples, 6)), ("normals", normals * data.std(0))):
            r = fastsde.langevin(model, kernel=kernel, steps=n_sigma, t=1.0, x_init=x, seed=seed, batch_size=samples)
            row: Row = {"data": name, "seed": seed, "start": start, "gap_start": gap(name, x)}
            row |= {"gap_last": gap(name, r.samples), "gap_denoised": gap(name, denoised(model, r.samples, 1.0))}
            rows.append(row)
    return rows


def network_of(kind: str, seed: int, images: Tensor, steps: int) -> fastsde.ScoreModel:
    """A score model with the averaged weights.

    The network predicts v: with epsilon a training this short ends in black and white images. The largest norm of the
    gradient is scaled as the loss is, which the adversarial one sums over pixels.
    """
    channels, size = images.shape[1:3]
    torch.manual_seed(seed)
    network, event = small_unet(size, channels, widths=(16, 32, 48)), tuple(images.shape[1:])
    model = fastsde.ScoreModel(
        network, fastsde.VPSDE(), "v_prediction", event_shape=event, timestep=lambda t: 1000 * t - 1
    )
    adversary = Adversary(Discriminator(channels, 16), learning_rate=4e-4) if kind == ADVERSARIAL else None
    clip, betas = 0.5 * math.prod(event) if adversary else 1.0, (0.9, 0.999) if kind == PLAIN else (0.0, 0.9)
    config = TrainConfig(steps, 64, ema_decay=0.995, grad_clip=clip, betas=betas, seed=seed, bf16=False)
    return trained(model, images, config, adversary)


@command("adversarial_images", main, samples=130, levels=8, etas=[0.7], steps=2, seeds=1)
def images(
    data: Path,
    steps: int = 1500,
    seeds: int = 2,
    samples: int = 256,
    levels: int = 123,
    etas: tuple[float, ...] = (0.08, 0.15, 0.25, 0.45, 0.7),
) -> Row:
    """Does it help on images? 123 levels are as many as Song and Ermon's rule says."""
    shown, features, reference = (
        load_images(data)[0],
        open_features("fashion-mnist"),
        packaged_reference("fashion-mnist"),
    )

    def measured(model: fastsde.ScoreModel, name: str, n_sigma: int, eta: float) -> Row:
        solver = SAMPLERS[name](levels=levels, n_sigma=n_sigma, eta=eta)
        r = fastsde.sample(model, n=samples, solver=solver, batch_size=80, seed=0, denoise=False)
        row: Row = {"sampler": name, "n_sigma": n_sigma, "eta": eta, "nfe": float(r.nfe.double().mean())}
        for key, x in (("raw", r.samples), ("denoised", denoised(model, r.samples, model.sde.t_min))):
            finite = x[torch.isfinite(x).flatten(1).all(1)]
            found = frechet(features(pixels(finite))[0], reference.mean, reference.covariance)
            row |= {key: found.value, f"{key}_error": found.error}
        return row

    cells = [(name, 1, eta) for eta in etas for name in SAMPLERS if name == "ALS" or eta < 0.7]
    # With n_sigma 5: the step of ALS that keeps nearest to its schedule, and the published rule for CAS.
    cells += [("ALS", 5, 0.16), ("CAS", 5, 0.031)] if levels > 100 else []  # which CAS needs with so small a step
    rows = list[Row]()
    for kind, seed in itertools.product((ADVERSARIAL, PLAIN), range(seeds)):
        model = network_of(kind, seed, shown, steps)
        rows += [{"training": kind, "seed": seed} | measured(model, *cell) for cell in tqdm(cells, kind, disable=None)]
    return {"real_images": floor_of(samples), "rows": rows}


@command("inception", main, samples=130, levels=18, als_levels=18)
def inception(samples: int = 320, levels: int = 20, als_levels: int = 123) -> list[Row]:
    """Does denoising worsen the inception score?"""
    model, features = fastsde.pretrained("fashion-mnist"), open_features("fashion-mnist")
    reference, cond, rows = packaged_reference("fashion-mnist"), labels(samples), list[Row]()
    for solver in (
        fastsde.ExponentialPC(10),
        fastsde.AnnealedLangevin(levels=als_levels, eta=0.45),
        fastsde.ConsistentAnnealed(levels=levels, eta=0.45),
    ):
        r = fastsde.sample(
            model, n=samples, solver=solver, cond=cond, batch_size=80, seed=0, denoise=False, trajectory=True
        )
        times = r.trajectory[0].t
        noise = (model.sde.sigma(times) / model.sde.alpha(times)).tolist()
        for end in (len(times) - 1, min(range(len(times)), key=lambda k: abs(noise[k] - 0.05))):
            x, t = torch.stack([path.x[end] for path in r.trajectory]), float(times[end])
            last = x / float(model.sde.alpha(times[end]))
            for key, images in (("last state", last), ("denoised", denoised(model, x, t, cond))):
                seen, logits = features.of(pixels(images).split(100))
                assert logits is not None
                distance, score = frechet(seen, reference.mean, reference.covariance), inception_score(logits, splits=5)
                row: Row = {"solver": type(solver).__name__, "noise over signal": noise[end], "of": key}
                row |= {"fid": distance.value, "fid error": distance.error}
                rows.append(row | {"inception score": score[0], "score's sd of splits": score[1]})
    return rows


if __name__ == "__main__":
    main()
