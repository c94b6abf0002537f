"""Explicit Runge-Kutta tableaus, and one step of them along the noise level."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from fastsde.batching import expand_like
from fastsde.sde.base import SDE
from fastsde.types import Coef, State, Time


@dataclasses.dataclass(frozen=True)
class Tableau:
    """The coefficients of an explicit Runge-Kutta method.

    Attributes:
        name: what it is called.
        order: of the solution it gives.
        a: rows of the matrix; stage i + 1 starts from stages 1 .. i.
        b: weights of the solution.
        c: nodes, one for each stage.
        error: weights of the error estimate, or None.
        error_order: order of the error estimate of one step.
    """

    name: str
    order: int
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    error: tuple[float, ...] | None = None
    error_order: int = 0

    @property
    def first_same_as_last(self) -> bool:
        """Whether the last stage is the slope at the new state, which the next step then starts from."""
        return self.c[-1] == 1 and self.a[-1] == self.b[:-1] and self.b[-1] == 0

    def __repr__(self) -> str:
        return self.name


EULER = Tableau("EULER", 1, (), (1.0,), (0.0,))
HEUN = Tableau("HEUN", 2, ((1.0,),), (0.5, 0.5), (0.0, 1.0), (-0.5, 0.5), 2)
"""Heun's method, with Euler's as error estimate."""
# Kutta 1901.
RK4 = Tableau("RK4", 4, ((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), (0.0, 0.5, 0.5, 1.0))
DORMAND_PRINCE = Tableau(
    "DORMAND_PRINCE",
    5,
    (
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
    (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
    5,
)
"""Dormand and Prince 1980, https://doi.org/10.1016/0771-050X(80)90013-3, table 2: order 5 with 4 embedded."""


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
        t: now, with shape (B,).
        s: target, with shape (B,), below or above t.
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
    return y + step * _combine(tableau.b, slopes), error, k


def _combine(weights: tuple[float, ...], slopes: list[State]) -> State:
    terms = [weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight]
    return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]
