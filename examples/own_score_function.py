"""Samples from a score that is a formula: a ring of eight Gaussians in the plane.

Run: python examples/own_score_function.py
"""

import math

import torch
from torch import Tensor

import fastsde

sde = fastsde.VPSDE()
angles = torch.arange(8) * (2 * math.pi / 8)
centres = 0.8 * torch.stack([angles.cos(), angles.sin()], 1)
std = 0.05


def score_fn(x: Tensor, t: Tensor) -> Tensor:
    """grad log p_t(x) of the ring: x has shape (B, 2), t has shape (B,)."""
    alpha, sigma = sde.alpha(t.double()).float()[:, None], sde.sigma(t.double()).float()[:, None]
    variance = (alpha * std) ** 2 + sigma**2
    offset = alpha[:, None] * centres - x[:, None]
    nearness = (-offset.square().sum(-1) / (2 * variance)).softmax(1)
    return (nearness[:, :, None] * offset).sum(1) / variance


result = fastsde.sample(score_fn, sde, shape=(1000, 2), rtol=0.05, batch_size=500)
distance = torch.cdist(result.samples, centres)
share = distance.argmin(1).bincount(minlength=8) / len(result.samples)
print(result)
print("share of each of the 8 centres:", [round(s, 3) for s in share.tolist()])
print(f"root mean square distance to the centre: {distance.amin(1).square().mean().sqrt():.4f}")
print(f"exact: {std * math.sqrt(2):.4f}; denoising makes it a little smaller")
print("calls per sample, quartiles:", result.nfe.double().quantile(torch.tensor([0, 0.25, 0.5, 0.75, 1.0]).double()))
