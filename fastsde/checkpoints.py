"""Checkpoints: a folder with a diffusers network in safetensors and a card, packaged or written by `fastsde train`.

That of a latent model also has the autoencoder, in a folder of its own as in diffusers' pipelines.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from fastsde.checks import check_count, check_labels, check_number
from fastsde.diffusers.latents import SCALE, decode_latents, encode_images
from fastsde.diffusers.loading import CONFIG, WEIGHTS
from fastsde.files import read_json, sha256, write_json, write_whole
from fastsde.score.base import ScoreModel
from fastsde.score.network import load_weights
from fastsde.sde.vp import VPSDE
from fastsde.types import Cond, Time

ASSETS = Path(__file__).parent / "assets"
CARD, AUTOENCODER = "card.json", "vae"


def packaged() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(folder.name for folder in ASSETS.iterdir() if (folder / CARD).is_file())


def find_checkpoint(name: str | Path) -> Path:
    """The folder of a packaged name or of a path, with everything in it that a checkpoint needs.

    Raises:
        FileNotFoundError: if there is no such model, or a file of it is missing, naming the file.
        ValueError: if `name` is a single file; pickled weights are never opened.
    """
    folder = ASSETS / name if str(name) in packaged() else Path(name)
    if folder.is_file():
        pickled = "" if folder.suffix == ".safetensors" else " Pickled weights are refused: they can run code."
        raise ValueError(f"{folder} is a file; give the folder that holds {CONFIG}, {WEIGHTS} and {CARD}.{pickled}")
    if not folder.is_dir():
        raise FileNotFoundError(f"no model {str(name)!r}: neither a folder nor one of {', '.join(packaged()) or '-'}.")
    for file in (CONFIG, WEIGHTS, CARD):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} is no checkpoint: {file} is missing.")
    return folder


def read_card(name: str | Path) -> dict[str, Any]:
    """What a checkpoint says of itself: data, licence, command, metrics, and how to read its network.

    Raises:
        FileNotFoundError: as `find_checkpoint`.
        ValueError: if the card is damaged or lacks what is needed to read the network, naming the file.
    """
    path = find_checkpoint(name) / CARD
    card = read_json(path)
    if "latent_shape" in card:
        raise ValueError(
            f"{path.parent} is an autoencoder. Train a score network of its latents: fastsde train --set model=latent "
            f"--set autoencoder={path.parent}."
        )
    needed = ("timestep_levels", "classes", "event_shape", "data_range", "prediction", "sde")
    missing = [key for key in needed if key not in card]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}.")
    try:
        for side in _listed(card, "event_shape"):
            check_count("event_shape", side, 1)
        low, high = (check_number("data_range", end, -math.inf) for end in _listed(card, "data_range", 2))
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"data_range must be two numbers, the lower first; got {card['data_range']!r}.")
        check_number("timestep_levels", card["timestep_levels"], 0.0, ends="()")
        _listed(card, "classes")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return card


def _listed(card: dict[str, Any], key: str, length: int | None = None) -> list[Any]:
    value = card[key]
    if not isinstance(value, list) or len(value) != (length or len(value)):
        raise ValueError(f"{key} must be a list{'' if length is None else f' of {length}'}; got {value!r}.")
    return value


def weight_hash(name: str | Path) -> str:
    """SHA-256 of the weight file, in hexadecimal."""
    return sha256((find_checkpoint(name) / WEIGHTS).read_bytes())


def pretrained(name: str | Path, *, device: torch.device | str = "cpu") -> PackagedModel:
    """Loads a packaged model by name, or a checkpoint written by `fastsde train` by its folder.

        r = fastsde.sample(fastsde.pretrained("fashion-mnist"), n=64, rtol=0.05)

    The samples of a latent model are latents; `model.decode` makes images of them:

        model = fastsde.pretrained("runs/latent/model")
        images = model.decode(fastsde.sample(model, n=64, nfe=12).samples)

    Class-conditional models take `cond={"class_labels": ...}`, int64 with shape (n,); without it they draw from all
    classes through their "no label" class.

    Args:
        name: "fashion-mnist", or a folder with `config.json`, `diffusion_pytorch_model.safetensors` and `card.json`.
        device: where the network goes; its weights become float32.

    Returns:
        The score model; its process is `.sde`, and `model, sde = pretrained(...)` gives both.

    Raises:
        FileNotFoundError: if there is no such model or a file of it is missing.
        ValueError: if the weights are truncated, not safetensors, not finite or of another network.
        ImportError: if diffusers is not installed.
    """
    folder = find_checkpoint(name)
    card = read_card(folder)
    network = _network("UNet2DModel", folder, card.get("weights_sha256"))  # older cards have none
    vae = None
    if "autoencoder_sha256" in card:
        vae = _network("AutoencoderKL", folder / AUTOENCODER, card["autoencoder_sha256"])
        if any(vae.config.get(key) != card.get("latents", {}).get(key) for key in SCALE):
            raise ValueError(f"{folder / AUTOENCODER / CONFIG} has another scale of latents than {folder / CARD} says.")
    try:
        model = score_model(network, VPSDE(**card["sde"]), card, vae)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{folder / CARD} does not describe a network: {error}") from error
    for part in (network, vae):
        if part is not None:
            part.to(device)
    return model


def load_autoencoder(folder: str | Path, *, device: torch.device | str = "cpu") -> Any:
    """The AutoencoderKL of a folder in diffusers' layout, in evaluation mode and float32.

    Args:
        folder: with `config.json` and `diffusion_pytorch_model.safetensors`: of `fastsde train` or of diffusers.
        device: where it goes.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if they are damaged or of another network.
        ImportError: if diffusers is not installed.
    """
    return _network("AutoencoderKL", Path(folder), None).to(device)


def _network(kind: str, folder: Path, stated: str | None) -> Any:
    """A network of diffusers, by the name of its class, whose weights have the stated hash if there is one."""
    try:
        import diffusers
    except ImportError as error:
        raise ImportError("this network is diffusers': pip install 'fastsde[diffusers]'.") from error
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} is no folder of a network: {file} is missing.")
    config = read_json(folder / CONFIG)
    if config.get("_class_name", kind) != kind:
        raise ValueError(f"{folder / CONFIG} is of a network {config['_class_name']!r}, not {kind}.")
    try:
        network = getattr(diffusers, kind).from_config(config).float().eval()
    except (TypeError, ValueError, KeyError, RuntimeError, MemoryError) as error:
        raise ValueError(f"{folder / CONFIG} does not describe a network: {error}") from error
    load_weights(network, folder / WEIGHTS, folder / CONFIG, stated)
    return network


class PackagedModel(ScoreModel):
    """The network of a checkpoint, whose labels are checked before they are looked up."""

    labels: int | None = None
    """How many labels there are, "no label" included; None for networks without classes."""
    autoencoder: Any = None
    """Of a latent model, diffusers' AutoencoderKL, with the scale of the latents in its configuration; else None."""

    def decode(self, latents: Tensor, *, batch_size: int = 64) -> Tensor:
        """Images of samples, in about [-1, 1]: of a latent model by its decoder, of others as they are.

        Args:
            latents: samples with shape (n, *event).
            batch_size: latents decoded at a time.

        Returns:
            With shape (n, C, H, W), in float32 on the CPU.

        Raises:
            ValueError: if the latents have another shape or are not finite.
        """
        _check_rows("latents", latents, self.event_shape)
        if self.autoencoder is None:
            return latents.float().cpu()
        return decode_latents(self.autoencoder, latents, batch_size=batch_size)

    def encode(self, images: Tensor, *, batch_size: int = 64) -> Tensor:
        """The inverse of `decode`, up to the error of the autoencoder: data that the score network knows.

        Args:
            images: with shape (n, C, H, W): uint8, or floats in [-1, 1].
            batch_size: images encoded at a time.

        Returns:
            With shape (n, *event), in the dtype of the images or else float32.

        Raises:
            ValueError: if the images have another shape.
        """
        _check_rows("images", images, self.image_shape)
        if self.autoencoder is None:
            return images if images.is_floating_point() else images.float() / 127.5 - 1
        return encode_images(self.autoencoder, images, batch_size=batch_size)

    @property
    def image_range(self) -> tuple[float, float]:
        """(low, high) of what `decode` gives."""
        return self.data_range if self.autoencoder is None else (-1.0, 1.0)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W) of what `decode` gives."""
        event = self.event_shape or ()
        if self.autoencoder is None:
            return event
        config = self.autoencoder.config
        grow = 2 ** (len(config["block_out_channels"]) - 1)
        return (config["out_channels"], *(side * grow for side in event[1:]))

    def check_cond(self, cond: Cond) -> None:
        super().check_cond(cond)
        if self.labels is not None and "class_labels" in cond:
            check_labels(cond["class_labels"], self.labels)


def _check_rows(name: str, x: Tensor, shape: tuple[int, ...] | None) -> None:
    if tuple(x.shape[1:]) != shape:
        raise ValueError(f"{name} must have shape (n, {', '.join(map(str, shape or ()))}); got {tuple(x.shape)}.")


def score_model(network: nn.Module, sde: VPSDE, card: dict[str, Any], vae: nn.Module | None = None) -> PackagedModel:
    """The score model around a network described by a card, before or after training; `vae` decodes its samples."""
    levels, classes, size = card["timestep_levels"], card["classes"], card["event_shape"]
    model = PackagedModel(
        network,
        sde,
        card["prediction"],
        event_shape=tuple(size),
        data_range=tuple(card["data_range"]),
        timestep=functools.partial(_level, levels),
        default_cond={"class_labels": torch.tensor(len(classes))} if classes else None,
    )
    model.labels = len(classes) + 1 if classes else None
    model.autoencoder = vae
    return model


def _level(levels: int, t: Time) -> Time:
    """Level k of a discrete table belongs to t = (k + 1) / N."""
    return levels * t - 1


def save_checkpoint_folder(
    folder: Path, network: nn.Module, card: dict[str, Any], vae: nn.Module | None = None
) -> None:
    """Writes a checkpoint in half precision, each file atomically, with the weights' hash in the card.

    The card is what `read_card` will return, and must hold what `score_model` reads. It gets `weights_sha256`, and
    `autoencoder_sha256` of a latent model, whose autoencoder goes into a folder of its own.

    Raises:
        ValueError: if the weights are not finite in half precision.
    """
    if vae is not None:
        card["autoencoder_sha256"] = _write_network(folder / AUTOENCODER, vae)
    card["weights_sha256"] = _write_network(folder, network)
    write_json(folder / CARD, card)


def _write_network(folder: Path, network: nn.Module) -> str:
    """Writes configuration and weights, and returns the hash of the latter."""
    weights: dict[str, Tensor] = {k: v.detach().half().contiguous().cpu() for k, v in network.state_dict().items()}
    if not all(torch.isfinite(weight).all() for weight in weights.values()):
        raise ValueError("the weights are not finite in half precision: training diverged at too high a learning_rate.")
    content = save(weights, {"format": "pt"})
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / CONFIG, network.to_json_string().encode())  # type: ignore[operator]
    write_whole(folder / WEIGHTS, content)
    return sha256(content)
