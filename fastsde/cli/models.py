"""What `--model` may name: a packaged model, a folder written by `fastsde train`, or any diffusers model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastsde.checkpoints import CARD, PackagedModel, packaged, pretrained, read_card, weight_hash
from fastsde.diffusers import decode_latents, from_diffusers, load
from fastsde.diffusers.adapter import network_of
from fastsde.diffusers.latents import autoencoder
from fastsde.diffusers.loading import CONFIG
from fastsde.score.base import ScoreModel, innermost
from fastsde.score.network import weights_hash


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model that the command line samples from.

    Attributes:
        model: the score model.
        classes: how many labels may be asked for; 0 if there are none.
        source: for the record: where the weights are from, and their hash.
        pipe: the diffusers pipeline, if it is one.
        names: those of the classes, where the model has them.
    """

    model: ScoreModel
    classes: int
    source: dict[str, Any]
    pipe: Any = None
    names: tuple[str, ...] = ()

    @property
    def autoencoder(self) -> Any:
        """That of a latent model; None of models of pixels."""
        return getattr(self.model, "autoencoder", None) if self.pipe is None else autoencoder(self.pipe)

    def images(self, x: Tensor) -> Tensor:
        """Images in [0, 1] with shape (n, C, H, W) of finite samples."""
        low, high = self.model.data_range if self.autoencoder is None else (-1.0, 1.0)
        if isinstance(self.model, PackagedModel):
            decoded = self.model.decode(x)
        else:
            decoded = x.float().cpu() if self.autoencoder is None else decode_latents(self.autoencoder, x)
        return ((decoded - low) / (high - low)).clamp(0, 1)


def open_model(name: str, device: torch.device, dtype: torch.dtype, guidance_scale: float | None = None) -> Opened:
    """Loads what `--model` names; `guidance_scale` is for diffusers' models with classes."""
    folder = Path(name)
    ours = name in packaged() or (folder / CARD).is_file()
    looks_like_a_hub_name = name.count("/") == 1 and not folder.exists() and not name.startswith((".", "/"))
    theirs = any((folder / file).is_file() for file in ("model_index.json", CONFIG)) or folder.suffix == ".safetensors"
    if ours or not (theirs or looks_like_a_hub_name):
        if guidance_scale is not None:
            raise ValueError("--guidance-scale is for diffusers' models; this one has no guidance.")
        model = pretrained(name, device=device)
        nn.Module.to(cast(nn.Module, model.network), dtype)  # diffusers' own `to` warns of layers that this one has not
        card = read_card(name)
        ours_source: dict[str, Any] = {"weights_sha256": weight_hash(name), "dtype": str(dtype)}
        ours_source |= {key: card[key] for key in ("autoencoder_sha256",) if key in card}
        return Opened(model, len(card["classes"]), ours_source, names=tuple(map(str, card["classes"])))
    loaded, scheduler = load(name, dtype=dtype)
    pipe = loaded if hasattr(loaded, "components") else None
    if hasattr(loaded, "encode_prompt"):
        raise ValueError(
            f"{name} is prompted by text; draw from it with `fastsde sample --pipeline {name} --prompt ..`."
        )
    loaded.to(device)
    read = from_diffusers(loaded, scheduler, guidance_scale=guidance_scale)
    network = loaded if pipe is None else network_of(pipe)
    source = {"weights_sha256": weights_hash(read.network), "source": network.fastsde_source, "dtype": str(dtype)}
    return Opened(read, getattr(innermost(read), "labels", 0), source, pipe)
