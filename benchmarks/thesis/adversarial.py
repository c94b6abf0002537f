r"""Adversarial score matching: Figure 8.2, the shape of Table 8.1, and Figure 8.3 with a learned score.

`points`: a swiss roll and 25 Gaussians in two dimensions; VP down to noise over signal of 0.05; a perceptron trained by
denoising score matching, plain, adversarial (least squares, lambda 10) or plain with the Adam of the adversarial one,
which has no momentum; same steps and seeds. "gap" is the root mean square distance to the roll's curve or the nearest
centre, of the last state and of its expected denoised sample.

`langevin`: Figure 8.2 in its own setting (appendix C.2), on the same data: a perceptron trained at the one level 0.1,
and 10 steps of Langevin dynamics there. Their epsilon, 0.2, is taken in units of sigma^2, as in Algorithm 4: in units
of x^2 a step would overshoot 20 times. Samples start at data or at normals of the data's spread.

`images`: Fashion-MNIST without labels, a small UNet on VP that predicts v, plain and adversarial with the published
settings. Samples by ALS and CAS along 123 levels from noise over signal of 150 to 0.01, with n_sigma 1 at several step
sizes eta = eps / sigma_L^2 and with 5 at one, from the same noise for all. The Frechet distance is in the packaged
features, of the last state and of its expected denoised sample. It goes on where it stopped, and several processes may
share the trainings.

`inception`: appendix C.9 with the packaged network: Frechet distance and inception score (by the packaged classifier)
of last states and of their expected denoised samples. Of each run also the state at noise over signal near 0.05, as if
sampling ended there.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import tempfile
from pathlib import Path

import click
import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from chapter10 import floor_of
from common import RUNS, Row, command, labels, table

import fastsde
from fastsde.evaluation.features import Features, open_features
from fastsde.evaluation.images import to_uint8
from fastsde.evaluation.jobs import check_settings
from fastsde.evaluation.reference import packaged_reference
from fastsde.evaluation.statistics import frechet, inception_score
from fastsde.files import write_whole
from fastsde.training.adversarial import Adversary
from fastsde.training.config import TrainConfig
from fastsde.training.data import load_images
from fastsde.training.loop import train
from fastsde.training.networks import MLP, Discriminator, small_unet

PLAIN, BARE, ADVERSARIAL = "plain", "plain, no momentum", "adversarial"
SAMPLERS = {"ALS": fastsde.AnnealedLangevin, "CAS": fastsde.ConsistentAnnealed}
LAST, SPREAD, CENTRES = 0.05, 0.03, torch.cartesian_prod(*[torch.linspace(-1.4, 1.4, 5)] * 2)
"""Of the points: the lowest noise over signal, the deviation of each Gaussian, and their means."""


@click.group(help=__doc__)
def main() -> None:
    """Both studies."""


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


@command("Does the expected denoised sample come nearer?", "adversarial_2d", main, steps=2, samples=10, seeds=1)
@click.option("--steps", default=6000)
@click.option("--samples", "-n", default=4000)
@click.option("--seeds", default=2)
def points(steps: int, samples: int, seeds: int) -> Row:
    """Prints the table."""
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
        with tempfile.TemporaryDirectory() as folder:
            file, data = Path(folder) / "c.safetensors", draw(name, 50_000, 1)
            model.network = train(model, data, None, config, file, adversary=adversary, save_every=steps)
        for sampler, n_sigma, eta in (("CAS", 1, 0.2), ("ALS", 5, 0.1)):
            solver = SAMPLERS[sampler](levels=200, n_sigma=n_sigma, eta=eta)
            r = fastsde.sample(model, n=samples, solver=solver, seed=seed, batch_size=samples, denoise=False)
            last = torch.full((samples,), sde.t_min, dtype=torch.float64)
            with torch.no_grad():
                denoised = model(r.samples, last).x_0
            row: Row = {"data": name, "training": kind, "seed": seed, "sampler": sampler}
            row |= {"gap_last": gap(name, r.samples / float(sde.alpha(last)[0])), "gap_denoised": gap(name, denoised)}
            rows.append(row)
    table(rows)
    return {"data": {name: gap(name, draw(name, samples, 6)) for name in names}, "rows": rows}


@command("And by Langevin dynamics at one level?", "langevin_2d", main, steps=2, samples=10, seeds=1)
@click.option("--steps", default=2000)
@click.option("--samples", "-n", default=4000)
@click.option("--seeds", default=3)
@click.option("--n-sigma", default=10)
@click.option("--eta", default=0.2)
def langevin(steps: int, samples: int, seeds: int, n_sigma: int, eta: float) -> list[Row]:
    """Prints the table."""
    sde, rows = fastsde.VESDE(0.1, 0.1001), list[Row]()  # one level, to a thousandth
    kernel = fastsde.LangevinDynamics(eta, relative=True)
    for name, seed in itertools.product(("swiss roll", "25 Gaussians"), range(seeds)):
        torch.manual_seed(seed)
        network = MLP(2, depth=4, octaves=5)
        model = fastsde.ScoreModel(network, sde, "epsilon", event_shape=(2,), data_range=(-2.0, 2.0))
        data = draw(name, 50_000, 1)
        config = TrainConfig(steps, 256, 2e-3, seed=seed, bf16=False)
        with tempfile.TemporaryDirectory() as folder:
            model.network = train(model, data, None, config, Path(folder) / "c.safetensors", save_every=steps)
        normals = torch.randn(samples, 2, generator=torch.Generator().manual_seed(seed + 10))
        for start, x in (("data", draw(name, samples, 6)), ("normals", normals * data.std(0))):
            r = fastsde.langevin(model, kernel=kernel, steps=n_sigma, t=1.0, x_init=x, seed=seed, batch_size=samples)
            with torch.no_grad():
                denoised = model(r.samples, torch.ones(samples, dtype=torch.float64)).x_0
            row: Row = {"data": name, "seed": seed, "start": start, "gap_start": gap(name, x)}
            rows.append(row | {"gap_last": gap(name, r.samples), "gap_denoised": gap(name, denoised)})
    table(rows)
    return rows


def trained(folder: Path, images: Tensor, kind: str, seed: int, steps: int) -> fastsde.ScoreModel:
    """A score model with the averaged weights, in bfloat16; goes on from what is in the folder.

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
    config = TrainConfig(steps, 64, ema_decay=0.995, grad_clip=clip, betas=betas, seed=seed)
    file = folder / "checkpoint.safetensors"
    averaged = train(model, images, None, config, file, adversary=adversary, resume=file.is_file())
    model.network = nn.Module.to(averaged.eval(), torch.bfloat16)  # diffusers' own would warn
    return model


