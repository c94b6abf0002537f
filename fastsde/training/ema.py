"""Exponential moving average of the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def ema_model(model: nn.Module, decay: float = 0.999) -> AveragedModel:
    """torch's `AveragedModel` with an exponential average that warms up.

    After n updates the decay is `min(decay, (1 + n) / (10 + n))`, so that the first, random weights are forgotten
    quickly (the schedule of TensorFlow's and diffusers' averages). Buffers are averaged too.

    Args:
        model: the network whose weights are averaged, left untouched.
        decay: the final decay, in [0, 1).

    Raises:
        ValueError: if `decay` is outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1); got {decay}.")

    def average(
        averaged: tuple[Tensor, ...] | list[Tensor], current: tuple[Tensor, ...] | list[Tensor], n: Tensor | int
    ) -> None:
        warm = min(decay, (1 + int(n)) / (10 + int(n)))
        for kind in (True, False):  # counters of batch normalisation are no averages: they are taken as they are
            pairs = [(a, b) for a, b in zip(averaged, current, strict=True) if a.is_floating_point() is kind]
            if pairs:
                ours, theirs = zip(*pairs, strict=True)
                (torch._foreach_lerp_(ours, theirs, 1 - warm) if kind else torch._foreach_copy_(ours, theirs))

    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)
