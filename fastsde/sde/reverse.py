"""The two backward dynamics that share the forward process's marginals."""

from __future__ import annotations

from fastsde.batching import expand_like
from fastsde.sde.base import SDE
from fastsde.types import State, Time


def reverse_drift(sde: SDE, x: State, t: Time, score: State) -> State:
    r"""Drift of the reverse-time SDE, dx = [f x - g^2 score] dt + g dw, for dt < 0.

    Source: Anderson 1982, https://doi.org/10.1016/0304-4149(82)90051-5; thesis eq. 10.2.

    Args:
        sde: the forward process.
        x: with shape (B, *event).
        t: with shape (B,).
        score: grad log p_t(x), with shape (B, *event).

    Returns:
        f(t) x - g(t)^2 score, with shape (B, *event).
    """
    return sde.drift(x, t) - expand_like(sde.g2(t), x) * score


def probability_flow_drift(sde: SDE, x: State, t: Time, score: State) -> State:
    r"""Drift of the probability-flow ODE, dx = [f x - g^2 score / 2] dt, for dt < 0.

    Source: Song et al., https://arxiv.org/abs/2011.13456, eq. 13 of sec. 4.3. Arguments as for `reverse_drift`.

    Returns:
        f(t) x - g(t)^2 score / 2, with shape (B, *event).
    """
    return sde.drift(x, t) - expand_like(sde.g2(t) / 2, x) * score
