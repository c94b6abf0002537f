"""SA-Solver: stochastic Adams."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from fastsde.checks import check_order
from fastsde.solvers.adams import ExponentialAdams
from fastsde.types import Coef


@dataclasses.dataclass(frozen=True)
class SASolver(ExponentialAdams):
    r"""Stochastic Adams, with noise where you want it: exact moments, a predictor and a corrector of any order.

    In the terms of `ExponentialAdams`; eta, the paper's tau, may depend on the noise level, constant over a step. The
    paper adds noise at middle levels only, for example `eta=lambda rho: (rho > 0.05) * (rho < 1.0) * 1.0`. Source: Xue
    et al., https://arxiv.org/abs/2309.05019, eqs. 14-17 and sec. 5.

    Args:
        steps: number of steps, uniform in log-SNR; or give `controller=Grid(...)` to `sample`.
        eta: 1 for the reverse-time SDE, up to 5; or an elementwise function of rho.
        predictor: values read by the predictor, 1 to 4.
        corrector: values read by the corrector, the new one included, 2 to 4, or 0 for none.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    convergence = "predictor or corrector, from a cold start at most 2 or 3 (eta = 0), weak 1"
    midpoint = False
    use = "peer: stochastic Adams with eta(rho)"

    eta: float | Callable[[Coef], Coef] = 1.0
    predictor: int = 3
    corrector: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_order("predictor", self.predictor, (1, 2, 3, 4))
        check_order("corrector", self.corrector, (0, 2, 3, 4))

    @property
    def values(self) -> tuple[int, int]:
        return self.predictor, self.corrector
