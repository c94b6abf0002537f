r"""Exact score models: data whose score is known at every noise level, for tests, docs and benchmarks.

If x_0 has covariance C around a mean m, then x_t = alpha x_0 + sigma eps has covariance alpha^2 C + sigma^2 I around
alpha m; for a mixture, the score is the responsibility-weighted sum of the components' scores.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsde.batching import expand_like
from fastsde.score.base import ScoreModel
from fastsde.sde.base import SDE


class _Exact(ScoreModel):
    """A score model whose network is its own formula, in the dtype of the state."""

    def __init__(self, sde: SDE, event_shape: tuple[int, ...], data_range: tuple[float, float]) -> None:
        super().__init__(self.exact_score, sde, "score", event_shape=event_shape, data_range=data_range)

    def exact_score(self, x: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x), with x and the result of shape (B, *event) and t of shape (B,)."""
        raise NotImplementedError

    def log_density(self, x: Tensor, t: Tensor) -> Tensor:
        """log p_t(x) in nats, with x of shape (B, *event), t and the result of shape (B,)."""
        raise NotImplementedError

    def _scales(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma^2, broadcast against x."""
        t = t.double()
        return expand_like(self.sde.alpha(t), x), expand_like(self.sde.sigma(t) ** 2, x)


class GaussianScore(_Exact):
    r"""Independent Gaussian elements: score = -(x - alpha m) / (alpha^2 std^2 + sigma^2).

    Args:
        sde: the forward process.
        mean: mean m, with shape event.
        std: standard deviation of each element, with shape event; any spectrum is a rotation of this one.
        data_range: (low, high) of the data, for the default tolerance.

    Raises:
        ValueError: if the shapes differ or a standard deviation is negative.
    """

    def __init__(self, sde: SDE, mean: Tensor, std: Tensor, *, data_range: tuple[float, float] = (-1.0, 1.0)) -> None:
        if mean.shape != std.shape or (std < 0).any():
            raise ValueError(f"mean and std must agree and std >= 0; got {tuple(mean.shape)} and {tuple(std.shape)}.")
        super().__init__(sde, tuple(mean.shape), data_range)
        self.mean, self.std = mean, std

    def exact_score(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, variance = self._scales(x, t)
        mean, std = self.mean.to(x), self.std.to(x)
        return (alpha * mean - x) / (alpha**2 * std**2 + variance)

    def log_density(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, variance = self._scales(x, t)
        total = alpha**2 * self.std.to(x) ** 2 + variance
        terms = (x - alpha * self.mean.to(x)).square() / total + (2 * math.pi * total).log()
        return -0.5 * terms.flatten(1).sum(1)


class MixtureScore(_Exact):
    r"""A mixture of Gaussians with full or low-rank covariances, for data with event shape (d,).

        C_k = U_k diag(v_k) U_k^T + floor I,    score = sum_k r_k(x) (alpha^2 C_k + sigma^2 I)^{-1} (alpha m_k - x)

    with r_k the posterior probability of component k. The columns of U_k are orthonormal, so the inverse costs O(d r).

    Args:
        sde: the forward process.
        weights: probabilities of the K components, with shape (K,).
        means: with shape (K, d).
        bases: orthonormal columns U_k, with shape (K, d, r); r = d for full covariances, 0 for multiples of I.
        variances: v_k, with shape (K, r), not negative.
        floor: variance of every direction besides, not negative.
        data_range: (low, high) of the data, for the default tolerance.

    Raises:
        ValueError: if shapes disagree, the weights are no distribution or the columns are not orthonormal.
    """

    def __init__(
        self,
        sde: SDE,
        weights: Tensor,
        means: Tensor,
        bases: Tensor,
        variances: Tensor,
        *,
        floor: float = 0.0,
        data_range: tuple[float, float] = (-1.0, 1.0),
    ) -> None:
        k, d = means.shape
        r = bases.shape[-1]
        if weights.shape != (k,) or bases.shape != (k, d, r) or variances.shape != (k, r):
            raise ValueError(
                f"shapes must be (K,), (K, d), (K, d, r), (K, r); got "
                f"{', '.join(str(tuple(a.shape)) for a in (weights, means, bases, variances))}."
            )
        if (weights < 0).any() or abs(float(weights.sum()) - 1) > 1e-6 or (variances < 0).any() or floor < 0:
            raise ValueError("weights must be a distribution; variances and floor must not be negative.")
        gram = bases.double().mT @ bases.double()
        if not torch.allclose(gram, torch.eye(r, dtype=torch.float64).expand(k, r, r), atol=1e-4):
            raise ValueError("the columns of each basis must be orthonormal.")
        super().__init__(sde, (d,), data_range)
        self.weights, self.means, self.bases, self.variances, self.floor = weights, means, bases, variances, floor

    @classmethod
    def from_covariances(
        cls, sde: SDE, weights: Tensor, means: Tensor, covariances: Tensor, **options: tuple[float, float]
    ) -> MixtureScore:
        """A mixture with full covariances, with shape (K, d, d)."""
        variances, bases = torch.linalg.eigh(covariances)
        return cls(sde, weights, means, bases, variances.clamp(min=0), **options)  # type: ignore[arg-type]

    def exact_score(self, x: Tensor, t: Tensor) -> Tensor:
        logits, scores = self._components(x, t)
        return torch.einsum("bk,bkd->bd", logits.softmax(1), scores)

    def log_density(self, x: Tensor, t: Tensor) -> Tensor:
        return self._components(x, t)[0].logsumexp(1) - 0.5 * x.shape[1] * math.log(2 * math.pi)

    def _components(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """log of weight and density of each component, but for a constant, with shape (B, K); scores (B, K, d)."""
        alpha, variance = self._scales(x, t)
        isotropic = alpha**2 * self.floor + variance
        d, scores, logits = x.shape[1], [], []
        parts = (self.weights, self.means, self.bases, self.variances)
        for weight, mean, basis, spread in zip(*(p.to(x) for p in parts), strict=True):
            offset = alpha * mean - x
            along = offset @ basis
            shrink = alpha**2 * spread / ((alpha**2 * spread + isotropic) * isotropic)
            inverse = offset / isotropic - (shrink * along) @ basis.mT
            log_det = torch.log1p(alpha**2 * spread / isotropic).sum(1) + d * isotropic[:, 0].log()
            logits.append(weight.log() - 0.5 * ((offset * inverse).sum(1) + log_det))
            scores.append(inverse)
        return torch.stack(logits, 1), torch.stack(scores, 1)

    def draw(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Exact samples of the data, with shape (n, d), in the dtype of the means."""
        which = torch.multinomial(self.weights.double(), n, replacement=True, generator=generator)
        dtype, (_, d, r) = self.means.dtype, self.bases.shape
        along = torch.randn(n, r, dtype=dtype, generator=generator) * self.variances[which].sqrt()
        noise = torch.randn(n, d, dtype=dtype, generator=generator) * math.sqrt(self.floor)
        return self.means[which] + noise + torch.einsum("ndr,nr->nd", self.bases[which], along)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Exact mean with shape (d,) and covariance with shape (d, d) of the data, in float64."""
        weights, means, bases = self.weights.double(), self.means.double(), self.bases.double()
        mean = weights @ means
        centred = means - mean
        within = torch.einsum("k,kdr,kr,ker->de", weights, bases, self.variances.double(), bases)
        between = torch.einsum("k,kd,ke->de", weights, centred, centred)
        return mean, within + between + self.floor * torch.eye(len(mean), dtype=torch.float64)


class DatasetScore(_Exact):
    r"""The optimal denoiser of a finite data set: the score of its empirical distribution, blurred by the process.

        score = (alpha sum_i w_i(x) x_i - x) / sigma^2,    w = softmax(-|x - alpha x_i|^2 / (2 sigma^2))

    What a network with unlimited capacity would learn (Karras et al., https://arxiv.org/abs/2206.00364, app. B.3).

    Args:
        sde: the forward process.
        points: the data, with shape (N, *event).
        data_range: (low, high) of the data; that of the points by default.

    Raises:
        ValueError: if there is no point.
    """

    def __init__(self, sde: SDE, points: Tensor, *, data_range: tuple[float, float] | None = None) -> None:
        if points.ndim < 1 or len(points) == 0:
            raise ValueError(f"points must be (N, *event) with N >= 1; got {tuple(points.shape)}.")
        super().__init__(sde, tuple(points.shape[1:]), data_range or (float(points.min()), float(points.max())))
        self.points = points

    def exact_score(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, variance = self._scales(x.flatten(1), t)
        points = self.points.to(x).flatten(1)
        # |x - alpha p|^2 without the term in x alone, which the softmax does not see.
        logits = (x.flatten(1) @ points.mT * alpha - 0.5 * alpha**2 * points.square().sum(1)) / variance
        mean = logits.softmax(1) @ points
        return ((alpha * mean - x.flatten(1)) / variance).reshape(x.shape)

    def log_density(self, x: Tensor, t: Tensor) -> Tensor:
        flat, points = x.flatten(1), self.points.to(x).flatten(1)
        alpha, variance = (scale[:, 0] for scale in self._scales(flat, t))
        square = (flat[:, None] - alpha[:, None, None] * points).square().sum(2)
        kernels = (-0.5 * square / variance[:, None]).logsumexp(1) - math.log(len(points))
        return kernels - 0.5 * flat.shape[1] * (2 * math.pi * variance).log()
