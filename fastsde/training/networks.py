"""Small networks: diffusers' UNet2DModel and AutoencoderKL, a perceptron for points, a residual discriminator."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, leaky_relu
from torch.nn.utils.parametrizations import spectral_norm

from fastsde.batching import expand_like
from fastsde.checks import check_count, check_number
from fastsde.sde.base import SDE

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DModel


def small_unet(
    image_size: int, channels: int, num_classes: int | None = None, *, widths: tuple[int, ...] = (32, 64, 112)
) -> UNet2DModel:
    """A UNet for small images, of 2.2 million parameters by default: attention on the coarsest resolution.

    With a single width there is attention in the middle block alone.

    Args:
        image_size: height and width in pixels, divisible by 2 for each resolution but the first.
        channels: image channels.
        num_classes: labels 0 .. num_classes - 1, and one more for "no label"; None for an unconditional network.
        widths: channels at each resolution, multiples of 8; a single one keeps the size, as latents of 7 x 7 need.

    Raises:
        ValueError: if the widths are not multiples of 8, or there are too many of them for `image_size`.
    """
    from diffusers import UNet2DModel

    _check_widths(image_size, widths)
    halvings = len(widths) - 1
    return UNet2DModel(
        sample_size=image_size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=tuple(widths),
        norm_num_groups=8,
        attention_head_dim=widths[-1] // 4,
        down_block_types=(*["DownBlock2D"] * halvings, "AttnDownBlock2D" if halvings else "DownBlock2D"),
        up_block_types=("AttnUpBlock2D" if halvings else "UpBlock2D", *["UpBlock2D"] * halvings),
        num_class_embeds=None if num_classes is None else num_classes + 1,
    )


def small_autoencoder(
    image_size: int, channels: int, *, widths: tuple[int, ...] = (16, 32, 64), latent_channels: int = 4
) -> AutoencoderKL:
    """A small autoencoder of diffusers with group norm: latents of 4 x 7 x 7 for images of 28 x 28.

    Args:
        image_size, channels: as for `small_unet`.
        widths: channels at each resolution, divisible by 8.
        latent_channels: channels of the latents.

    Raises:
        ValueError: if the widths are not multiples of 8, or there are too many of them for `image_size`.
    """
    from diffusers import AutoencoderKL

    _check_widths(image_size, widths)
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        sample_size=image_size,
        latent_channels=check_count("latent_channels", latent_channels, 1),
        layers_per_block=1,
        block_out_channels=tuple(widths),
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        scaling_factor=1.0,
        force_upcast=False,
    )


def _check_widths(image_size: int, widths: tuple[int, ...]) -> None:
    if not widths or any(width < 8 or width % 8 for width in widths):
        raise ValueError(f"widths must be multiples of 8, one for each resolution; got {list(widths)}.")
    halvings = len(widths) - 1
    if image_size < 1 << halvings or image_size % (1 << halvings):
        raise ValueError(
            f"image_size must be divisible by {1 << halvings}, for the {halvings} halvings of {len(widths)} widths; "
            f"got {image_size}."
        )


class FlatAutoencoder(nn.Module):
    """A small autoencoder whose latents are vectors: two halvings, group norm, linear layers around the latents.

    Args:
        image_size: height and width in pixels, divisible by 4.
        channels: image channels.
        latent: numbers of a latent.
        width: channels at half the size, a multiple of 8; twice as many at a quarter.

    Raises:
        ValueError: naming the argument out of range.
    """

    def __init__(self, image_size: int, channels: int, latent: int = 32, width: int = 16) -> None:
        super().__init__()
        _check_widths(image_size, (width,) * 3)
        side, last = image_size // 4, 2 * width
        self.encoder = nn.Sequential(
            *_normed(nn.Conv2d(channels, width, 4, 2, 1)),
            *_normed(nn.Conv2d(width, last, 4, 2, 1)),
            nn.Flatten(),
            nn.Linear(last * side**2, 2 * check_count("latent", latent, 1)),
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent, last * side**2),
            nn.Unflatten(1, (last, side, side)),
            *_normed(nn.Conv2d(last, 4 * width, 3, padding=1)),
            nn.PixelShuffle(2),
            *_normed(nn.Conv2d(width, 2 * width, 3, padding=1)),
            nn.PixelShuffle(2),
            nn.Conv2d(width // 2, channels, 3, padding=1),
        )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, each with shape (B, latent), of images with shape (B, C, H, W)."""
        mean, logvar = self.encoder(x).chunk(2, 1)
        return mean, logvar

    def decode(self, z: Tensor) -> Tensor:
        """Images with shape (B, C, H, W) of latents with shape (B, latent)."""
        return self.decoder(z)


