"""Shape-typed aliases shared by every module.

The annotations are checked at run time only under pytest (jaxtyping + beartype, see `tests/conftest.py`),
so they cost nothing in use. `B` is the batch of independent rows, `*E` the event: any rank, images or not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from jaxtyping import Bool, Float, Float64, Int64, Num
from torch import Tensor

State: TypeAlias = Float[Tensor, "B *E"]
"""A batch of states with shape (B, *event), in the user's floating dtype."""

Latent: TypeAlias = Float[Tensor, "B *L"]
"""A batch of latents with shape (B, *latent), where states beside them have another shape."""

Tokens: TypeAlias = Int64[Tensor, "B *E"]
"""A batch of tokens with shape (B, *event); -1 is the mask."""

AnyState: TypeAlias = Num[Tensor, "B *E"]
"""States or tokens, for what only moves them."""

Time: TypeAlias = Float64[Tensor, "B"]
"""One float64 time per row, with shape (B,)."""

Coef: TypeAlias = Float[Tensor, "B"]
"""One real coefficient per row, with shape (B,)."""

Index: TypeAlias = Int64[Tensor, "B"]
"""One 64-bit integer per row, with shape (B,): sample numbers, counts, grid positions."""

Mask: TypeAlias = Bool[Tensor, "B"]
"""One flag per row, with shape (B,)."""

Carry: TypeAlias = dict[str, Tensor]
"""Solver or controller memory: named tensors, each with leading axis B."""

Cond: TypeAlias = Mapping[str, Tensor]
"""Conditioning: named tensors, each with leading axis B (labels, embeddings)."""

ScoreFn: TypeAlias = Callable[..., Tensor]
"""`score_fn(x, t) -> score`: x with shape (B, *event), t with shape (B,), the result with shape (B, *event)."""
