r"""Masks on what a discriminator sees, so that few data do not let it settle on a few places and frequencies."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastsde.checks import check_choice, check_count, check_flags, check_number

CAP = 0.5
"""Largest probability of dropping a band: each is seen at least every other time."""
SHAPES = ("patches", "fixed patches", "square", "block", "grid")
"""What may be masked in space."""


@dataclasses.dataclass(frozen=True)
class Masking:
    r"""Shifted spatial masking and balanced spectral masking of images, real and fake alike.

    Space: each image is cut into patches by a grid with a random offset, which wraps around its edges, and patches
    become 0, the middle of the data range, one after another in random order until round(space H W) pixels are, the
    last patch in part. So every image loses the same share, and every pixel is masked with that probability: cutout
    has one or the other, but not both (section H of the paper's supplement).

    Spectrum: the frequencies are cut into concentric bands, and band b is dropped with probability

        p_b = min(CAP, c / E_b),    with c such that the mean of p_b over bands is `spectrum`,

    E_b being the mean energy of the data in it: every band below the cap loses the same energy c on average, so the few
    low bands that hold most of an image are rarely dropped. (The paper's supplement does not print its formula; this is
    the one where bands have the same expected masked energy.) The spectral mask comes first. Source: Huang et al.,
    "Masked generative adversarial networks are data-efficient generation learners", NeurIPS 2022.

    Attributes:
        space: share of the pixels of each image masked, in [0, 1).
        patch: side of a patch: below 1 its share of the image's shorter side, as published (8 pixels of 32), rounded to
            a pixel; from 1 on, whole pixels.
        spectrum: mean share of the bands dropped, in [0, 0.5].
        bands: number of bands; those without a frequency, in small images, do not count.
        shape: what is masked in space: "patches"; or for comparisons one "square" or one "block" (a rectangle of an
            aspect ratio up to 4) at a random place, of the same share of pixels, or "fixed patches" of a grid that does
            not move, or the middle of each patch of such a "grid".
        balanced: False, for comparisons: all bands have the same probability, p_b = `spectrum`.

    Raises:
        ValueError: naming the attribute out of range.
    """

    space: float = 0.25
    patch: float | int = 0.25
    spectrum: float = 0.25
    bands: int = 64
    shape: str = "patches"
    balanced: bool = True

    def __post_init__(self) -> None:
        check_number("space", self.space, 0.0, 1.0, ends="[)")
        check_number("spectrum", self.spectrum, 0.0, CAP)
        check_number("patch", self.patch, 0.0, ends="()")
        if self.patch >= 1 and self.patch != int(self.patch):
            raise ValueError(f"patch must be a share of the side below 1, or whole pixels; got {self.patch}.")
        check_count("bands", self.bands, 2)
        check_choice("shape", self.shape, SHAPES)
        check_flags(balanced=self.balanced)

    def __call__(self, x: Tensor, data: Tensor, generator: torch.Generator) -> Tensor:
        """Masked images, differentiable in x.

        Args:
            x: with shape (B, C, H, W), real or fake, around 0.
            data: real images with shape (N, C, H, W), whose energy per band is balanced.
            generator: on the CPU; determines the masks.

        Raises:
            ValueError: if x is no batch of images.
        """
        if x.ndim != 4 or data.shape[1:] != x.shape[1:]:
            raise ValueError(
                f"masks are for images with shape (B, C, H, W), and data of the same; got {tuple(x.shape)} and "
                f"{tuple(data.shape)}."
            )
        if self.space > 0 and self.side(*x.shape[-2:]) > min(x.shape[-2:]):
            raise ValueError(f"patch must be at most the image's side, {min(x.shape[-2:])}; got {self.patch}.")
        if self.spectrum > 0:
            band = band_of(x.shape[-2], x.shape[-1], self.bands).to(x.device)
            drop = torch.rand(len(x), self.bands, generator=generator).to(x.device)
            kept = drop >= self.drop_probabilities(data)
            spectrum = torch.fft.rfft2(x.float()) * kept[:, band][:, None]
            x = torch.fft.irfft2(spectrum, s=x.shape[-2:]).to(x.dtype)
        return x * self.visible(x, generator) if self.space > 0 else x

    def side(self, height: int, width: int) -> int:
        """The side of a patch in pixels."""
        return int(self.patch) if self.patch >= 1 else max(1, round(self.patch * min(height, width)))

    def drop_probabilities(self, data: Tensor) -> Tensor:
        """p_b, with shape (bands,), on the device of the data; 0 for bands without a frequency."""
        energy, there = band_energy(data, self.bands)
        if not self.balanced:
            return self.spectrum * there.to(energy)
        energy = torch.where(there, energy.clamp(min=1e-12), math.inf)
        low, high = torch.zeros_like(energy[0]), CAP * energy[there].amax()
        for _ in range(60):
            c = (low + high) / 2
            above = (c / energy).clamp(max=CAP)[there].mean() > self.spectrum
            low, high = torch.where(above, low, c), torch.where(above, c, high)
        return (high / energy).clamp(max=CAP)

    def visible(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """1 where a pixel is seen and 0 where it is masked, with shape (B, 1, H, W)."""
        n, _, height, width = x.shape
        seen = self._order(n, height, width, generator) >= round(self.space * height * width)
        if self.shape in ("fixed patches", "grid"):
            return seen[:, None].to(x)
        row = (torch.arange(height) + torch.randint(height, (n, 1), generator=generator)) % height
        column = (torch.arange(width) + torch.randint(width, (n, 1), generator=generator)) % width
        picked = seen[torch.arange(n)[:, None, None], row[:, :, None], column[:, None, :]]
        return picked[:, None].to(x)

    def _order(self, n: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """In which order pixels would be masked, each number once an image, with shape (n, H, W)."""
        i, j = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        side = self.side(height, width)
        if self.shape in ("patches", "fixed patches"):
            patch = i // side * -(-width // side) + j // side
            sizes = patch.flatten().bincount()
            order = torch.rand(n, len(sizes), generator=generator).argsort(1)
            before = torch.zeros_like(order).scatter(1, order, sizes[order].cumsum(1) - sizes[order])
            inside = i % side * (width - j // side * side).clamp(max=side) + j % side
            return before[:, patch] + inside
        if self.shape == "grid":
            middle = (side - 1) / 2
            distance = torch.maximum((i % side - middle).abs(), (j % side - middle).abs())[None]
        else:  # from a corner, around the edges
            stretch = 2 ** (2 * torch.rand(n, generator=generator) - 1) if self.shape == "block" else torch.ones(n)
            down, across = torch.minimum(i, height - i), torch.minimum(j, width - j)
            distance = torch.maximum(down * stretch[:, None, None], across / stretch[:, None, None])
        ranks = distance.flatten(1).argsort(dim=1, stable=True).argsort(1)
        return ranks.reshape(-1, height, width).expand(n, height, width)


def attention_gini(critic: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The Gini coefficient of what a critic looks at: 0 if at all pixels alike, near 1 if at a single one.

    The attention to a pixel is the norm of the critic's gradient there, over channels. Source: Huang et al., fig. 1,
    which has the coefficient of the discriminator's attention.

    Args:
        critic: from (B, C, H, W) to (B,), row by row.
        x: images with shape (B, C, H, W).

    Returns:
        With shape (B,).
    """
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(x).sum(), x)
    size = gradient.square().sum(1).sqrt().flatten(1).sort(1).values.double()
    n = size.shape[1]
    weight = 2 * torch.arange(1, n + 1, dtype=torch.float64, device=size.device) - n - 1
    return (size * weight).sum(1) / (n * size.sum(1)).clamp(min=1e-300)


def band_of(height: int, width: int, bands: int) -> Tensor:
    """The band of each frequency of `rfft2`, by its distance from 0, with shape (H, W // 2 + 1)."""
    radius = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None, :])
    return (radius / radius.max() * bands).long().clamp(max=bands - 1)


def band_energy(x: Tensor, bands: int) -> tuple[Tensor, Tensor]:
    """Mean energy in each band, with shape (bands,), and which bands have a frequency.

    The energies of all bands sum to the mean of |x|^2 summed over pixels and channels.
    """
    height, width = x.shape[-2:]
    power = torch.fft.rfft2(x.float(), norm="ortho").abs().square().sum(1).mean(0)
    # rfft2 leaves out the mirror images of all columns but the first and, for even widths, the last.
    twice = torch.full((power.shape[1],), 2.0, device=x.device)
    twice[0] = 1.0
    if width % 2 == 0:
        twice[-1] = 1.0
    band = band_of(height, width, bands).to(x.device).flatten()
    energy = torch.zeros(bands, device=x.device).index_add(0, band, (power * twice).flatten())
    return energy, torch.bincount(band, minlength=bands) > 0
