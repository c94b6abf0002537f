r"""Autoencoders that judge themselves, and diffusion in the latents of one.

`autoencoders`: a plain VAE, IntroVAE and Soft-IntroVAE on Fashion-MNIST, with the same network (latents of 32 numbers),
the same number of steps and the same weight of the reconstruction; the first eighth of the steps is the plain VAE's.
"prior" is the Frechet distance, in the packaged features, of decoded draws from the prior, "rec" that of
reconstructions of test images, and "rms" their error; KL is of test images, of their reconstructions and of the decoded
draws, in nats. The margin of IntroVAE is 1.25 times the KL that the plain VAE of the same seed reached. The study goes
on where it stopped.

`diffusion`: a latent model beside the packaged model of pixels: distance with 12 calls, and time of an image, sampled
and decoded, on one thread.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import torch
from common import RUNS, Book, Row, command, fid, in_turn, labels, table, timed
from torch import Tensor, nn

import fastsde
from fastsde.training.config import TrainConfig
from fastsde.training.data import load_images, to_unit_range
from fastsde.training.introvae import (
    IntroVAE,
    SoftIntroVAE,
    decoded,
    divergence,
    posterior,
    train_autoencoder,
)
from fastsde.training.networks import FlatAutoencoder

PLAIN, INTRO, SOFT = "plain VAE", "IntroVAE", "Soft-IntroVAE"
FIGURES = ("prior", "rec", "rms", "kl", "kl_reconstructed", "kl_generated", "beyond", "active", "margin")


@click.group(help=__doc__)
def main() -> None:
    """Both studies."""


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
        "beyond": float((of_p > margin).double().mean()),
        # Units whose mean tells images apart: a variance above 0.01 (Burda et al.).
        "active": int((mean.var(0) > 0.01).sum()),
        "margin": margin,
    }


@command("What does introspection bring?", "latent_autoencoders", main, steps=3, samples=200, seeds=1)
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Folder with Fashion-MNIST's files.")
@click.option("--steps", default=800)
@click.option("--samples", "-n", default=2500)
@click.option("--seeds", default=3)
def autoencoders(data: Path, steps: int, samples: int, seeds: int) -> Row:
    """Prints the table."""
    images = load_images(data)[0]
    test = load_images(data, train=False)[0][:samples]
    soft = SoftIntroVAE(beta_rec=0.5)  # the same VAE as beta = 1 of the others
    book = Book(RUNS / f"autoencoders-{steps}-{samples}.csv", ("kind", "seed"), FIGURES)

    def trained(objective: IntroVAE | SoftIntroVAE, seed: int, margin: float) -> Row:
        torch.manual_seed(seed)
        network = FlatAutoencoder(28, 1)
        config = TrainConfig(steps, 64, 1e-3, warmup=50, ema_decay=0.99, seed=seed, bf16=False)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "c.safetensors"
            averaged = train_autoencoder(network, images, config, file, objective, plain=steps // 8)
        return figures(averaged, test, margin, seed)

    for seed in range(seeds):
        book.need(PLAIN, seed, work=lambda seed=seed: trained(IntroVAE(alpha=0.0), seed, 0.0))
        margin = 1.25 * float(book.rows[PLAIN, str(seed)]["kl"])
        book.need(INTRO, seed, work=lambda s=seed, m=margin: trained(IntroVAE(0.25, m), s, m))
        book.need(SOFT, seed, work=lambda s=seed, m=margin: trained(soft, s, m))
    rows: list[Row] = [
        {"kind": kind, "seed": seed} | {key: float(book.rows[kind, str(seed)][key]) for key in FIGURES}
        for kind in (PLAIN, INTRO, SOFT)
        for seed in range(seeds)
    ]
    table(rows)
    return {"test_images": fid(to_unit_range(test)), "rows": rows}


@command("What do latents save?", "latent_diffusion", main, samples=130, seeds=1, seconds=1)
@click.option("--model", required=True, type=click.Path(path_type=Path), help="Folder of a latent model.")
@click.option("--samples", "-n", default=2500)
@click.option("--seeds", default=3)
@click.option("--seconds", default=60, help="For the times.")
def diffusion(model: Path, samples: int, seeds: int, seconds: int) -> Row:
    """Prints the table."""
    models = {"latents": fastsde.pretrained(model), "pixels": fastsde.pretrained("fashion-mnist")}

    def draw(name: str, n: int, seed: int) -> Tensor:
        r = fastsde.sample(models[name], n=n, nfe=12, seed=seed, cond=labels(n), batch_size=64)
        return models[name].decode(r.samples)

    times = in_turn(
        lambda: timed(lambda: draw("latents", 64, 0)), lambda: timed(lambda: draw("pixels", 64, 0)), seconds
    )
    rows = list[Row]()
    for name, mine in models.items():
        parts = [part for part in (mine.network, mine.autoencoder) if part is not None]
        time = times["ours_seconds" if name == "latents" else "theirs_seconds"]
        row: Row = {"model": name, "parameters": sum(p.numel() for part in parts for p in part.parameters())}
        row["ms_per_image"] = 1000 * float(str(time)) / 64
        row["fid"] = [fid(draw(name, samples, seed)) for seed in range(seeds)]
        rows.append(row)
    table(rows)
    return {"times": times, "rows": rows}


if __name__ == "__main__":
    main()
