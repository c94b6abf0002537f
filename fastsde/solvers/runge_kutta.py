"""One step of a Runge-Kutta method along the noise level."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastsde.batching import expand_like
from fastsde.sde.base import SDE
from fastsde.solvers.tableaus import Tableau
from fastsde.types import Coef, State, Time

_LONGEST_STEP = 2.0
"""A step that is longer in log rho has its error estimate scaled up, as if it were that much less accurate."""


def noise_level(sde: SDE, t: Time) -> Coef:
    """rho = sigma / alpha, the noise level of y = x / alpha, with shape (B,)."""
    return (-0.5 * sde.log_snr(t)).exp()


def runge_kutta_step(
    tableau: Tableau,
    slope: Callable[[State, Time], State],
    sde: SDE,
    y: State,
    t: Time,
    s: Time,
    first: State | None = None,
    *,
    logarithmic: bool = False,
) -> tuple[State, State | None, State]:
    r"""One step of dy / drho = slope(y, t), where rho = sigma / alpha is the noise level at t.

        k_i = slope(y + H sum_j a_ij k_j, t(rho_t + c_i H)),    y_s = y + H sum_i b_i k_i,    H = rho_s - rho_t

    Args:
        tableau: the method.
        slope: of shape (B, *event), at a state (B, *event) and a time (B,).
        sde: the process that ties times to noise levels.
        y: the state, with shape (B, *event).
        t, s: now and the target, with shape (B,); s is below or above t.
        first: slope(y, t), if it is known.
        logarithmic: step in log rho instead, of dy / dlog rho = rho slope(y, t).

    Returns:
        y_s, the estimate of its error (None if the tableau has none) and the last slope, each with shape (B, *event).
    """
    ends = (-0.5 * sde.log_snr(t), -0.5 * sde.log_snr(s))
    u_t, u_s = ends if logarithmic else (ends[0].exp(), ends[1].exp())
    step = expand_like(u_s - u_t, y)
    slopes: list[State] = []
    for row, node in zip(((), *tableau.a), tableau.c, strict=True):
        u = torch.lerp(u_t, u_s, node)
        # The ends are taken as they are: an inverse of the clock would move them by a rounding.
        at = t if node == 0 else s if node == 1 else sde.t_of_log_snr(-2 * (u if logarithmic else u.log()))
        k = first if first is not None and not slopes else slope(y + step * _combine(row, slopes) if row else y, at)
        first = None
        slopes.append(k * expand_like(u.exp(), y) if logarithmic else k)
    error = None if tableau.error is None else step * _combine(tableau.error, slopes)
    if error is not None:
        # Over many e-folds an estimate means nothing: it is blind to what happens at the smaller levels.
        folds = (ends[1] - ends[0]).abs() / _LONGEST_STEP
        error = error * expand_like(folds.clamp(min=1) ** tableau.error_order, error)
    return y + step * _combine(tableau.b, slopes), error, k


def _combine(weights: tuple[float, ...], slopes: list[State]) -> State:
    terms = [weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight]
    return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]
