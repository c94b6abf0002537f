r"""The shape of Table 8.1, and Figure 8.3 with a learned score: adversarial score matching on Fashion-MNIST.

Two trainings of a small UNet on VP, without labels, same steps, batches of 64 and noise for each seed: plain, with
Adam's usual betas, and adversarial with the published settings (least squares, lambda 1, Adam with (0, 0.9), and
(-0.5, 0.9) for the discriminator, which is updated once a step, here at a rate of 4e-4). The largest norm of the
gradient is scaled as the loss is, which the adversarial one sums over pixels. The network predicts v: with epsilon,
whose errors H multiplies by the noise over signal, a training this short ends in black and white images.

Samples by ALS and CAS along 123 levels from noise over signal of 150 to 0.01, as many as Song and Ermon's rule says,
with n_sigma 1 at several step sizes eta = eps / sigma_L^2 and with 5 at one, from the same noise for all. The Frechet
distance is in the packaged features, of the last state and of its expected denoised sample. The second table has, as
the thesis's, the step size of the lowest denoised distance for each row.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
import torch
from common import RESULTS, save, table
from PIL import Image
from thesis_network import floor_of
from torch import Tensor, nn
from tqdm import tqdm

import fastsde
from fastsde.evaluation.features import Features, open_features
from fastsde.evaluation.images import image_grid, to_uint8
from fastsde.evaluation.jobs import claim, write_whole
from fastsde.evaluation.reference import packaged_reference
from fastsde.evaluation.statistics import frechet
from fastsde.training.adversarial import Adversary
from fastsde.training.config import TrainConfig
from fastsde.training.data import load_images
from fastsde.training.loop import train
from fastsde.training.networks import Discriminator, small_unet

KINDS = ("adversarial", "plain")
LEVELS = 123  # number_of_levels(152, 0.0105, 784)
ETAS = {
    ("ALS", 1): (0.08, 0.15, 0.25, 0.45, 0.7),
    ("CAS", 1): (0.08, 0.15, 0.25, 0.45),
    ("ALS", 5): (0.16,),  # that of `closest_step`
    ("CAS", 5): (0.031,),  # the beta^2 n_sigma of 0.15 with n_sigma 1, as in app. C.2
}
SAMPLERS = {"ALS": fastsde.AnnealedLangevin, "CAS": fastsde.ConsistentAnnealed}
PUBLISHED = {  # Table 8.1: plain, adversarial; each not denoised and denoised
    ("ALS", 1): ((36.3, 13.3), (30.0, 11.8)),
    ("ALS", 5): ((33.7, 10.9), (26.4, 9.5)),
    ("CAS", 1): ((14.7, 12.3), (11.9, 10.8)),
    ("CAS", 5): ((12.7, 11.2), (9.9, 9.7)),
}
COLORS = {"ALS": "#d55e00", "CAS": "#0072b2"}


def trained(folder: Path, images: Tensor, kind: str, seed: int, steps: int) -> fastsde.ScoreModel:
    """A score model with the averaged weights, in bfloat16; goes on from what is in the folder."""
    channels, size = images.shape[1:3]
    torch.manual_seed(seed)
    network = small_unet(size, channels, widths=(16, 32, 48))
    model = fastsde.ScoreModel(
        network, fastsde.VPSDE(), "v_prediction", event_shape=tuple(images.shape[1:]), timestep=lambda t: 1000 * t - 1
    )
    adversary = Adversary(Discriminator(channels, 16), learning_rate=4e-4) if kind == "adversarial" else None
    config = TrainConfig(
        steps,
        64,
        ema_decay=0.995,
        grad_clip=0.5 * math.prod(images.shape[1:]) if adversary else 1.0,
        betas=(0.9, 0.999) if kind == "plain" else (0.0, 0.9),
        seed=seed,
    )
    checkpoint = folder / "checkpoint.safetensors"
    averaged = train(model, images, None, config, checkpoint, adversary=adversary, resume=checkpoint.is_file())
    model.network = nn.Module.to(averaged.eval(), torch.bfloat16)  # diffusers' own would warn
    return model


def rows_of(folder: Path, model: fastsde.ScoreModel, features: Features, samples: int) -> list[dict[str, Any]]:
    """The figures of every sampler and step size, a file each."""
    reference, rows = packaged_reference("fashion-mnist"), []
    cells = [(*key, eta) for key, etas in ETAS.items() for eta in etas]
    for sampler, n_sigma, eta in tqdm(cells, folder.name, disable=None):
        path = folder / f"{sampler}-{n_sigma}-{eta}.json"
        if not path.is_file():
            solver = SAMPLERS[sampler](levels=LEVELS, n_sigma=n_sigma, eta=eta)
            r = fastsde.sample(model, n=samples, solver=solver, batch_size=80, denoise=False)
            calls = float(r.nfe.double().mean())
            row: dict[str, Any] = {"sampler": sampler, "n_sigma": n_sigma, "eta": eta, "nfe": calls}
            with torch.no_grad():
                last = torch.full((samples,), model.sde.t_min, dtype=torch.float64)
                pairs = zip(r.samples.split(80), last.split(80), strict=True)
                denoised = torch.cat([model(x, t).x_0 for x, t in pairs])
            whole = torch.isfinite(denoised).flatten(1).all(1)
            row["failed"] = int((~whole).sum())
            for key, x in (("raw", r.samples[whole]), ("denoised", denoised[whole])):
                pictures = to_uint8(x, (-1.0, 1.0))
                distance = frechet(
                    features(torch.from_numpy(pictures).permute(0, 3, 1, 2))[0], reference.mean, reference.covariance
                )
                row |= {key: distance.value, f"{key}_error": distance.error}
            image_grid(pictures[:60], columns=10).save(path.with_suffix(".png"))
            write_whole(path, json.dumps(row).encode())
        rows.append(json.loads(path.read_text()))
    return rows


def best_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each training, seed, sampler and n_sigma the row of the lowest denoised distance."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["training"], row["seed"], row["sampler"], row["n_sigma"]].append(row)
    return [min(group, key=lambda row: row["denoised"]) for group in groups.values()]


def plot(rows: list[dict[str, Any]]) -> None:
    """Draws results/adversarial_steps.png: the distance against the step size, every seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.2), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, kind in zip(panels, ("plain", "adversarial"), strict=True):
        for (name, color), (key, style) in itertools.product(COLORS.items(), (("raw", "--"), ("denoised", "-"))):
            label: str | None = f"{name}, {'denoised' if key == 'denoised' else 'not denoised'}"
            for seed in sorted({row["seed"] for row in rows}):
                line = (kind, seed, name, 1)
                own = [r for r in rows if (r["training"], r["seed"], r["sampler"], r["n_sigma"]) == line]
                x, y = [r["eta"] for r in own], [r[key] for r in own]
                panel.plot(x, y, style, color=color, marker="o", ms=3, label=label)
                label = None
        panel.set(xscale="log", yscale="log", title=f"{kind}, n_sigma = 1", xlabel="step size, eps / sigma_L$^2$")
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("Frechet distance")
    panels[0].legend(fontsize=8)
    figure.savefig(RESULTS / "adversarial_steps.png")


