r"""Autoencoders that judge themselves, diffusion in the latents of one, and regularised latent optimisation.

docs/measured/latent.md and latent-flow.md have the settings.

`autoencoders`: a plain VAE, IntroVAE and Soft-IntroVAE with the same network, number of steps and weight of the
reconstruction; the first eighth of the steps is the plain VAE's. "prior" is the Frechet distance, in the packaged
features, of decoded draws from the prior, "rec" that of reconstructions of test images, and "rms" their error; KL is
of test images, of their reconstructions and of the decoded draws, in nats. The margin of IntroVAE is 1.25 times the KL
that the plain VAE of the same seed reached.
`diffusion`: a latent model beside the packaged model of pixels: distance with 12 calls, and time of an image, sampled
and decoded.
`flow`: each term of `LatentFlow` alone and all, beside the same calls spent on sampling. Samples are judged by the
Frechet distance and by the sliced Wasserstein distance of whole pictures, which no term sees. A step of the flow is a
forward pass, its repetition in the backward pass, and that pass, counted as two. The bank's calls are shared out.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import click
import torch
from common import Row, command, fid, in_turn, labels, timed
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, softplus
from tqdm import tqdm

import fastsde
from fastsde.evaluation.statistics import sliced_wasserstein
from fastsde.latent import LatentFlow, sampler_map
from fastsde.training.config import TrainConfig
from fastsde.training.data import load_images, to_unit_range
from fastsde.training.introvae import IntroVAE, SoftIntroVAE, decoded, divergence, posterior, train_autoencoder
from fastsde.training.networks import FlatAutoencoder

PLAIN, INTRO, SOFT = "plain VAE", "IntroVAE", "Soft-IntroVAE"
TERMS = {
    "log p(x)": (1.0, 0.0, 0.0),
    "log p(y | x)": (0.0, 1.0, 0.0),
    "- log q(x)": (0.0, 0.0, 1.0),
    "log p(x) - log q(x)": (1.0, 0.0, 1.0),
    "all": (1.0, 1.0, 1.0),
}

main = click.Group(help=__doc__)


@torch.no_grad()
def figures(network: nn.Module, test: Tensor, margin: float, seed: int) -> Row:
    """What is measured of an autoencoder, on 8-bit test images."""
    x = to_unit_range(test)
    mean = torch.cat([posterior(network, part)[0] for part in x.split(500)])
    z_p = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed))
    x_r, x_p = (torch.cat([decoded(network, part) for part in z.split(500)]) for z in (mean, z_p))
    kl, of_r, of_p = (
        torch.cat([divergence(*posterior(network, part)) for part in images.split(500)]) for images in (x, x_r, x_p)
    )
    return {
        "prior": fid(x_p),
        "rec": fid(x_r),
        "rms": float((x_r - x).square().mean().sqrt()),
        "kl": float(kl.mean()),
        "kl_reconstructed": float(of_r.mean()),
        "kl_generated": float(of_p.mean()),
        "margin": margin,
    }


@command("latent_autoencoders", main, steps=3, samples=200, seeds=1)
def autoencoders(data: Path, steps: int = 800, samples: int = 2500, seeds: int = 3) -> Row:
    """What does introspection bring?"""
    images = load_images(data)[0]
    test = load_images(data, train=False)[0][:samples]
    rows = list[Row]()
    for kind, seed in itertools.product((PLAIN, INTRO, SOFT), range(seeds)):
        margin = 0.0 if kind == PLAIN else 1.25 * rows[seed]["kl"]
        # Half of beta_rec makes the same VAE as beta = 1 of the others.
        objectives = {PLAIN: IntroVAE(alpha=0.0), INTRO: IntroVAE(0.25, margin), SOFT: SoftIntroVAE(beta_rec=0.5)}
        torch.manual_seed(seed)
        network = FlatAutoencoder(28, 1)
        config = TrainConfig(steps, 64, 1e-3, warmup=50, ema_decay=0.99, seed=seed, bf16=False)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "c.safetensors"
            averaged = train_autoencoder(network, images, config, file, objectives[kind], plain=steps // 8)
        rows.append({"kind": kind, "seed": seed} | figures(averaged, test, margin, seed))
    return {"test_images": fid(to_unit_range(test)), "rows": rows}


@command("latent_diffusion", main, samples=130, seeds=1, seconds=1)
def diffusion(model: Path, samples: int = 2500, seeds: int = 3, seconds: int = 60) -> Row:
    """What do latents save?"""
    models = {"latents": fastsde.pretrained(model), "pixels": fastsde.pretrained("fashion-mnist")}

    def draw(name: str, n: int, seed: int) -> Tensor:
        r = fastsde.sample(models[name], n=n, nfe=12, seed=seed, cond=labels(n), batch_size=64)
        return models[name].decode(r.samples)

    times = in_turn(*(lambda name=name: timed(lambda: draw(name, 64, 0)) for name in models), seconds)
    rows = list[Row]()
    for (name, mine), spent in zip(models.items(), (times["ours_seconds"], times["theirs_seconds"]), strict=True):
        parts = [part for part in (mine.network, mine.autoencoder) if part is not None]
        row: Row = {"model": name, "parameters": sum(p.numel() for part in parts for p in part.parameters())}
        row |= {"ms_per_image": 1000 * spent / 64, "fid": [fid(draw(name, samples, seed)) for seed in range(seeds)]}
        rows.append(row)
    return {"times": times, "rows": rows}


def pooled(x: Tensor) -> Tensor:
    """Averages over squares of 4 x 4 pixels, with shape (B, 49)."""
    return avg_pool2d(x, 4).flatten(1)


def critic(real: Tensor, fake: Tensor, steps: int) -> nn.Module:
    """A network whose value is the logit of a picture being real; fitted to pooled pictures."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(49, 64), nn.SiLU(), nn.Linear(64, 1))
    rule = torch.optim.Adam(network.parameters(), 1e-3, weight_decay=1e-4)
    real, fake = pooled(real), pooled(fake)
    for _ in range(steps):
        loss = softplus(-network(real)).mean() + softplus(network(fake)).mean()
        rule.zero_grad()
        loss.backward()
        rule.step()
    return network.requires_grad_(False)


