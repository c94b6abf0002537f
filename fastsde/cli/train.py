"""`fastsde train`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import click
import torch
from torch import Tensor, nn

from fastsde.cli.output import prepare_folder, versions
from fastsde.pretrained import save_checkpoint_folder, score_model
from fastsde.sde.vp import VPSDE
from fastsde.training.data import load_images
from fastsde.training.loop import TrainConfig, held_out_loss
from fastsde.training.loop import train as run_training
from fastsde.training.networks import small_unet

_DEFAULT = TrainConfig()


@click.command(short_help="Train a small score network on a folder of IDX images.")
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder with train-images-idx3-ubyte[.gz], train-labels-idx1-ubyte[.gz] and, for a test, t10k-*.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for checkpoint and model.")
@click.option("--steps", default=_DEFAULT.steps, type=click.IntRange(1), help="Optimiser steps in all.")
@click.option("--batch-size", default=_DEFAULT.batch_size, type=click.IntRange(1), help="Images a step.")
@click.option("--learning-rate", default=_DEFAULT.learning_rate, help="Peak learning rate of Adam.")
@click.option(
    "--seed", default=_DEFAULT.seed, type=click.IntRange(0, 1 << 31), help="Weights, batches, times and noise."
)
@click.option("--bf16/--fp32", default=_DEFAULT.bf16, help="Precision of the network's arithmetic.")
@click.option("--classes", default="", help="Class names, comma-separated; numbers by default.")
@click.option("--title", default="", help="Name and licence of the data, for the card: 'Fashion-MNIST; MIT'.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1.")
@click.option("--resume", is_flag=True, help="Continue from the checkpoint in --out.")
def train(
    data: Path,
    out: Path,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    bf16: bool,
    classes: str,
    title: str,
    device: str,
    resume: bool,
) -> None:
    """Train a class-conditional noise-prediction UNet (2.2 M parameters) by denoising score matching under the VP SDE.

    A tenth of the labels is dropped during training, so that the model also draws without a label. Every 250 steps
    --out/checkpoint.safetensors is replaced; at the end --out/model holds the averaged weights, ready for
    `fastsde sample --model OUT/model`.

    \b
    Example:
      fastsde train --data fashion-mnist --out runs/fashion --steps 6000
    """
    config = TrainConfig(steps=steps, batch_size=batch_size, learning_rate=learning_rate, seed=seed, bf16=bf16)
    checkpoint = out / "checkpoint.safetensors"
    if checkpoint.exists() and not resume:
        raise click.ClickException(f"{checkpoint} exists; pass --resume to continue it, or another --out.")
    try:
        images, labels = load_images(data)
        test = _test_split(data, images, labels)
        prepare_folder(out, needed=100 << 20)
        names = classes.split(",") if classes else [str(k) for k in range(int(labels.max()) + 1)]
        if len(names) != int(labels.max()) + 1:
            raise ValueError(f"--classes names {len(names)} classes; the data have {int(labels.max()) + 1}.")
        torch.manual_seed(seed)
        network = cast(nn.Module, small_unet(images.shape[-1], images.shape[1], len(names))).to(device)
        sde, card = VPSDE(), _card(images.shape, names, title, config)
        card["parameters"] = sum(p.numel() for p in network.parameters())
        model = score_model(network, sde, card)
        model.network = run_training(model, images, labels, config, checkpoint, resume=resume)
        save_checkpoint_folder(out / "model", model.network, card)
        if test is not None:
            loss = held_out_loss(model, *test)
            card["metrics"] = {"test_denoising_loss": round(loss, 5), "test_images": len(test[0])}
            save_checkpoint_folder(out / "model", model.network, card)
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{out / 'model'} is ready: fastsde sample --model {out / 'model'}")


def _test_split(data: Path, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor] | None:
    """Images and labels of the test split, checked against the training split before any training; None without one."""
    if images.shape[-1] != images.shape[-2]:
        raise ValueError(f"{data}: images must be square; they are {tuple(images.shape[-2:])}.")
    try:
        test_images, test_labels = load_images(data, train=False)
    except FileNotFoundError:
        return None
    if test_images.shape[1:] != images.shape[1:] or test_labels.max() > labels.max():
        raise ValueError(f"{data}: the test split has other image sizes or classes than the training split.")
    return test_images, test_labels


def _card(shape: torch.Size, names: list[str], title: str, config: TrainConfig) -> dict[str, Any]:
    """What the model says of itself, and how to read its network."""
    source, _, licence = title.partition(";")
    settings = dataclasses.asdict(config)
    options = f"--steps {config.steps} --batch-size {config.batch_size} --seed {config.seed}"
    return {
        "data": source.strip() or "not stated",
        "licence": licence.strip() or "not stated",
        "command": f"fastsde train --data FOLDER --out OUT {options}",
        "settings": json.loads(json.dumps(settings)),
        "images_seen": config.steps * config.batch_size,
        "metrics": {},
        "event_shape": list(shape[1:]),
        "data_range": [-1.0, 1.0],
        "classes": names,
        "prediction": "epsilon",
        "timestep_levels": 1000,
        "sde": {"beta_min": 0.1, "beta_max": 20.0},
        "versions": versions(),
    }
