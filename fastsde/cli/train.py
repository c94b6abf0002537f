"""`fastsde train`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import click
import torch
from safetensors.torch import save
from torch import Tensor, nn

from fastsde import api
from fastsde.checkpoints import CARD, PackagedModel, load_autoencoder, save_checkpoint_folder, score_model
from fastsde.cli import options as option
from fastsde.cli.options import PATH
from fastsde.cli.output import data_and_licence, prepare_folder, versions
from fastsde.cli.train_settings import AUTOENCODERS, Settings, as_toml, read_settings
from fastsde.diffusers.latents import SCALE, encode_images, measure_scale
from fastsde.diffusers.networks import LATENT_RANGE
from fastsde.evaluation.images import image_grid, open_images, to_uint8
from fastsde.evaluation.jobs import processes
from fastsde.files import as_json, csv_text, read_json, sha256, write_whole
from fastsde.score.network import weights_hash
from fastsde.sde.vp import VPSDE
from fastsde.training.batches import check_data, data_hash, rank_and_size
from fastsde.training.checkpoint import History, read_tensors
from fastsde.training.config import TrainConfig
from fastsde.training.data import holds_idx, load_images, load_test_images, to_unit_range
from fastsde.training.introvae import decoded, divergence, posterior, reconstruction, train_autoencoder
from fastsde.training.loop import held_out_loss
from fastsde.training.loop import train as run_training
from fastsde.training.networks import small_autoencoder, small_unet

_DEFAULT = TrainConfig()


def _flag(name: str, kind: Any, default: object, text: str) -> Any:
    """An option whose default is the settings' own, so that it only counts where it is given."""
    return click.option(name, type=kind, help=text, show_default=str(default))


@click.command()
@click.option("--config", type=PATH, help="A TOML file of settings; see docs/howto/training.md.")
@click.option("--set", "assignments", multiple=True, help="One setting, as in --set training.steps=100; may repeat.")
@click.option(
    "--data",
    help="Yours: a folder with train-images-idx3-ubyte[.gz], train-labels-idx1-ubyte[.gz] and, for a test, t10k-*, "
    "as torchvision downloads MNIST; or images without labels: a folder, an .npz, a data set saved to disk.",
)
@click.option("--out", required=True, type=PATH, help="Folder for checkpoint and model.")
@_flag("--steps", click.IntRange(1), _DEFAULT.steps, "Optimiser steps in all.")
@_flag("--batch-size", click.IntRange(1), _DEFAULT.batch_size, "Images a step.")
@_flag("--learning-rate", float, _DEFAULT.learning_rate, "Peak learning rate of Adam.")
@_flag("--seed", click.IntRange(0, 1 << 31), _DEFAULT.seed, "Weights, batches, times and noise.")
@click.option("--bf16/--fp32", default=None, help="Precision of the network's arithmetic.", show_default="bf16")
@click.option("--classes", help="Class names, comma-separated.", show_default="numbers")
@click.option("--title", help="Name and licence of the data, for the card: 'Fashion-MNIST; MIT'.")
@option.device
@click.option("--resume", is_flag=True, help="Continue from the checkpoint in --out.")
def train(
    config: Path | None, assignments: tuple[str, ...], out: Path, device: torch.device, resume: bool, **asked: Any
) -> None:
    """Train a UNet by denoising score matching under the VP SDE; 2.2 M parameters that predict the noise, by default.

    With model=vae, introvae or soft-introvae among the settings it is an autoencoder that is trained; with model=latent
    a score network of an autoencoder's latents, which are encoded once.

    With labels the network is class-conditional; a tenth of them is dropped, so that it also draws without one. An
    [adversary] among the settings adds a discriminator of denoised samples. Every 250 steps a checkpoint and losses.csv
    in --out are replaced, every 1000 --out/samples gets a picture; at the end --out/model holds the averaged weights,
    ready for `fastsde sample --model OUT/model`. Under `torchrun` or `accelerate launch` processes share each batch.

    \b
    Examples:
      fastsde train --data data/FashionMNIST --out runs/fashion --steps 6000
      fastsde train --config run.toml --set adversary.weight=2 --out runs/adversarial
      torchrun --nproc-per-node 2 -m fastsde train --data photos/ --out runs/photos
      fastsde train --data data/FashionMNIST --out runs/vae --set model=vae --set vae.beta=30
      fastsde train --data data/FashionMNIST --out runs/latent --set model=latent --set autoencoder=runs/vae/model
    """
    options = {f"training.{name}": asked[name] for name in ("steps", "batch_size", "learning_rate", "seed", "bf16")}
    options |= {"data": asked["data"], "title": asked["title"]}
    options["classes"] = asked["classes"].split(",") if asked["classes"] else None
    checkpoint = out / "checkpoint.safetensors"
    if checkpoint.exists() and not resume:
        raise ValueError(f"{checkpoint} exists; pass --resume to continue it, or another --out.")
    settings = read_settings(config, assignments, options)
    rank, size = processes(None, None, os.environ)
    data = _read_data(settings, out)
    vae = load_autoencoder(settings.autoencoder, device=device) if settings.model == "latent" else None
    if vae is not None and vae.config["in_channels"] != data.images.shape[1]:
        raise ValueError(
            f"autoencoder={settings.autoencoder} takes images of {vae.config['in_channels']} channels; the data have "
            f"{data.images.shape[1]}."
        )
    prepare_folder(out, needed=100 << 20)
    try:
        if size > 1:
            torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if settings.model in AUTOENCODERS:
            _train_autoencoder(settings, data, device, out, resume)
        else:
            _train_score(settings, data, vae, device, out, resume)
    except KeyboardInterrupt as error:
        raise click.ClickException(f"interrupted; --resume goes on from {checkpoint}, if it is there.") from error
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if rank == 0:
        todo = "train --set model=latent --set autoencoder=" if settings.model in AUTOENCODERS else "sample --model "
        click.echo(f"{out / 'model'} is ready: fastsde {todo}{out / 'model'}")


