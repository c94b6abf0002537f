"""Latents: into and out of a pipeline's autoencoder, in batches, with its scaling and shift."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsde.batching import expand_like
from fastsde.checks import check_finite
from fastsde.diffusers.networks import config_of, offloaded_to

SCALE = ("latents_mean", "latents_std")
"""Where a configuration has the scale of each channel."""


def autoencoder(pipe: Any) -> Any:
    """The autoencoder of a pipeline, or None if it works on pixels."""
    vae = getattr(pipe, "vae", None)
    return getattr(pipe, "vqvae", None) if vae is None else vae


def _scales(vae: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviation and mean of raw latents, so that z = (raw - mean) / std has unit scale; broadcast to z."""
    config = config_of(vae)
    std, mean = torch.ones(1, dtype=z.dtype, device=z.device), torch.zeros(1, dtype=z.dtype, device=z.device)
    if config.get("latents_std") is not None:
        std, mean = z.new_tensor(config["latents_std"]), z.new_tensor(config["latents_mean"])
    std = std / float(config.get("scaling_factor") or 1.0)
    mean = mean + float(config.get("shift_factor") or 0.0)
    return expand_like(std, z[0]), expand_like(mean, z[0])


def check_latents(vae: Any, latents: Tensor) -> None:
    """Refuses, with a ValueError, what is no finite batch of latents of an autoencoder."""
    config = config_of(vae)
    channels = config.get("vq_embed_dim") or config.get("latent_channels")
    if latents.ndim < 3 or not latents.is_floating_point() or (channels is not None and latents.shape[1] != channels):
        wanted = "channels" if channels is None else channels
        raise ValueError(
            f"latents must be floating point with shape (n, {wanted}, h, w); got {tuple(latents.shape)} of "
            f"{latents.dtype}."
        )
    check_finite(latents, "latents")


def measure_scale(vae: Any, images: Tensor, *, batch_size: int = 250) -> Tensor:
    """Measures the scale of latents, writes it into the autoencoder's configuration, and returns them in that scale.

    The mean is of each channel, the standard deviation for all that of the channel that varies most. So a channel that
    the autoencoder does not use stays small, and does not make the others large.

    Args:
        vae: a diffusers autoencoder; its `latents_mean` and `latents_std` are set, and what scaled before is dropped.
        images: as for `encode_images`, or uint8.
        batch_size: images encoded at a time.

    Returns:
        As `encode_images`: over the images each channel has mean 0, and variance 1 or less.

    Raises:
        ValueError: if the latents are constant or not finite.
    """
    vae.register_to_config(latents_mean=None, latents_std=None, scaling_factor=1.0, shift_factor=None)
    raw = encode_images(vae, images, batch_size=batch_size)
    check_latents(vae, raw)
    axes = (0, *range(2, raw.ndim))
    mean, std = raw.double().mean(axes), raw.double().std(axes, correction=0).amax()
    if not std > 0:
        raise ValueError(f"the autoencoder gives all {len(raw)} images the same latents.")
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=[float(std)] * len(mean))
    return (raw - expand_like(mean, raw[0]).to(raw)) / float(std)


def encode_images(vae: Any, images: Tensor, *, batch_size: int = 8) -> Tensor:
    """The latents that a model samples: z = (mode of the encoder - mean) / std.

    Args:
        vae: a diffusers autoencoder; its `scaling_factor`, `shift_factor`, `latents_mean` and `latents_std` are used.
        images: in [-1, 1], with shape (n, C, H, W); or uint8, which is brought there.
        batch_size: images encoded at a time.

    Returns:
        With shape (n, C, H / f, W / f), in the dtype of the images; in float32 for uint8.
    """
    kind = images.dtype if images.is_floating_point() else torch.float32
    parts, place = [], offloaded_to(vae) or vae.device
    with torch.no_grad():
        for part in images.split(batch_size):
            shown = part if part.is_floating_point() else part.float() / 127.5 - 1
            encoded = vae.encode(shown.to(place, vae.dtype))
            raw = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
            std, mean = _scales(vae, raw)
            parts.append(((raw - mean) / std).to(images.device, kind))
    return torch.cat(parts)


def decode_latents(vae: Any, latents: Tensor, *, batch_size: int = 8) -> Tensor:
    """The images of latents: decoder(std z + mean).

    Args:
        vae: as for `encode_images`.
        latents: z, with shape (n, C, h, w).
        batch_size: latents decoded at a time.

    Returns:
        In about [-1, 1], in float32 on the CPU, with shape (n, C, H, W). Where the latents require a gradient, it goes
        through.

    Raises:
        ValueError: if latents are not finite or have other channels than the autoencoder's.
    """
    check_latents(vae, latents)
    parts, place = [], offloaded_to(vae) or vae.device
    # Some half-precision autoencoders overflow, and say so; pipelines then decode in single precision.
    upcast = vae.dtype == torch.float16 and bool(config_of(vae).get("force_upcast"))
    dtype = torch.float32 if upcast else vae.dtype
    if upcast:
        vae.to(torch.float32)
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled() and latents.requires_grad):
            for z in latents.split(batch_size):
                std, mean = _scales(vae, z)
                parts.append(vae.decode((std * z + mean).to(place, dtype)).sample.float().cpu())
    finally:
        if upcast:
            vae.to(torch.float16)
    return torch.cat(parts)