def pixels(x: Tensor) -> Tensor:
    """Rounded to 8 bits, with shape (n, C, H, W); samples that are not finite are left out."""
    whole = torch.isfinite(x).flatten(1).all(1)
    return torch.from_numpy(to_uint8(x[whole], (-1.0, 1.0))).permute(0, 3, 1, 2)


def distances(model: fastsde.ScoreModel, features: Features, etas: tuple[float, ...], levels: int, n: int) -> list[Row]:
    """The figures of every sampler and step size."""
    reference, rows = packaged_reference("fashion-mnist"), list[Row]()
    cells = [(name, 1, eta) for eta in etas for name in SAMPLERS if name == "ALS" or eta < 0.7]
    # With n_sigma 5: the step of ALS that keeps nearest to its schedule, and the published rule for CAS.
    cells += [("ALS", 5, 0.16), ("CAS", 5, 0.031)] if levels > 100 else []  # which CAS needs with so small a step
    for name, n_sigma, eta in tqdm(cells, disable=None):
        solver = SAMPLERS[name](levels=levels, n_sigma=n_sigma, eta=eta)
        r = fastsde.sample(model, n=n, solver=solver, batch_size=80, seed=0, denoise=False)
        row: Row = {"sampler": name, "n_sigma": n_sigma, "eta": eta, "nfe": float(r.nfe.double().mean())}
        with torch.no_grad():
            last = torch.full((n,), model.sde.t_min, dtype=torch.float64)
            parts = zip(r.samples.split(80), last.split(80), strict=True)
            denoised = torch.cat([model(x, t).x_0 for x, t in parts])
        for key, x in (("raw", r.samples), ("denoised", denoised)):
            found = frechet(features(pixels(x))[0], reference.mean, reference.covariance)
            row |= {key: found.value, f"{key}_error": found.error}
        rows.append(row)
    return rows


