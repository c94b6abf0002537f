"""UniPC: a unified predictor-corrector."""

from __future__ import annotations

import dataclasses

from fastsde.solvers.adams import ExponentialAdams


@dataclasses.dataclass(frozen=True)
class UniPC(ExponentialAdams):
    r"""UniPC-p with B_2(h) = e^h - 1, predicting data: predictor through p values, corrector through p + 1.

    In the terms of `ExponentialAdams`; a polynomial of degree 1 gets the weight B_2 / 2 = k / 2 in both. The corrector
    raises the order by one and costs no call, since the next step uses the same prediction. Source: Zhao et al.,
    https://arxiv.org/abs/2302.04867, algorithms 1 and 2.

    Args:
        steps: number of steps, uniform in log-SNR; or give `controller=Grid(...)` to `sample`.
        eta: 0 for the ODE, as published; up to 5; or an elementwise function of rho.
        order: p, from 1 to 3.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    convergence = "order + 1, from a cold start at most 3 (eta = 0), weak 1"
    orders = (1, 2, 3)
    use = "peer: UniPC-2 and -3"

    order: int = 2

    @property
    def values(self) -> tuple[int, int]:
        return self.order, self.order + 1
