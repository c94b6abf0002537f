"""An enumerated law of a few tokens, whose conditionals are exact: for tests, and to see what a sampler does."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from fastsde.tokens.model import TokenModel
from fastsde.tokens.process import MASK
from fastsde.types import Tokens


class ExactTokens(TokenModel):
    """p(x_l | known tokens) of a joint law, by enumeration.

    Args:
        joint: probabilities with shape (K, .., K), an axis for each of L positions; they are normalised.

    Raises:
        ValueError: if it is no such table of non-negative, finite numbers, or has more than 10^6 entries.
    """

    def __init__(self, joint: Tensor) -> None:
        good = isinstance(joint, Tensor) and joint.ndim > 0 and len(set(joint.shape)) == 1 and joint.shape[0] > 1
        if not good or joint.numel() > 1_000_000:
            came = tuple(joint.shape) if isinstance(joint, Tensor) else type(joint).__name__
            raise ValueError(f"joint must be a table with shape (K, .., K) of up to a million entries; got {came}.")
        joint = joint.double()
        if not torch.isfinite(joint).all() or (joint < 0).any() or joint.sum() <= 0:
            raise ValueError("joint must hold probabilities: finite, none negative, not all 0.")
        symbols, length = joint.shape[0], joint.ndim
        super().__init__(self._logits, symbols, event_shape=(length,))
        self.joint = joint / joint.sum()
        self.sequences = torch.tensor(list(itertools.product(range(symbols), repeat=length)))
        """Every sequence, in the order of `joint.flatten()`, with shape (K^L, L)."""
        self._onehot = torch.nn.functional.one_hot(self.sequences, symbols).flatten(1).double()

    def _logits(self, ids: Tokens) -> Tensor:
        agrees = ((ids[:, None] == self.sequences) | (ids[:, None] == self.mask_id)).all(2)
        mass = (agrees * self.joint.flatten()) @ self._onehot
        p = mass.reshape(len(ids), *self.event_shape, self.vocabulary)  # type: ignore[misc]
        # Where the known tokens have no chance together, nothing is conditional on them: the uniform law.
        return torch.where(p.sum(-1, keepdim=True) > 0, p, 1.0).log()

    def law(self, samples: Tokens) -> Tensor:
        """How often each sequence occurs, with the shape of `joint`; sequences that hold a mask are left out."""
        whole = samples[(samples != MASK).all(1)]
        powers = self.vocabulary ** torch.arange(self.joint.ndim - 1, -1, -1)
        counts = torch.bincount((whole * powers).sum(1), minlength=self.joint.numel())
        return counts.reshape(self.joint.shape).double() / max(1, len(whole))

    @property
    def entropy(self) -> float:
        """Of the law, in nats."""
        return float(torch.special.entr(self.joint).sum())

    @property
    def total_correlation(self) -> float:
        """Sum of the entropies of the positions minus that of the law, in nats: what one turn for all would lose."""
        marginals = (self.joint.movedim(axis, 0).reshape(self.vocabulary, -1).sum(1) for axis in range(self.joint.ndim))
        return sum(float(torch.special.entr(marginal).sum()) for marginal in marginals) - self.entropy

    def __repr__(self) -> str:
        return f"ExactTokens({self.vocabulary} symbols at {math.prod(self.event_shape or ())} positions)"
