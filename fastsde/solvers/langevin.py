"""Langevin dynamics at one level of noise, as a corrector."""

from __future__ import annotations

import dataclasses

import torch

from fastsde.batching import expand_like, row_norm
from fastsde.checks import check_flags, check_number
from fastsde.score.base import BoundModel
from fastsde.sde.base import SDE
from fastsde.types import Coef, State, Time

_LEAST_SCORE = 1e-12
"""Root mean square of a score below which there is no Langevin step."""


@dataclasses.dataclass(frozen=True)
class Langevin:
    r"""One step of Langevin dynamics, whose size makes noise and score relate as `snr` says.

        x <- x + eps score(x, t) + sqrt(2 eps) z,    eps = 2 (snr |z| / |score|)^2 (1 - beta)    (per sample)
        eps = 2 (snr sigma_t)^2 (1 - beta)                                                       (`annealed`)

    with 1 - beta = (alpha_t / alpha_s)^2 of the predictor's step, 1 on VE. The norms are those of each sample, so that
    samples stay independent; the released code averages both norms over the batch, which `batch_mean` replicates: the
    result then depends on the batch. Source: Song et al., https://arxiv.org/abs/2011.13456, app. G, algorithms 4, 5.

    Args:
        snr: r of the paper, positive: 0.16 for VE and 0.01 for VP were its best on CIFAR-10.
        annealed: take the size from sigma_t rather than from the score (annealed Langevin dynamics).
        batch_mean: use the mean norms of the batch.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    snr: float = 0.16
    annealed: bool = False
    batch_mean: bool = False

    def __post_init__(self) -> None:
        check_number("snr", self.snr, 0.0, ends="()")
        check_flags(annealed=self.annealed, batch_mean=self.batch_mean)

    def correct(self, model: BoundModel, sde: SDE, x: State, t: Time, shrink: Coef, z: State) -> State:
        """One step.

        Args:
            model: the bound score model.
            sde: the forward process.
            x: with shape (B, *event).
            t: the level, with shape (B,).
            shrink: 1 - beta, with shape (B,).
            z: standard normal noise, with shape (B, *event).
        """
        score = model(x, t).score
        if self.annealed:
            ratio = sde.sigma(t)
        else:
            above, below = row_norm(z), row_norm(score)
            if self.batch_mean:
                above, below = above.mean().expand_as(above), below.mean().expand_as(below)
            # A score of zero asks for an infinite step, or says nothing about it: none is taken.
            ratio = torch.where(below > _LEAST_SCORE, above / below, 0.0)
        size = 2 * (self.snr * ratio) ** 2 * shrink
        return x + expand_like(size, x) * score + expand_like((2 * size).sqrt(), x) * z
