"""Checkpoints: a folder with a diffusers network in safetensors and a card, packaged or written by `fastsde train`."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fastsde.checks import check_count, check_labels, check_number
from fastsde.files import read_json, sha256, write_json, write_whole
from fastsde.score.base import ScoreModel
from fastsde.score.network import check_weights
from fastsde.sde.vp import VPSDE
from fastsde.types import Cond, Time

ASSETS = Path(__file__).parent / "assets"
WEIGHTS, CONFIG, CARD = "diffusion_pytorch_model.safetensors", "config.json", "card.json"


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


def pretrained(name: str | Path, *, device: torch.device | str = "cpu") -> ScoreModel:
    """Loads a packaged model by name, or a checkpoint written by `fastsde train` by its folder.

        r = fastsde.sample(fastsde.pretrained("fashion-mnist"), n=64, rtol=0.05)

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
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise ImportError("this network is diffusers': pip install 'fastsde[diffusers]'.") from error
    card = read_card(folder)
    config = read_json(folder / CONFIG)
    try:
        network = UNet2DModel.from_config(config)
        sde = VPSDE(**card["sde"])
        model = score_model(network.float().eval(), sde, card)
    except (TypeError, ValueError, KeyError, RuntimeError, MemoryError) as error:
        raise ValueError(f"{folder / CONFIG} or {folder / CARD} does not describe a network: {error}") from error
    stated = card.get("weights_sha256")  # older cards have none
    if stated is not None and stated != weight_hash(folder):
        raise ValueError(f"{folder / WEIGHTS} is not the file that {folder / CARD} describes.")
    try:
        network.load_state_dict({key: value.float() for key, value in load_file(folder / WEIGHTS).items()})
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is truncated or not a safetensors file: {error}") from error
    except RuntimeError as error:
        raise ValueError(f"{folder / WEIGHTS} does not fit {folder / CONFIG}: {error}") from error
    check_weights(network)
    network.to(device)
    return model


class PackagedModel(ScoreModel):
    """The network of a checkpoint, whose labels are checked before they are looked up."""

    labels: int | None = None
    """How many labels there are, "no label" included; None for networks without classes."""

    def check_cond(self, cond: Cond) -> None:
        super().check_cond(cond)
        if self.labels is not None and "class_labels" in cond:
            check_labels(cond["class_labels"], self.labels)


def score_model(network: nn.Module, sde: VPSDE, card: dict[str, Any]) -> ScoreModel:
    """The score model around a network described by a card, before or after training."""
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
    return model


def _level(levels: int, t: Time) -> Time:
    """Level k of a discrete table belongs to t = (k + 1) / N."""
    return levels * t - 1


def save_checkpoint_folder(folder: Path, network: nn.Module, card: dict[str, Any]) -> None:
    """Writes a checkpoint in half precision, each file atomically, with the weights' hash in the card.

    Args:
        folder: created if needed.
        network: a diffusers network.
        card: what `read_card` will return; must hold what `score_model` reads. It gets `weights_sha256`.

    Raises:
        ValueError: if the weights are not finite in half precision.
    """
    weights: dict[str, Tensor] = {k: v.detach().half().contiguous().cpu() for k, v in network.state_dict().items()}
    if not all(torch.isfinite(weight).all() for weight in weights.values()):
        raise ValueError(
            "the weights are not finite in half precision: training diverged, with too high a learning_rate."
        )
    content = save(weights, {"format": "pt"})
    card["weights_sha256"] = sha256(content)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / CONFIG, network.to_json_string().encode())  # type: ignore[operator]
    write_json(folder / CARD, card)
    write_whole(folder / WEIGHTS, content)