@dataclasses.dataclass(frozen=True)
class _Data:
    """Images and labels to train on, and those of the test split if there is one."""

    images: Tensor
    labels: Tensor | None = None
    test_images: Tensor | None = None
    test_labels: Tensor | None = None


def _read_data(settings: Settings, out: Path) -> _Data:
    if not settings.data:
        raise ValueError("--data is needed, or data = ... in --config.")
    source = Path(settings.data)
    if source.is_dir() and holds_idx(source):
        images, labels = load_images(source)
        data = _Data(images, labels)
        with contextlib.suppress(FileNotFoundError):
            data = _Data(images, labels, *load_test_images(source, images, labels))
    elif source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"--out {out} lies in --data {source}: its pictures would become data.")
    else:
        data = _Data(torch.cat(list(open_images(source).batches())))
    if data.images.shape[-1] != data.images.shape[-2]:
        raise ValueError(f"{source}: images must be square; they are {tuple(data.images.shape[-2:])}.")
    if not settings.labels:
        data = dataclasses.replace(data, labels=None, test_labels=None)
    count = 0 if data.labels is None else int(data.labels.max()) + 1
    if settings.classes and len(settings.classes) != count:
        raise ValueError(f"--classes names {len(settings.classes)} classes; the data have {count}.")
    return data


