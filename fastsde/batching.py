"""Per-row helpers: the only place that knows how a (B,) vector meets a (B, *event) tensor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsde.types import AnyState, Carry, Coef, Mask, State


def expand_like(value: Coef | Mask, x: Tensor) -> Tensor:
    """A number or flag per row, with shape (B,), as (B, 1, ..., 1) of the rank of `x`; numbers in its dtype."""
    value = value.reshape(value.shape[0], *(1,) * (x.ndim - 1))
    return value if value.dtype == torch.bool else value.to(x.dtype)


def row_norm(x: State, *, q: float = 2.0) -> Coef:
    """Scaled norm of each row: root mean square for q = 2, largest magnitude for q = infinity.

    `||x||_q / d^(1/q)` in float64, with shape (B,), and d the number of elements of ONE row, so that the norm neither
    grows with the dimension nor reads across the batch. `q` is 2 or `math.inf`.
    """
    flat = x.reshape(x.shape[0], -1)
    if q == 2.0:
        return torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64) / math.sqrt(flat.shape[1])
    return flat.abs().amax(dim=1).double()


def row_dot(a: Tensor, b: Tensor) -> Coef:
    """The inner product of each row of a with that of b, in float64, with shape (B,)."""
    return (a * b).flatten(1).sum(1, dtype=torch.float64)


def all_finite(x: AnyState) -> Mask:
    """Which rows hold only finite numbers, with shape (B,)."""
    return x.reshape(x.shape[0], -1).abs().amax(dim=1) < math.inf  # false for NaN too


def where_rows(mask: Mask, new: Carry, old: Carry) -> Carry:
    """Takes each row from `new` where `mask` is set, and from `old` elsewhere. The keys are those of `old`."""
    return {key: torch.where(expand_like(mask, new[key]), new[key], old[key]) for key in old}


def select_rows(rows: Tensor, tensors: Carry) -> Carry:
    """The given rows of every tensor, in the given order."""
    return {key: value.index_select(0, rows) for key, value in tensors.items()}