def _normed(convolution: nn.Conv2d) -> tuple[nn.Module, ...]:
    return convolution, nn.GroupNorm(8, convolution.out_channels), nn.SiLU()


class MLP(nn.Module):
    """A perceptron for points in few dimensions, with SiLU: x and t go in as they are and as sines and cosines.

    Args:
        dim: dimensions of a point.
        width, depth: of the hidden layers, and how many they are.
        frequencies: of t in [0, 1], in octaves from 1/2.
        octaves: of each coordinate of x, from 1/4; 0 for none. Fine structure is slow to learn without.

    Raises:
        ValueError: naming the argument out of range.
    """

    def __init__(self, dim: int, width: int = 128, depth: int = 3, frequencies: int = 6, octaves: int = 0) -> None:
        super().__init__()
        for name, count in (("dim", dim), ("width", width), ("depth", depth)):
            check_count(name, count, 1)
        for name, count in (("frequencies", frequencies), ("octaves", octaves)):
            check_number(name, check_count(name, count, 0), 0.0, 20.0)
        self.frequencies, self.octaves = frequencies, octaves
        sizes = [dim * (1 + 2 * octaves) + 2 * frequencies, *[width] * depth]
        layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(width, dim))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """From x with shape (B, dim) and t with shape (B,) to (B, dim)."""
        parts = [x]
        for value, octaves, lowest in ((t[:, None].to(x.dtype), self.frequencies, 0.5), (x, self.octaves, 0.25)):
            scale = 2 * math.pi * lowest * 2.0 ** torch.arange(octaves, device=x.device, dtype=x.dtype)
            angles = (value[:, :, None] * scale).flatten(1)
            parts += [angles.sin(), angles.cos()]
        return self.layers(torch.cat(parts, 1))


class Unconditional(nn.Module):
    r"""A network that is not told the level of noise: s(x, sigma) = s(x) / sigma (thesis, after eq. 8.2).

    On any process in y = x / alpha at the level sigma / alpha: score = s(x / alpha) / sigma. Give it to `ScoreModel` as
    a prediction of "epsilon", which is -s.

    Args:
        network: s, from (B, *event) to (B, *event).
        sde: the process.
    """

    def __init__(self, network: nn.Module, sde: SDE) -> None:
        super().__init__()
        self.network, self.sde = network, sde

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """-s(x / alpha(t)), with shape (B, *event)."""
        return -self.network(x / expand_like(self.sde.alpha(t.double()), x).to(x.dtype))


class Discriminator(nn.Module):
    """Residual blocks with spectral norm, each but the last halving the size; a mean over pixels; one linear layer.

    Args:
        channels: of the images.
        width: channels of the first block; they double with each halving.
        halvings: blocks that halve, at least one; images must be at least 2^halvings pixels wide and high.

    Raises:
        ValueError: naming the argument out of range.
    """

    def __init__(self, channels: int, width: int = 32, halvings: int = 3) -> None:
        super().__init__()
        for name, count in (("channels", channels), ("halvings", halvings), ("width", width)):
            check_number(name, check_count(name, count, 1), 1.0, 8.0 if name == "halvings" else 1024.0)
        sizes = [channels, *(width * 2 ** min(k, halvings - 1) for k in range(halvings + 1))]
        pairs = itertools.pairwise(sizes)
        self.blocks = nn.Sequential(*(_Residual(a, b, halve=k < halvings) for k, (a, b) in enumerate(pairs)))
        self.head = spectral_norm(nn.Linear(sizes[-1], 1))

    def forward(self, x: Tensor) -> Tensor:
        """From images with shape (B, C, H, W) to one number each, with shape (B,)."""
        return self.head(leaky_relu(self.blocks(x), 0.2).mean((2, 3))).squeeze(1)


class _Residual(nn.Module):
    def __init__(self, inside: int, out: int, *, halve: bool) -> None:
        super().__init__()
        self.first = spectral_norm(nn.Conv2d(inside, out, 3, padding=1))
        self.second = spectral_norm(nn.Conv2d(out, out, 3, padding=1))
        self.skip = spectral_norm(nn.Conv2d(inside, out, 1))
        self.halve = halve

    def forward(self, x: Tensor) -> Tensor:
        out = self.skip(x) + self.second(leaky_relu(self.first(leaky_relu(x, 0.2)), 0.2))
        return avg_pool2d(out, 2) if self.halve else out