def _train_score(settings: Settings, data: _Data, vae: Any, device: torch.device, out: Path, resume: bool) -> None:
    names = settings.classes or tuple(str(k) for k in range(0 if data.labels is None else int(data.labels.max()) + 1))
    sde, card = VPSDE(), _card(data.images.shape, settings)
    if vae is not None:
        check_data(data.images, data.labels)
        images, seen = _latents(vae, data.images, data.test_images, out / "latents.safetensors")
        data = dataclasses.replace(data, images=images, test_images=seen)
        source = Path(settings.autoencoder) / CARD
        stated = read_json(source) if source.is_file() else {}
        keys = ("data", "licence", "command", "metrics", "parameters")
        card["autoencoder"] = {key: stated[key] for key in keys if key in stated}
        card["latents"] = {key: vae.config[key] for key in SCALE}
    _, channels, _, side = data.images.shape
    torch.manual_seed(settings.training.seed)
    unet = small_unet(side, channels, len(names) or None, widths=settings.network.widths)
    network = cast(nn.Module, unet)
    card |= {
        "event_shape": list(data.images.shape[1:]),
        "data_range": [-1.0, 1.0] if vae is None else list(LATENT_RANGE),
        "classes": list(names),
        "prediction": settings.network.prediction,
        "timestep_levels": 1000,
        "sde": {"beta_min": 0.1, "beta_max": 20.0},
        "parameters": sum(p.numel() for p in network.parameters()),
    }
    model = score_model(network.to(device), sde, card, vae)
    adversary = None if settings.adversary is None else settings.adversary.build(channels, side)
    if adversary is not None:
        adversary.network.to(device)

    def draw(averaged: nn.Module, path: Path) -> None:
        draw_samples(score_model(averaged, sde, card, vae), len(names), path)

    loop = _loop(settings, out, resume, draw)
    model.network = run_training(model, data.images, data.labels, settings.training, adversary=adversary, **loop)
    if rank_and_size()[0] > 0:
        return
    save_checkpoint_folder(out / "model", model.network, card, vae)
    if data.test_images is not None:
        loss = _finite(held_out_loss(model, data.test_images, data.test_labels), "the loss on test images")
        card["metrics"] = {"test_denoising_loss": round(loss, 5), "test_images": len(data.test_images)}
        save_checkpoint_folder(out / "model", model.network, card, vae)


def _latents(vae: Any, images: Tensor, test: Tensor | None, cache: Path) -> tuple[Tensor, Tensor | None]:
    """Latents of both splits, and their scale in the autoencoder's configuration.

    They are encoded once and kept in a file: encoded again, on another number of threads or on a GPU, they would differ
    in their last digits, and a run that resumes would be one with other data.
    """
    of = sha256(f"{weights_hash(vae)} {data_hash(images, None)} {None if test is None else len(test)}".encode())
    if cache.is_file():
        found, kept = read_tensors(cache)
        if kept.get("of") != of:
            raise ValueError(f"{cache} is of other data or another autoencoder. Choose another --out, or delete it.")
        scale = json.loads(kept["scale"])
        vae.register_to_config(scaling_factor=1.0, shift_factor=None, **scale)
    else:
        found = {"train": measure_scale(vae, images).contiguous()}
        found |= {} if test is None else {"test": encode_images(vae, test, batch_size=250).contiguous()}
        scale = {key: vae.config[key] for key in SCALE}
        if rank_and_size()[0] == 0:
            write_whole(cache, save(found, {"of": of, "scale": json.dumps(scale)}))
    return found["train"], found.get("test")


def _train_autoencoder(settings: Settings, data: _Data, device: torch.device, out: Path, resume: bool) -> None:
    vae, (_, channels, _, side) = settings.vae, data.images.shape
    torch.manual_seed(settings.training.seed)
    built = small_autoencoder(side, channels, widths=vae.widths, latent_channels=vae.channels)
    network, card = cast(nn.Module, built).to(device), _card(data.images.shape, settings)
    small = side >> len(vae.widths) - 1
    card |= {"latent_shape": [vae.channels, small, small], "parameters": sum(p.numel() for p in network.parameters())}
    shown = to_unit_range(data.images[:20])

    def draw(averaged: nn.Module, path: Path) -> None:
        draw_reconstructions(averaged, shown, path)

    objective, loop = vae.objective(settings.model), _loop(settings, out, resume, draw)
    averaged = train_autoencoder(network, data.images, settings.training, objective=objective, plain=vae.plain, **loop)
    if rank_and_size()[0] > 0:
        return
    if data.test_images is not None:
        card["metrics"] = reconstruction_error(averaged, data.test_images) | {"test_images": len(data.test_images)}
    save_checkpoint_folder(out / "model", averaged, card)


