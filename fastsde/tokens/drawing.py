"""Drawing values from logits, and ranking positions, row by row."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 21
"""Float64 numbers worked on at a time: vocabularies are long."""


def draw(logits: Tensor, u: Tensor, temperature: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Values from softmax(logits / temperature), by inversion in float64, one uniform each.

    Gumbel noise in float32 has no values above 16.6 nats, so that it lowers the entropy of long vocabularies; inversion
    has no such end, and takes one number rather than K.

    Args:
        logits: with shape (N, K); -inf has no chance.
        u: uniforms in (0, 1), float64 with shape (N,).
        temperature: not negative, one for all or with shape (N,); at 0 the most likely value.

    Returns:
        Values with shape (N,), and the logarithms of their probabilities at temperature 1, in float64. Both are NaN's
        stand-ins where logits hold one: value 0 and NaN.
    """
    temperature = torch.as_tensor(temperature, dtype=torch.float64, device=logits.device).expand(len(logits))
    values, log_p = [], []
    step = max(1, _CHUNK // logits.shape[-1])
    for part, v, heat in zip(logits.split(step), u.split(step), temperature.split(step), strict=True):
        plain = torch.log_softmax(part.double(), -1)
        cold = heat == 0
        mass = torch.softmax(plain / heat.masked_fill(cold, 1.0)[:, None], -1).cumsum(-1)
        # The first with more mass than u times all of it: never one without a chance.
        value = torch.searchsorted(mass, (v * mass[:, -1])[:, None], right=True).squeeze(1)
        value = torch.where(cold, plain.argmax(-1), value.clamp(max=part.shape[-1] - 1))
        value = value.masked_fill(torch.isnan(plain).any(-1), 0)
        values.append(value)
        log_p.append(plain.gather(-1, value[:, None]).squeeze(1))
    return torch.cat(values), torch.cat(log_p)


def entropies(logits: Tensor) -> Tensor:
    """Entropy in nats of softmax(logits), in float64 with shape (N,); logits have shape (N, K)."""
    return torch.cat([torch.special.entr(torch.softmax(part.double(), -1)).sum(-1) for part in _split(logits)])


def two_largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The two largest probabilities, in float64 with shape (N,) each."""
    best = torch.cat([torch.softmax(part.double(), -1).topk(2, -1).values for part in _split(logits)])
    return best[:, 0], best[:, 1]


def _split(logits: Tensor) -> tuple[Tensor, ...]:
    return logits.split(max(1, _CHUNK // logits.shape[-1]))


def first(key: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """Which positions have one of the `count` smallest keys of their row, as flags with shape (B, L).

    Those `among` take part; ties go to the earlier position. Keys have shape (B, L), like `among`, and counts (B,).
    """
    order = key.masked_fill(~among, torch.inf).argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(key.shape[1], device=key.device).expand_as(order))
    # A key may itself be infinite, and then ranks among those that take no part.
    return (rank < count[:, None]) & among
