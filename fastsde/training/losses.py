"""Denoising score matching."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastsde.score.base import ScoreModel
from fastsde.sde.base import SDE
from fastsde.types import Coef, Cond, State, Time


def dsm_loss(
    model: ScoreModel,
    x_0: State,
    t: Time,
    noise: State,
    cond: Cond | None = None,
    *,
    weight: Callable[[Time], Coef] | None = None,
) -> Coef:
    r"""Continuous-time denoising score matching, one value per row.

        loss = lambda(t) / d || score(x_t, t) - grad log p(x_t | x_0) ||^2,    grad log p(x_t | x_0) = -eps / sigma

    With the default `lambda = sigma^2` this is the squared error of the predicted noise, the weighting that keeps every
    noise level at the same size (thesis eq. 10.3; Song et al., https://arxiv.org/abs/2011.13456, eq. 7).

    Args:
        model: the score model being trained.
        x_0: data, with shape (B, *event).
        t: times, with shape (B,).
        noise: standard normal, with shape (B, *event).
        cond: keyword arguments of the network, each with leading axis B.
        weight: lambda(t), with shape (B,); sigma(t)^2 if None. `sde.g2` gives the likelihood weighting.

    Returns:
        The loss of each row, a mean over its elements, with shape (B,).
    """
    prediction = model(model.sde.marginal(x_0, t, noise), t, cond)
    loss = (prediction.epsilon - noise).square().flatten(1).mean(1)
    return loss if weight is None else loss * (weight(t) / model.sde.sigma(t) ** 2).to(loss.dtype)


def stratified_times(sde: SDE, batch: int, generator: torch.Generator) -> Tensor:
    """Uniform times on [t_min, t_max], one in each of `batch` equal cells, which lowers the variance of the loss.

    Returns:
        Float64 times with shape (batch,); each entry is uniform, the set covers the range evenly.
    """
    u = torch.rand((), generator=generator, dtype=torch.float64)
    cells = (torch.arange(batch, dtype=torch.float64) / batch + u) % 1.0
    return sde.t_min + (sde.t_max - sde.t_min) * cells
