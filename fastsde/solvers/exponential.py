"""Our own solver: an exponential predictor-corrector with one network call a step."""

from __future__ import annotations

import dataclasses

from fastsde.solvers.adams import ExponentialAdams
from fastsde.solvers.checks import check_order


@dataclasses.dataclass(frozen=True)
class ExponentialPC(ExponentialAdams):
    r"""Exponential predictor-corrector: predict, evaluate once, correct. The linear part of the SDE is exact.

    In the terms of `ExponentialAdams`, with k = 1 - e^{-c h}:

        base      = e^{-c h} y_n + k D_n + rho_s sqrt(1 - e^{-2 eta^2 h}) z
        predicted = base + (k / 2) (h / h_prev) (D_n - D_{n-1})
        D_{n+1}   = D(predicted, s)                                 (the one call, which serves the next step too)
        corrected = base + (k / 2) (D_{n+1} - D_n)

    The state is `corrected`; the last D is the denoised sample, so N steps cost N + 1 calls: the first gives D_0. The
    predictor is that of DPM-Solver++ 2M (Lu et al., https://arxiv.org/abs/2211.01095), of its SDE form for eta = 1;
    a corrector that reuses the next step's call is UniPC's idea (Zhao et al., https://arxiv.org/abs/2302.04867).

    Args:
        steps: number of steps, uniform in log-SNR; or give `controller=Grid(...)` to `sample`.
        eta: 0 for the probability flow, 1 for the reverse-time SDE, up to 5; or a function of rho.
        order: 2, or 1 for `base` alone (for eta = 0 that is DDIM).

    Raises:
        ValueError: naming the argument that is out of range.
    """

    convergence = "2 (eta = 0), weak 1"
    use = "few calls: 10 to 30 for a whole sample"

    order: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_order("order", self.order, (1, 2))

    @property
    def values(self) -> tuple[int, int]:
        return (2, 2) if self.order == 2 else (1, 0)
