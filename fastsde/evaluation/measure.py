"""All figures of one set of features, against a reference."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from fastsde.evaluation.divergence import fit_critic
from fastsde.evaluation.reference import Reference
from fastsde.evaluation.statistics import frechet, inception_score, kernel_distance, manifold

_LEAST = 100
"""Rows of each set below which no critic is fitted."""


def measure(x: Tensor, logits: Tensor | None, reference: Reference, *, draws: int = 50) -> dict[str, Any]:
    """Every statistic that the reference allows.

    Args:
        x: features of the samples, with shape (n, d).
        logits: of the same network, with shape (n, classes), for the Inception score; or None.
        reference: what to compare with.
        draws: bootstrap replicates for the error of the Frechet distance.

    Returns:
        Of the following those that can be told, and None for an error that cannot:
        `fid`, `fid_error` (a standard error) and `fid_infinite` (extrapolated to n to infinity); with the features of
        the reference `kid` and `kid_error`, `divergence` and `divergence_error` (symmetric least squares, by a critic
        fitted to halves; from 0 to 2), and `precision`, `recall`, `density` and `coverage`, for which both sets are cut
        to the smaller one's size; with logits `inception_score` and its spread over splits.

    Raises:
        ValueError: if dimensions differ, there are too few samples, or a feature is not finite.
    """
    if x.shape[1:] != reference.mean.shape:
        raise ValueError(f"the reference has {len(reference.mean)} features, the samples have {x.shape[1]}.")
    distance = frechet(x, reference.mean, reference.covariance, draws=draws)
    found: dict[str, Any] = {"fid": distance.value, "fid_error": distance.error, "fid_infinite": distance.extrapolated}
    if reference.feats is not None:
        found["kid"], found["kid_error"] = kernel_distance(x, reference.feats)
        if min(len(x), len(reference.feats)) >= _LEAST:
            apart = fit_critic(reference.feats, x, width=64, steps=300)
            found["divergence"], found["divergence_error"] = apart.value, apart.standard_error
        found |= dataclasses.asdict(manifold(*_of_one_size(x, reference.feats)))
    if logits is not None:
        found["inception_score"], found["inception_score_spread"] = inception_score(logits)
    # JSON has no NaN: an error that cannot be told is null.
    return {key: None if math.isnan(value) else value for key, value in found.items()}


def _of_one_size(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets, the larger one cut at random: rows may come in the order of their classes."""
    m, generator = min(len(x), len(y)), torch.Generator().manual_seed(0)
    first, second = (s if len(s) == m else s[torch.randperm(len(s), generator=generator)[:m]] for s in (x, y))
    return first, second
