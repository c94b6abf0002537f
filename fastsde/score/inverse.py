r"""Linear inverse problems: score models that know y = A x_0 + noise_std n, n standard normal.

Every wrapper here changes the denoised prediction, so any solver samples from it. `Projection` replaces what is
measured; the other three add the score of the measurement,

    x_0 <- x_0 + (sigma^2 / alpha) grad log p(y | x_t),    p(y | x_t) ~ N(A x_0, M),
    grad log p(y | x_t) = J^T A^T M^{-1} (y - A x_0),      J = d x_0 / d x_t,

(M held fixed) and differ in M, the covariance of y given x_t. Only `MMPS` has the right one, on Gaussian data;
docs/measured/inverse.md measures how far off all of them are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastsde.batching import expand_like, row_dot
from fastsde.checks import check_count, check_instance, check_kind, check_number, check_positive
from fastsde.score.base import ScoreModel, Wrapper
from fastsde.score.network import watched
from fastsde.score.operators import LinearOperator, conjugate_gradients
from fastsde.types import Cond, State, Time


class _Measured(Wrapper):
    """What all share: the measurement, which travels with its sample as `cond["measurement"]`."""

    own_cond = ("measurement",)

    def __init__(self, model: ScoreModel, operator: LinearOperator, y: Tensor | None = None) -> None:
        check_instance("operator", operator, LinearOperator, "a LinearOperator such as Mask(mask)")
        check_kind("y", y, Tensor, "a tensor, the measurement of one sample")
        super().__init__(model, "sample", default_cond=None if y is None else {"measurement": y})
        self.operator = operator

    def check_cond(self, cond: Cond) -> None:
        if "measurement" not in cond:
            raise ValueError(
                f"the measurement is missing: give y at construction, or cond with 'measurement' and leading axis n; "
                f"got {sorted(cond)}."
            )
        y = cond["measurement"]
        if not y.is_floating_point():
            raise ValueError(f"the measurement must be of floating dtype, in units of the data; got {y.dtype}.")
        if self.event_shape is not None:
            self.operator.check(y, self.event_shape)
        super().check_cond(cond)

    def residual(self, x_0: State, cond: Cond | None) -> Tensor:
        """y - A x_0 for each row's own y, with shape (B, *measurement)."""
        return self.operator.residual((cond or {})["measurement"].to(x_0), x_0)


class Projection(_Measured):
    r"""Data consistency without noise: the measured part of the prediction is replaced by the measurement.

        x_0 <- x_0 + A^+ (y - A x_0)

    With a solver whose step is exact for a known x_0 (DDIM, Ancestral, all exponential ones), the measured part of x_t
    is then alpha y + sigma z with the sample's own noise z (for a start at sigma z: z less y alpha / sigma there): the
    imputation of score_sde, but along one path, where score_sde draws z anew at every step. For other solvers it is so
    up to their error. What is returned satisfies A x = y exactly.

    Biased: the rest is predicted from the noisy measured part alone. `Resampling` takes off part of that. No backward
    pass. Source: Song et al., https://arxiv.org/abs/2011.13456, app. I.2 and I.3 (inpainting, colourisation); Wang et
    al. (DDNM), https://arxiv.org/abs/2212.00490, alg. 1.

    Args:
        model: the score model.
        operator: A.
        y: the measurement of one sample, with shape measurement, for samples whose `cond` has none.

    Raises:
        TypeError: if `operator` is no LinearOperator.
        ValueError: before the first network call, if the measurement is missing or has the wrong shape.
    """

    def output(self, x_t: State, t: Time, cond: Cond | None = None) -> State:
        x_0 = self.model(x_t, t, self.inner_cond(cond)).x_0
        return x_0 + self.operator.pinv(self.residual(x_0, cond))


class _Likelihood(_Measured):
    """What the guided ones share: the gradient through the network."""

    def __init__(self, model: ScoreModel, operator: LinearOperator, noise_std: float, y: Tensor | None) -> None:
        super().__init__(model, operator, y)
        self.noise_std = check_positive("noise_std", noise_std)

    def whiten(self, residual: Tensor, t: Time, spread: Callable[[Tensor], Tensor]) -> Tensor:
        """M^{-1} (y - A x_0), with shape (B, *measurement).

        Args:
            residual: y - A x_0, with shape (B, *measurement).
            t: with shape (B,).
            spread: v -> (sigma^2 / alpha) J^T v, with v and the result of shape (B, *event).
        """
        raise NotImplementedError

    def output(self, x_t: State, t: Time, cond: Cond | None = None) -> State:
        recorded, x = torch.is_grad_enabled(), watched(x_t)
        with torch.enable_grad():
            prediction = self.model(x, t, self.inner_cond(cond))
            x_0 = prediction.x_0
        if not prediction.out.requires_grad:
            raise TypeError(f"{self.role} must be differentiable in x; its output carries no gradient.")
        gain = expand_like(prediction.sigma**2 / prediction.alpha, x_t)

        def spread(v: Tensor) -> Tensor:
            return gain * torch.autograd.grad(x_0, x, v, retain_graph=True, create_graph=recorded)[0]

        x_0_hat = x_0 if recorded else x_0.detach()
        return x_0_hat + spread(self.operator.adjoint(self.whiten(self.residual(x_0_hat, cond), t, spread)))