@command("Does it help on images?", "adversarial_images", main, samples=130, levels=8, etas=[0.7], steps=2, seeds=1)
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Folder with Fashion-MNIST's files.")
@click.option("--steps", default=1500)
@click.option("--rank", default=0, help="Which process this is.")
@click.option("--world-size", default=1, help="How many share the work.")
@click.option("--seeds", default=2)
@click.option("--samples", "-n", default=256)
@click.option("--levels", default=123, help="As many as Song and Ermon's rule says.")
@click.option("--eta", "etas", type=float, multiple=True, default=(0.08, 0.15, 0.25, 0.45, 0.7))
def images(
    data: Path, steps: int, rank: int, world_size: int, seeds: int, samples: int, levels: int, etas: tuple[float, ...]
) -> Row | None:
    """Trains and draws what is missing; the process that finds all rows there prints the table."""
    shown, features = load_images(data)[0], open_features("fashion-mnist")
    settings = {"steps": steps, "samples": samples, "levels": levels}
    work = RUNS / ("quick_images" if steps < 10 else "adversarial")
    jobs, rows = list(itertools.product((ADVERSARIAL, PLAIN), range(seeds))), list[Row]()
    for kind, seed in tqdm(jobs[rank::world_size], "trainings", disable=None):
        folder = work / f"{kind}-{seed}"
        check_settings(folder, "settings.json", settings)  # refuses a folder of other settings
        if not (folder / "rows.json").is_file():
            model = trained(folder, shown, kind, seed, steps)
            found = distances(model, features, etas, levels, samples)
            write_whole(folder / "rows.json", json.dumps(found).encode())
    for kind, seed in jobs:
        file = work / f"{kind}-{seed}" / "rows.json"
        if not file.is_file():
            return None
        rows += [{"training": kind, "seed": seed} | row for row in json.loads(file.read_text())]
    table(rows)
    return {"real_images": floor_of(packaged_reference("fashion-mnist"), samples), "rows": rows}


@command("Does denoising worsen the inception score?", "inception", main, samples=130, levels=8, als_levels=8)
@click.option("--samples", "-n", default=320)
@click.option("--levels", default=20, help="Of consistent annealed sampling.")
@click.option("--als-levels", default=123, help="Of annealed Langevin, which works with many only.")
def inception(samples: int, levels: int, als_levels: int) -> list[Row]:
    """Prints the table."""
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
            x, t = torch.stack([path.x[end] for path in r.trajectory]), times[end].expand(samples)
            with torch.no_grad():
                parts = [
                    (x[k], t[k], {"class_labels": cond["class_labels"][k]}) for k in torch.arange(samples).split(80)
                ]
                denoised = torch.cat([model(*part).x_0 for part in parts])
            for key, images in (("last state", x / float(model.sde.alpha(times[end]))), ("denoised", denoised)):
                seen, logits = features.of(pixels(images).split(100))
                assert logits is not None
                distance, score = frechet(seen, reference.mean, reference.covariance), inception_score(logits, splits=5)
                row: Row = {"solver": type(solver).__name__, "noise over signal": noise[end], "of": key}
                row |= {"fid": distance.value, "fid error": distance.error}
                rows.append(row | {"inception score": score[0], "score's sd of splits": score[1]})
    table(rows)
    return rows


if __name__ == "__main__":
    main()
