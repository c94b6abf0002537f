"""The weights of exponential Adams methods on unequal steps."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastsde.types import Coef, Index, State


def moments(a: Coef, count: int) -> Tensor:
    """m_j = integral over [0, 1] of a e^{-a (1 - u)} u^j du for j = 1 .. count, with shape (B, count); a may be < 0."""
    up = [-torch.expm1(-a)]
    for j in range(1, count + 1):
        up.append(1 - j / torch.where(a == 0, 1.0, a) * up[-1])
    # The recursion cancels for small a; there the series' terms fall below 1e-18.
    series = _series(count).to(a.device)
    below = a[:, None] ** torch.arange(1, len(series) + 1, device=a.device) @ series
    return torch.where(a.abs()[:, None] < 1, below, torch.stack(up[1:], 1))


@functools.cache
def _series(count: int, terms: int = 18) -> Tensor:
    """(-1)^k j! / (j + 1 + k)!, the coefficient of a^{k + 1} in m_j, with shape (terms, count)."""
    rows = [
        [(-1) ** k * math.factorial(j) / math.factorial(j + 1 + k) for j in range(1, count + 1)] for k in range(terms)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def adams_weights(
    a: Coef, nodes: Tensor, known: Index, rule: Callable[[Coef, Tensor], Tensor], share: Coef | None = None
) -> Tensor:
    """Weights that integrate a polynomial through the current value and those at the nodes, against a e^{-a (1 - u)}.

    Args:
        a: exponent of a step, with shape (B,); 0 gives weights of 0.
        nodes: where the other values are, 0 being now and 1 the end of the step, with shape (B, q).
        known: how many of the nodes, the first ones, have a value, with shape (B,); more than q count as q.
        rule: gives the right-hand sides for p nodes from m_0 and (m_1, .., m_p); the latter would be exact.
        share: of the weights for all q > 1 nodes, with shape (B,), the rest being those for one less; 1 if None.
            Rows with fewer values have no share.

    Returns:
        The weight of the current value and those at the nodes, with shape (B, 1 + q); 0 at unknown nodes.
    """
    m_0, q = -torch.expm1(-a), nodes.shape[1]
    weights = torch.zeros(len(a), 1 + q, dtype=torch.float64, device=a.device)
    exact = moments(a, max(q, 1))
    for p in range(1, q + 1):
        # Rows with fewer values have nodes that mean nothing; their system may be singular, and is not used.
        right, lower = rule(m_0, exact[:, :p]), weights[:, 1 : 1 + p].clone()
        if p == 1:
            solution = right / nodes[:, :1]
        else:
            powers = nodes[:, None, :p] ** torch.arange(1, p + 1, device=a.device)[:, None]
            solution = torch.linalg.solve_ex(powers, right[:, :, None]).result[:, :, 0]
        if p == q > 1 and share is not None:
            solution = torch.lerp(lower, solution, share[:, None])
        weights[:, 1 : 1 + p] = torch.where((known >= p)[:, None], solution, lower)
    weights[:, 0] = m_0 - weights[:, 1:].sum(1)
    return weights


def stage_weights(
    a: Coef,
    nodes: Tensor,
    count: Index,
    values: tuple[int, int],
    rule: Callable[[Coef, Tensor], Tensor],
    share: Coef | None,
) -> Tensor:
    """Weights of a predictor and, in the same pass, of a corrector whose first node is the end of the step.

    Args:
        a, rule, share: as for `adams_weights`.
        nodes: where the values before the current one are, with shape (B, q - 1).
        count: how many values there are, the current one included, with shape (B,).
        values: how many of them the predictor reads, and the corrector, with the new one; at most q. 0 for none.

    Returns:
        With shape (B, 1, q), or (B, 2, q) with a corrector.
    """
    (predictor, corrector), shape = values, (-1, len(a), 1 + nodes.shape[1])
    known = (count - 1).clamp(max=predictor - 1)
    if corrector:
        nodes = torch.cat([nodes, torch.cat([torch.ones_like(nodes[:, :1]), nodes[:, :-1]], 1)])
        known = torch.cat([known, count.clamp(max=corrector - 1)])
        a, share = a.repeat(2), None if share is None else share.repeat(2)
    return adams_weights(a, nodes, known, rule, share).reshape(shape).transpose(0, 1)


def columns(weights: Tensor, x: State) -> tuple[Tensor, ...]:
    """Weights with shape (B, ..), one after another, each in the dtype of `x` and broadcasting against it."""
    return weights.to(x.dtype).reshape(len(x), -1, *(1,) * (x.ndim - 1)).unbind(1)


def add_weighted(base: State, weights: Sequence[Tensor], values: Sequence[State]) -> State:
    """base + sum_i w_i v_i with shape (B, *event), for the `columns` w_i and as many values (B, *event)."""
    # Not as a matrix product, whose rounding depends on the batch and which autocast and TF32 would lower.
    for weight, value in zip(weights, values, strict=True):
        base = torch.addcmul(base, weight, value)
    return base
