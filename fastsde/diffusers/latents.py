"""Latents: into and out of a pipeline's autoencoder, in batches, with its scaling and shift."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsde.batching import expand_like
from fastsde.diffusers.networks import config_of, offloaded_to


def autoencoder(pipe: Any) -> Any:
    """The autoencoder of a pipeline, or None if it works on pixels."""
    vae = getattr(pipe, "vae", None)
    return getattr(pipe, "vqvae", None) if vae is None else vae


def pixels_per_latent(pipe: Any) -> int:
    """How many pixels one element of a pipeline's state spans in each direction: 1 if it works on pixels."""
    config = config_of(autoencoder(pipe))
    blocks = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    return 2 ** (len(blocks) - 1) if blocks else 1


def _scales(vae: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviation and mean of raw latents, so that z = (raw - mean) / std has unit scale; broadcast to z."""
    config = config_of(vae)
    std, mean = torch.ones(1, dtype=z.dtype, device=z.device), torch.zeros(1, dtype=z.dtype, device=z.device)
    if config.get("latents_std") is not None:
        std, mean = z.new_tensor(config["latents_std"]), z.new_tensor(config["latents_mean"])
    std = std / float(config.get("scaling_factor") or 1.0)
    mean = mean + float(config.get("shift_factor") or 0.0)
    return expand_like(std, z[0]), expand_like(mean, z[0])


def encode_images(vae: Any, images: Tensor, *, batch_size: int = 8) -> Tensor:
    """The latents that a model samples: z = (mode of the encoder - mean) / std.

    Args:
        vae: a diffusers autoencoder; its `scaling_factor`, `shift_factor`, `latents_mean` and `latents_std` are used.
        images: in [-1, 1], with shape (n, 3, H, W).
        batch_size: images encoded at a time.

    Returns:
        With shape (n, C, H / f, W / f), in the dtype of the images.
    """
    parts, place = [], offloaded_to(vae) or vae.device
    with torch.no_grad():
        for part in images.split(batch_size):
            encoded = vae.encode(part.to(place, vae.dtype))
            raw = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
            std, mean = _scales(vae, raw)
            parts.append(((raw - mean) / std).to(images.device, images.dtype))
    return torch.cat(parts)


def decode_latents(vae: Any, latents: Tensor, *, batch_size: int = 8) -> Tensor:
    """The images of latents: decoder(std z + mean).

    Args:
        vae: as for `encode_images`.
        latents: z, with shape (n, C, h, w).
        batch_size: latents decoded at a time.

    Returns:
        In about [-1, 1], in float32 on the CPU, with shape (n, 3, H, W).
    """
    parts, place = [], offloaded_to(vae) or vae.device
    # Some half-precision autoencoders overflow, and say so; pipelines then decode in single precision.
    upcast = vae.dtype == torch.float16 and bool(config_of(vae).get("force_upcast"))
    dtype = torch.float32 if upcast else vae.dtype
    if upcast:
        vae.to(torch.float32)
    try:
        with torch.no_grad():
            for z in latents.split(batch_size):
                std, mean = _scales(vae, z)
                parts.append(vae.decode((std * z + mean).to(place, dtype)).sample.float().cpu())
    finally:
        if upcast:
            vae.to(torch.float16)
    return torch.cat(parts)