def one_above_the_other(paths: list[Path], target: Path) -> None:
    """Pictures of one size, with a gap between them."""
    pictures = [Image.open(path) for path in paths]
    height = pictures[0].height + 12
    sheet = Image.new(pictures[0].mode, (pictures[0].width, len(paths) * height - 12), "white")
    for k, picture in enumerate(pictures):
        sheet.paste(picture, (0, k * height))
    sheet.save(target)


def jobs_of(kinds: tuple[str, ...], seeds: int, rank: int, world_size: int) -> list[tuple[str, int]]:
    """What a process does: the longest first, a seed after the other."""
    return [(kind, seed) for kind in kinds for seed in range(seeds)][rank::world_size]


def folder_of(work: Path, kind: str, seed: int, settings: dict[str, object]) -> Path:
    """Where a training and its samples are kept; refuses a folder of other settings."""
    folder = work / f"{kind}-{seed}"
    claim(folder, "settings.json", settings)
    return folder


@click.command(help=__doc__.split("\n", 1)[0], context_settings={"show_default": True})
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Folder with Fashion-MNIST's IDX files.")
@click.option("--steps", default=1500)
@click.option("--seeds", default=2)
@click.option("--samples", "-n", default=256)
@click.option("--rank", default=0, help="Which process this is.")
@click.option("--world-size", default=1, help="How many share the work, each with one thread.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/adversarial"), help="Goes on from there.")
@click.option("--keep/--discard", default=True, help="Whether to write results/adversarial_images.json and pictures.")
def main(data: Path, steps: int, seeds: int, samples: int, rank: int, world_size: int, work: Path, keep: bool) -> None:
    """Trains and draws what is missing; the process that finds all rows there prints the tables and writes them."""
    settings = {"steps": steps, "samples": samples}
    torch.set_num_threads(1 if world_size > 1 else os.cpu_count() or 1)
    images, features = load_images(data)[0], open_features("fashion-mnist")
    for kind, seed in jobs_of(KINDS, seeds, rank, world_size):
        folder = folder_of(work, kind, seed, settings)
        rows = rows_of(folder, trained(folder, images, kind, seed, steps), features, samples)
        found = [{"training": kind, "seed": seed} | row for row in rows]
        write_whole(folder / "rows.json", json.dumps(found).encode())
    files = [folder_of(work, kind, seed, settings) / "rows.json" for kind in reversed(KINDS) for seed in range(seeds)]
    if not all(file.is_file() for file in files):
        return
    rows = [row for file in files for row in json.loads(file.read_text())]
    floor = floor_of(packaged_reference("fashion-mnist"), samples)
    print(f"{samples} training images: FID {floor.mean():.3f}, spread {floor.std():.3f}\n")
    keys = ("training", "seed", "sampler", "n_sigma", "eta", "nfe", "raw", "raw_error", "denoised", "denoised_error")
    for part in (rows, best_rows(rows)):
        table(keys, [[f"{v:.3g}" if isinstance(v := row[k], float) else v for k in keys] for row in part])
        print()
    if keep:
        plot(rows)
        shown = [folder_of(work, kind, 0, settings) / "CAS-1-0.25.png" for kind in ("plain", "adversarial")]
        one_above_the_other(shown, RESULTS / "adversarial_images.png")
        real = {"mean": float(floor.mean()), "spread": float(floor.std())}
        published = [{"sampler": s, "n_sigma": k, "plain": a, "adversarial": b} for (s, k), (a, b) in PUBLISHED.items()]
        save(
            "adversarial_images",
            {**settings, "world_size": world_size},
            {"real_images": real, "rows": rows, "published": published},
        )


if __name__ == "__main__":
    main()
