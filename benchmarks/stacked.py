r"""Table 8.4's shape: does adversarial score matching cover the 1000 modes of stacked images as well as plain does?

3-stacked Fashion-MNIST: three training images, drawn apart, as the channels of one (60,000 stacks). The trainings of
`adversarial_images.py`, and plain with the Adam of the adversarial one; samples by `ExponentialPC` with a budget of
network calls. The packaged classifier reads each channel: the three classes are a mode. Modes covered, and the
Kullback-Leibler divergence of their shares to uniform; beside it the largest of the divergences of the shares of one
channel, and the Frechet distance of single channels in the packaged features. The same figures for stacks of test
images are what the classifier allows.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click
import torch
from adversarial_images import folder_of, jobs_of, one_above_the_other, trained
from common import RESULTS, save, table
from torch import Tensor
from tqdm import tqdm

import fastsde
from fastsde.evaluation.features import Features, open_features
from fastsde.evaluation.images import image_grid, to_uint8
from fastsde.evaluation.jobs import write_whole
from fastsde.evaluation.reference import packaged_reference
from fastsde.evaluation.statistics import frechet
from fastsde.training.data import load_images

KINDS = ("adversarial", "plain", "plain, no momentum")
PUBLISHED = {"plain": (1000, 1.36), "adversarial": (1000, 1.49)}


def stacks(images: Tensor, n: int, seed: int) -> Tensor:
    """Three grey images as the channels of one: uint8 with shape (n, 3, H, W), each equally often."""
    generator = torch.Generator().manual_seed(seed)

    def channel() -> Tensor:
        orders = [torch.randperm(len(images), generator=generator) for _ in range(-(-n // len(images)))]
        return images[torch.cat(orders)[:n]]

    return torch.cat([channel() for _ in range(3)], 1)


def divergence(classes: Tensor, k: int) -> float:
    """KL(share of each of k classes || uniform)."""
    share = torch.bincount(classes, minlength=k).double() / len(classes)
    return float(torch.special.xlogy(share, k * share).sum())


def figures(pictures: Tensor, features: Features) -> dict[str, Any]:
    """Modes and divergences of uint8 stacks with shape (n, 3, H, W)."""
    reference = packaged_reference("fashion-mnist")
    found, logits = zip(*(features(part.flatten(0, 1)[:, None]) for part in pictures.split(500)), strict=True)
    classes = torch.cat(logits).argmax(1).view(-1, 3)
    mode = classes @ torch.tensor([100, 10, 1])
    distance = frechet(torch.cat(found), reference.mean, reference.covariance)
    return {
        "modes": len(mode.unique()),
        "KL": divergence(mode, 1000),
        "largest_KL_of_a_channel": max(divergence(own, 10) for own in classes.T),
        "fid_of_channels": distance.value,
        "fid_error": distance.error,
    }


@click.command(help=__doc__.split("\n", 1)[0], context_settings={"show_default": True})
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Folder with Fashion-MNIST's IDX files.")
@click.option("--steps", default=1500)
@click.option("--seeds", default=1)
@click.option("--nfe", default=12)
@click.option("--samples", "-n", default=26_000)
@click.option("--rank", default=0, help="Which process this is.")
@click.option("--world-size", default=1, help="How many share the work, each with one thread.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/stacked"), help="Goes on from there.")
@click.option("--keep/--discard", default=True, help="Whether to write results/stacked.json and .png.")
def main(
    data: Path, steps: int, seeds: int, nfe: int, samples: int, rank: int, world_size: int, work: Path, keep: bool
) -> None:
    """Trains and draws what is missing; the process that finds all figures there prints the table and writes it."""
    settings = {"steps": steps, "nfe": nfe, "samples": samples}
    torch.set_num_threads(1 if world_size > 1 else os.cpu_count() or 1)
    images, features = load_images(data)[0], open_features("fashion-mnist")
    for kind, seed in tqdm(jobs_of(KINDS, seeds, rank, world_size), "trainings", disable=None):
        folder = folder_of(work, kind, seed, settings)
        if (folder / "row.json").is_file():
            continue
        model = trained(folder, stacks(images, len(images), 0), kind, seed, steps)
        r = fastsde.sample(model, n=samples, nfe=nfe, batch_size=100, progress=True)
        whole = torch.isfinite(r.samples).flatten(1).all(1)
        pictures = to_uint8(r.samples[whole], (-1.0, 1.0))
        image_grid(pictures[:60], columns=10).save(folder / "samples.png")
        row = {"training": kind, "seed": seed, "mean_nfe": float(r.nfe.double().mean()), "failed": int((~whole).sum())}
        row |= figures(torch.from_numpy(pictures).permute(0, 3, 1, 2), features)
        write_whole(folder / "row.json", json.dumps(row).encode())
    folders = [folder_of(work, kind, seed, settings) for kind in reversed(KINDS) for seed in range(seeds)]
    if not all((folder / "row.json").is_file() for folder in folders):
        return
    real = figures(stacks(load_images(data, train=False)[0], samples, 1), features)
    rows = [{"training": "test images", "seed": "-", "mean_nfe": 0.0, "failed": 0} | real]
    rows += [json.loads((folder / "row.json").read_text()) for folder in folders]
    print(f"KL of as many draws of uniform modes: {999 / 2 / samples:.3f}\n")
    table(list(rows[1]), [[f"{v:.3g}" if isinstance(v, float) else v for v in row.values()] for row in rows])
    if keep:
        one_above_the_other([folder / "samples.png" for folder in folders[::seeds]], RESULTS / "stacked.png")
        published = {kind: {"modes": modes, "KL": kl} for kind, (modes, kl) in PUBLISHED.items()}
        save("stacked", {**settings, "seeds": seeds, "world_size": world_size}, {"rows": rows, "published": published})


if __name__ == "__main__":
    main()