def _loop(settings: Settings, out: Path, resume: bool, draw: Callable[[nn.Module, Path], None]) -> dict[str, Any]:
    """What any training is told: its checkpoint, and what writes losses and pictures after each of them."""

    def note(step: int, history: History, averaged: nn.Module) -> None:
        columns = {"step": range(step), **history}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        write_whole(out / "losses.csv", csv_text(rows))
        if settings.samples_every and step % settings.samples_every == 0:
            (out / "samples").mkdir(exist_ok=True)
            draw(averaged, out / "samples" / f"{step:06d}.png")

    checkpoint = out / "checkpoint.safetensors"
    return {"checkpoint": checkpoint, "resume": resume, "save_every": settings.save_every, "callback": note}


def draw_samples(model: PackagedModel, classes: int, path: Path, n: int = 40) -> None:
    """A picture of samples with 12 calls, the same noise every time, labels in turn."""
    cond = {"class_labels": torch.arange(n) % classes} if classes else None
    r = api.sample(model, n=n, nfe=12, cond=cond, batch_size=n)
    whole = r.samples[torch.isfinite(r.samples).flatten(1).all(1)]
    if len(whole):
        _draw_images(model.decode(whole), path)


@torch.no_grad()
def draw_reconstructions(network: nn.Module, images: Tensor, path: Path) -> None:
    """A picture of images, their reconstructions below, and as many decoded draws from the prior."""
    images = images.to(next(network.parameters()).device)
    mean, _ = posterior(network, images)
    z_p = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0)).to(mean)
    parts = (images, decoded(network, mean), decoded(network, z_p))
    rows = [half for part in (parts[:2], parts[2:]) for half in zip(*(one.split(10) for one in part), strict=True)]
    _draw_images(torch.cat([one for row in rows for one in row]).cpu(), path)


def _draw_images(images: Tensor, path: Path) -> None:
    write_whole(path, image_grid(to_uint8(images, (-1.0, 1.0)), columns=10, width=56).save)


@torch.no_grad()
def reconstruction_error(network: nn.Module, images: Tensor) -> dict[str, float]:
    """Of 8-bit images: root mean square error of decoded means in [-1, 1], and the mean KL in nats."""
    device, error, kl = next(network.parameters()).device, 0.0, 0.0
    for part in images.split(250):
        x = to_unit_range(part).to(device)
        mean, logvar = posterior(network, x)
        error += 2 * float(reconstruction(x, decoded(network, mean)).double().sum())
        kl += float(divergence(mean, logvar).double().sum())
    rms = _finite(math.sqrt(error / images.numel()), "the error on test images")
    return {"test_rms_error": round(rms, 5), "test_kl": round(kl / len(images), 3)}


def _finite(value: float, what: str) -> float:
    if not math.isfinite(value):
        raise FloatingPointError(f"{what} is {value}: training diverged; lower the learning_rate.")
    return value


def _card(shape: torch.Size, settings: Settings) -> dict[str, Any]:
    """What a network says of itself: data, command and settings."""
    config, named = settings.training, ("training.steps", "training.batch_size", "training.seed")
    command = f"--steps {config.steps} --batch-size {config.batch_size} --seed {config.seed}"
    others = [f"{key}={as_toml(v)}" for key, v in settings.differences() if key not in named]
    command += "".join(f" --set {shlex.quote(text)}" for text in others)
    command += " --set autoencoder=FOLDER" if settings.autoencoder else ""
    own = as_json(dataclasses.asdict(settings))
    own_table = "vae" if settings.model in AUTOENCODERS else "network"
    return {
        "model": settings.model,
        **data_and_licence(settings.title),
        "command": f"fastsde train --data FOLDER --out OUT {command}",
        "settings": own["training"],
        own_table: own[own_table],
        "adversary": own["adversary"],
        "images_seen": config.steps * config.batch_size,
        "metrics": {},
        "image_shape": list(shape[1:]),
        "versions": versions(),
    }
