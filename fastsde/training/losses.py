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


def sliced_score_loss(score: Callable[[State], State], x: State, directions: State) -> Coef:
    r"""Sliced score matching, one value per row: needs no noise and no denoising, so it checks those that do.

        loss = v^T (d score / d x) v + (v^T score)^2 / 2

    Its mean is E |score - grad log p|^2 / 2 up to a constant, for v with E v v^T = I. Source: Song et al.,
    https://arxiv.org/abs/1905.07088, eq. 8 (its first form).

    Args:
        score: from (B, *event) to (B, *event), row by row.
        x: samples of p, with shape (B, *event).
        directions: v, with shape (B, *event).

    Returns:
        With shape (B,), with gradients to the parameters of `score`.
    """
    x = x.detach().requires_grad_()
    value = score(x)
    along = (value * directions).flatten(1).sum(1)
    (slope,) = torch.autograd.grad(along.sum(), x, create_graph=True)
    return (slope * directions).flatten(1).sum(1) + 0.5 * along.square()


def stratified_times(sde: SDE, batch: int, generator: torch.Generator) -> Tensor:
    """Uniform times on [t_min, t_max], one in each of `batch` equal cells, which lowers the variance of the loss.

    Returns:
        Float64 times with shape (batch,); each entry is uniform, the set covers the range evenly.
    """
    u = torch.rand((), generator=generator, dtype=torch.float64)
    cells = (torch.arange(batch, dtype=torch.float64) / batch + u) % 1.0
    return sde.t_min + (sde.t_max - sde.t_min) * cells