class DPS(_Likelihood):
    r"""Diffusion posterior sampling: y given x_t as if x_0 were known, with white noise.

        M^{-1} = scale / v,    v = max(noise_std^2, |y - A x_0|^2 / m),    m numbers in a measurement

    The derivation has v = noise_std^2, too small while A x_0 is a guess: the pull then diverges. The published
    algorithm instead subtracts zeta J^T A^T r / |r|, zeta from 0.1 to 1, after each of 1000 ancestral steps: a pull per
    step, whose total grows with their number. Here v is the variance under which r = y - A x_0 is most likely, but
    never below the noise. No step is counted, and once the residual is down to the noise, v is the one derived.

    Biased; one backward pass with each call. Wrap it in `Clipped` on trained networks of pixels, or samples may leave
    any range. Source: Chung et al., https://arxiv.org/abs/2209.14687, eq. 16, alg. 1.

    Args:
        model: the score model; its network must be differentiable.
        operator: A.
        noise_std: standard deviation of the measurement's noise, positive.
        y: the measurement of one sample, with shape measurement, for samples whose `cond` has none.
        scale: multiplies the likelihood's score, not negative.

    Raises:
        ValueError: if a number is out of range; for measurements as `Projection`.
        TypeError: if `operator` is no LinearOperator; at the first call, if the network carries no gradient.
    """

    def __init__(
        self,
        model: ScoreModel,
        operator: LinearOperator,
        noise_std: float,
        y: Tensor | None = None,
        *,
        scale: float = 1.0,
    ) -> None:
        super().__init__(model, operator, noise_std, y)
        self.scale = check_number("scale", scale, 0.0, ends="[)")

    def whiten(self, residual: Tensor, t: Time, spread: Callable[[Tensor], Tensor]) -> Tensor:
        variance = (row_dot(residual, residual) / self.operator.count(residual)).clamp(min=self.noise_std**2)
        return expand_like(self.scale / variance, residual) * residual


class PiGDM(_Likelihood):
    r"""Pseudoinverse guidance: x_0 given x_t is a ball, as large as for white Gaussian data.

        M = noise_std^2 I + r^2 A A^T,    r^2 = sigma^2 data_std^2 / (alpha^2 data_std^2 + sigma^2)

    exact for data N(m, data_std^2 I). data_std = 1 is the published r, for any data. The published sampler, DDIM, also
    weighs the pull by r^2; here it is the score, unweighted, for any solver. M^{-1} by conjugate gradients, at once for
    masks and colours.

    Biased where data are correlated; one backward pass with each call. Wrap it in `Clipped` on trained networks of
    pixels, or their samples may leave any range. Source: Song, Vahdat, Mardani and Kautz,
    "Pseudoinverse-guided diffusion models for inverse problems", ICLR 2023, sec. 3,
    https://openreview.net/forum?id=9_gsMA8MRKQ.

    Args:
        model, operator, noise_std, y: as for `DPS`.
        data_std: standard deviation of one element of the data, positive.
        iterations: most conjugate gradient steps; each applies A and A^T once.

    Raises:
        ValueError, TypeError: as `DPS`.
    """

    def __init__(
        self,
        model: ScoreModel,
        operator: LinearOperator,
        noise_std: float,
        y: Tensor | None = None,
        *,
        data_std: float = 1.0,
        iterations: int = 100,
    ) -> None:
        super().__init__(model, operator, noise_std, y)
        self.data_std, self.iterations = check_positive("data_std", data_std), check_count("iterations", iterations, 1)

    def whiten(self, residual: Tensor, t: Time, spread: Callable[[Tensor], Tensor]) -> Tensor:
        noise, data = self.sde.sigma(t) ** 2, self.data_std**2
        ball = expand_like(noise * data / (self.sde.alpha(t) ** 2 * data + noise), residual)

        def covariance(v: Tensor) -> Tensor:
            return self.noise_std**2 * v + ball * self.operator(self.operator.adjoint(v))

        return conjugate_gradients(covariance, residual, self.iterations)


class MMPS(_Likelihood):
    r"""Moment matching posterior sampling: x_0 given x_t has the covariance that the network itself says.

        M = noise_std^2 I + A V A^T,    V = (sigma^2 / alpha) J^T = Cov(x_0 | x_t) for an exact network

    M^{-1} by conjugate gradients, each of whose steps is a backward pass through the network; few of them are a
    shrunken, stable M^{-1}. Exact on Gaussian data once they converge; on other data p(y | x_t) is no Gaussian.

    A trained network's J is not quite symmetric, and the steps end where M seems to have a negative direction. Wrap it
    in `Clipped` on trained networks of pixels, or samples may leave any range.

    Up to `iterations` + 1 backward passes with each call. Source: Rozet et al., https://arxiv.org/abs/2405.13712,
    "Moment matching posterior sampling"; V is Tweedie's formula for the covariance.

    Args:
        model, operator, noise_std, y: as for `DPS`.
        iterations: most conjugate gradient steps.

    Raises:
        ValueError, TypeError: as `DPS`.
    """

    def __init__(
        self,
        model: ScoreModel,
        operator: LinearOperator,
        noise_std: float,
        y: Tensor | None = None,
        *,
        iterations: int = 3,
    ) -> None:
        super().__init__(model, operator, noise_std, y)
        self.iterations = check_count("iterations", iterations, 1)

    def whiten(self, residual: Tensor, t: Time, spread: Callable[[Tensor], Tensor]) -> Tensor:
        def covariance(v: Tensor) -> Tensor:
            return self.noise_std**2 * v + self.operator(spread(self.operator.adjoint(v)))

        return conjugate_gradients(covariance, residual, self.iterations)
