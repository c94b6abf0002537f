"""Adams-Bashforth in exponential form, on the predicted noise."""

from __future__ import annotations

import dataclasses

from fastsde.solvers.adams import ExponentialAdams


@dataclasses.dataclass(frozen=True)
class DEIS(ExponentialAdams):
    r"""Exponential Adams-Bashforth of the probability flow: a polynomial in the log-SNR through the last noises.

        y_s = y_t - integral e^{-lam} eps(lam) dlam,    eps a polynomial of degree order - 1

    exactly integrated. The first steps have fewer values: from a cold start the error of the first, h^2, remains, and
    orders above 2 need a grid whose first steps are shorter. Source: Zhang and Chen,
    https://arxiv.org/abs/2204.13902, eqs. 14-15 (there in t; in the log-SNR, as diffusers has it).

    Args:
        steps: number of steps, uniform in log-SNR; or give `controller=Grid(...)` to `sample`.
        order: 1 (DDIM) to 4.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    convergence = "order, from a cold start at most 2"
    noise = "none"
    midpoint = False
    interpolates_noise = True
    orders = (1, 2, 3, 4)
    use = "peer: Adams-Bashforth in exponential form"

    eta: float = dataclasses.field(default=0.0, init=False)
    order: int = 3

    @property
    def values(self) -> tuple[int, int]:
        return self.order, 0
