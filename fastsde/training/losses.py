"""Score matching: denoising, implicit and sliced."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

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
        x_0, noise: data and standard normals, with shape (B, *event).
        t: times, with shape (B,).
        cond: keyword arguments of the network, each with leading axis B.
        weight: lambda(t), with shape (B,); sigma(t)^2 if None. `sde.g2` gives the likelihood weighting.

    Returns:
        The loss of each row, a mean over its elements, with shape (B,).
    """
    prediction = model(model.sde.marginal(x_0, t, noise), t, cond)
    loss = (prediction.epsilon - noise).square().flatten(1).mean(1)
    return loss if weight is None else loss * (weight(t) / model.sde.sigma(t) ** 2).to(loss.dtype)


def implicit_score_loss(score: Callable[[State], State], x: State) -> Coef:
    r"""Implicit score matching with the exact trace, one value per row: from samples of p alone, without noise.

        loss = tr(d score / d x) + || score ||^2 / 2

    Its mean is E || score - grad log p ||^2 / 2 up to a constant. It costs d backward passes. Source: Hyvarinen 2005,
    https://jmlr.org/papers/v6/hyvarinen05a.html, thm. 1; thesis eq. 2.7.

    Args:
        score: from (B, *event) to (B, *event), row by row.
        x: samples of p, with shape (B, *event).

    Returns:
        With shape (B,), with gradients to the parameters of `score`.
    """
    x = x.detach().requires_grad_()
    value = score(x).flatten(1)
    columns = (torch.autograd.grad(column.sum(), x, create_graph=True)[0].flatten(1) for column in value.unbind(1))
    trace = sum((gradient[:, k] for k, gradient in enumerate(columns)), torch.zeros(len(x)).to(value))
    return trace + 0.5 * value.square().sum(1)


def sliced_score_loss(score: Callable[[State], State], x: State, directions: State) -> Coef:
    r"""Sliced score matching, one value per row: `implicit_score_loss` with one backward pass rather than d.

        loss = v^T (d score / d x) v + || score ||^2 / 2

    Its mean over v with E v v^T = I is that of the exact trace. With the second term (v^T score)^2 / 2, the paper's
    first form, the mean is the same and the variance larger. Signs for v (Rademacher's) have less variance than
    normals: the diagonal of d score / d x then adds none. Source: Song et al., https://arxiv.org/abs/1905.07088, eq. 8
    (sliced score matching with variance reduction); thesis eq. 2.8.

    Args:
        score: from (B, *event) to (B, *event), row by row.
        x: samples of p, with shape (B, *event).
        directions: v, with shape (B, *event).

    Returns:
        With shape (B,), with gradients to the parameters of `score`.
    """
    x = x.detach().requires_grad_()
    value = score(x)
    (slope,) = torch.autograd.grad((value * directions).sum(), x, create_graph=True)
    return (slope * directions).flatten(1).sum(1) + 0.5 * value.square().flatten(1).sum(1)


def noisy_score_loss(
    model: ScoreModel, x_0: State, t: Time, noise: State, cond: Cond | None = None, directions: State | None = None
) -> Coef:
    r"""Score matching of the noisy data at each time, without the score of p(x_t | x_0), one value per row.

        loss = 2 sigma^2 / d (v^T (d score / d x_t) v + || score ||^2 / 2)

    It has the minimiser and, up to a constant, the mean of `dsm_loss`, and more variance: a check, or a study.

    Args:
        model: the score model being trained.
        x_0, t, noise, cond: as for `dsm_loss`.
        directions: v, with shape (B, *event); None for the exact trace.

    Returns:
        With shape (B,).
    """

    def score(x_t: State) -> State:
        return model(x_t, t, cond).score

    x_t = model.sde.marginal(x_0, t, noise)
    # Attention has second derivatives in its plain form alone.
    with sdpa_kernel(SDPBackend.MATH):
        loss = implicit_score_loss(score, x_t) if directions is None else sliced_score_loss(score, x_t, directions)
    return loss * (2 * model.sde.sigma(t) ** 2 / x_0[0].numel()).to(loss.dtype)


def stratified_times(sde: SDE, batch: int, generator: torch.Generator) -> Tensor:
    """Uniform times on [t_min, t_max], one in each of `batch` equal cells, which lowers the variance of the loss.

    Returns:
        Float64 times with shape (batch,); each entry is uniform, the set covers the range evenly.
    """
    u = torch.rand((), generator=generator, dtype=torch.float64)
    cells = (torch.arange(batch, dtype=torch.float64) / batch + u) % 1.0
    return sde.t_min + (sde.t_max - sde.t_min) * cells