@command("latent_flow", main, samples=140, bank=64, calls=3, steps=(1,), seeds=1)
def flow(
    data: Path,
    model: Path,
    samples: int = 1000,
    bank: int = 256,
    calls: int = 4,
    steps: tuple[int, ...] = (5, 10, 15),
    step_size: float = 0.3,
    seeds: int = 2,
) -> list[Row]:
    """Does it pay to move the latents of a generator?"""
    latents, images = fastsde.pretrained(model), load_images(data)[0]
    real, held = to_unit_range(images[:1000]), to_unit_range(images[1000 : 1000 + samples])
    few, rows = sampler_map(latents, nfe=calls), list[Row]()

    def sampled(n: int, seed: int, **options: object) -> Tensor:
        return latents.decode(fastsde.sample(latents, n=n, seed=seed, **options).samples)

    def note(what: str, flow_steps: int | None, draw: Callable[[int], tuple[Tensor, float]]) -> None:
        drawn, spent = zip(*map(draw, range(seeds)), strict=True)
        row: Row = {"what": what, "steps": flow_steps, "calls": spent[-1], "fid": statistics.mean(map(fid, drawn))}
        row["sliced"] = statistics.mean(sliced_wasserstein(x.flatten(1), held.flatten(1)) for x in drawn)
        rows.append(row)

    for nfe in (calls, 2 * calls, 4 * calls, (1 + 4 * max(steps)) * calls):
        note(f"{nfe} calls", None, lambda seed, nfe=nfe: (sampled(samples, seed, nfe=nfe), nfe))
    fitted = fastsde.fit(latents, nfe=calls, progress=False)
    note(f"fitted, {calls} calls", None, lambda seed: (sampled(samples, seed, solver=fitted), calls))
    judge = critic(real, sampled(1000, 100, nfe=calls), steps=300)
    for (what, weights), k in tqdm(list(itertools.product(TERMS.items(), steps)), "terms", disable=None):
        moved = LatentFlow(
            lambda z: latents.decode(few(z), batch_size=len(z)),
            real,
            latents.event_shape or (),
            features=pooled,
            log_likelihood=lambda x: judge(pooled(x))[:, 0],
            weights=weights,
            step_size=step_size,
            steps=k,
            bank=bank,
        )

        def draw(seed: int, moved: LatentFlow = moved) -> tuple[Tensor, float]:
            r = moved.sample(samples, seed=seed)
            forward = r.forward.double().mean() + r.bank_forward / samples
            backward = r.backward.double().mean() + r.bank_backward / samples
            return r.samples, calls * float(forward + 3 * backward)

        note(what, k, draw)
    return rows


if __name__ == "__main__":
    main()
