"""Distances between sets of features: Frechet distance and its bias and error, kernel distance, Inception score."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from fastsde.checks import check_finite


class Moments:
    """Mean and covariance of rows that arrive in parts, in float64.

    Parts are merged by their means and centred scatters (Chan, Golub and LeVeque, 1983), so that nothing cancels where
    the mean is large beside the spread, as it does in sums of squares.

    Attributes:
        n: rows so far.
        mean: with shape (d,).
        scatter: sum of (x - mean)(x - mean)^T, with shape (d, d).
    """

    def __init__(self, d: int) -> None:
        self.n = 0
        self.mean = torch.zeros(d, dtype=torch.float64)
        self.scatter = torch.zeros(d, d, dtype=torch.float64)

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """The moments of all rows of x, with shape (n, d)."""
        moments = cls(x.shape[1])
        for part in x.split(4096):
            moments.update(part)
        return moments

    def update(self, x: Tensor) -> None:
        """Adds the rows of x, with shape (n, d)."""
        x = x.detach().to("cpu", torch.float64)
        mean = x.mean(0)
        centred = x - mean
        shift, total = mean - self.mean, self.n + len(x)
        self.scatter += centred.T @ centred + torch.outer(shift, shift) * (self.n * len(x) / total)
        self.mean = self.mean + shift * (len(x) / total)
        self.n = total

    @property
    def covariance(self) -> Tensor:
        """scatter / (n - 1), with shape (d, d)."""
        return self.scatter / (self.n - 1)


def frechet_distance(mean_1: Tensor, covariance_1: Tensor, mean_2: Tensor, covariance_2: Tensor) -> float:
    r"""The squared Frechet (2-Wasserstein) distance between two Gaussians.

        |m_1 - m_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1^(1/2) S_2 S_1^(1/2))^(1/2)

    The last trace is the sum of the roots of the eigenvalues of a symmetric matrix: no general matrix root, which would
    bring complex numbers and depends on versions of SciPy. Source: Dowson and Landau (1982); Heusel et al.,
    https://arxiv.org/abs/1706.08500, for features of images: FID.

    Args:
        mean_1, mean_2: with shape (d,).
        covariance_1, covariance_2: symmetric and positive semi-definite, with shape (d, d).

    Raises:
        ValueError: if the dimensions differ or something is not finite.
    """
    d = len(mean_1)
    parts = [part.detach().to("cpu", torch.float64) for part in (mean_1, covariance_1, mean_2, covariance_2)]
    if [part.shape for part in parts] != [(d,), (d, d)] * 2:
        raise ValueError(f"means and covariances must agree in dimension; got {[tuple(p.shape) for p in parts]}.")
    if not all(bool(torch.isfinite(part).all()) for part in parts):
        raise ValueError("means and covariances must be finite.")
    return _frechet(parts[0], parts[1], parts[2], parts[3], _root(parts[3]))


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.mT


def _frechet(mean_1: Tensor, covariance_1: Tensor, mean_2: Tensor, covariance_2: Tensor, root_2: Tensor) -> float:
    cross = torch.linalg.eigvalsh(root_2 @ covariance_1 @ root_2).clamp(min=0).sqrt().sum()
    shift = (mean_1 - mean_2).square().sum()
    return float(shift + covariance_1.trace() + covariance_2.trace() - 2 * cross)


@dataclasses.dataclass(frozen=True)
class Frechet:
    """A Frechet distance and what is known of its error.

    Attributes:
        value: the distance, which finite samples make too large, by about c / n.
        error: its standard error by the bootstrap over samples; the reference is taken as it is.
        extrapolated: the distance with the part that falls as 1 / n taken off: an estimate for n to infinity.
    """

    value: float
    error: float
    extrapolated: float


def fewest(d: int) -> int:
    """The least number of samples for a Frechet distance of d features: each half has more rows than features."""
    return 2 * d + 2


def frechet(x: Tensor, mean: Tensor, covariance: Tensor, *, draws: int = 50, splits: int = 8, seed: int = 0) -> Frechet:
    r"""The Frechet distance of features to a reference, its standard error, and its extrapolation to n to infinity.

    With D_n the distance of all rows and D_(n/2) the mean distance of halves, over `splits` random divisions of the
    rows in two, the extrapolation is 2 D_n - D_(n/2): the value at 1 / n = 0 of the line through both. Source of the
    idea: Chong and Forsyth, https://arxiv.org/abs/1911.07023, who fit a line to random subsets. The bootstrap's
    replicates are themselves too large by the same bias, so only their spread is used; where the distance is near 0
    that is up to 1.5 times too large.

    Args:
        x: features, with shape (n, d).
        mean, covariance: of the reference, with shapes (d,) and (d, d).
        draws: bootstrap replicates; 0 for none, and an error of NaN.
        splits: random divisions.
        seed: of replicates and divisions.

    Raises:
        ValueError: if a feature is not finite, or there are fewer than `fewest(d)` rows: the covariance of a half would
            be singular, and the distance say more about n than about x.
    """
    n, d = x.shape
    check_features(x, "x")
    if n < fewest(d):
        raise ValueError(f"{n} samples are too few for {d} features: at least {fewest(d)} are needed.")
    x, mean, covariance = (part.detach().to("cpu", torch.float64) for part in (x, mean, covariance))
    root = _root(covariance)
    generator = torch.Generator().manual_seed(seed)

    def distance(weights: Tensor) -> float:
        """Of rows taken that many times each."""
        total = weights.sum()
        own = weights @ x / total
        centred = (x - own) * (weights / (total - 1)).sqrt()[:, None]
        return _frechet(own, centred.T @ centred, mean, covariance, root)

    value = distance(torch.ones(n, dtype=torch.float64))
    halves = []
    for _ in range(splits):
        first = torch.zeros(n, dtype=torch.float64)
        first[torch.randperm(n, generator=generator)[: n // 2]] = 1
        halves += [distance(first), distance(1 - first)]
    replicates = []
    for _ in range(draws):
        chosen = torch.randint(n, (n,), generator=generator)
        replicates.append(distance(torch.bincount(chosen, minlength=n).double()))
    error = float(torch.tensor(replicates, dtype=torch.float64).std()) if draws > 1 else float("nan")
    return Frechet(value, error, 2 * value - float(torch.tensor(halves, dtype=torch.float64).mean()))


def check_features(x: Tensor, name: str) -> None:
    """Refuses, with a ValueError, what is no matrix of finite numbers."""
    if x.ndim != 2 or not len(x):
        raise ValueError(f"{name} must have shape (n, d), n >= 1; got {tuple(x.shape)}.")
    check_finite(x, f"rows of {name}")


def kernel_distance(x: Tensor, y: Tensor, *, block: int = 1000, seed: int = 0) -> tuple[float, float]:
    r"""The kernel distance (KID) between two sets of features, and its standard error.

    The unbiased estimate of the squared maximum mean discrepancy under k(a, b) = (a . b / d + 1)^3, in disjoint blocks
    of both sets: their mean is unbiased, and as they are independent, their spread gives an error. (torchmetrics and
    torch-fidelity draw overlapping subsets, whose spread is no standard error of the mean.) Source: Binkowski et al.,
    https://arxiv.org/abs/1801.01401, sec. 4.

    Args:
        x, y: features, with shape (n, d) and (m, d).
        block: rows in a block, or all if there are fewer.
        seed: of the order of the rows.

    Returns:
        The estimate, which may be negative, and its standard error; NaN with a single block.

    Raises:
        ValueError: if dimensions differ, there are fewer than two rows, or a feature is not finite.
    """
    _check_pair(x, y)
    generator = torch.Generator().manual_seed(seed)
    block = min(block, len(x), len(y))
    count = min(len(x), len(y)) // block
    x, y = (part[torch.randperm(len(part), generator=generator)].double() for part in (x, y))
    values = []
    for k in range(count):
        a, b = (part[k * block : (k + 1) * block] for part in (x, y))
        same = [((s @ s.T / s.shape[1] + 1) ** 3) for s in (a, b)]
        within = sum((s.sum() - s.trace()) / (block * (block - 1)) for s in same)
        values.append(within - 2 * ((a @ b.T / a.shape[1] + 1) ** 3).mean())
    every = torch.stack([torch.as_tensor(value) for value in values])
    return float(every.mean()), float(every.std() / count**0.5) if count > 1 else float("nan")


def _check_pair(x: Tensor, y: Tensor) -> None:
    check_features(x, "x")
    check_features(y, "y")
    if x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"two sets of at least 2 rows and equal width are needed; got {x.shape} and {y.shape}.")


def inception_score(logits: Tensor, *, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    r"""exp E KL(p(y | x) || p(y)): how sure a classifier is of each image, and how evenly over classes.

    Rows are shuffled first, by a seed of their own: samples whose classes come in order or in turn would otherwise make
    splits of few classes. Mean and standard deviation over splits, as usual. Between 1 and the number of classes.
    Source: Salimans et al., https://arxiv.org/abs/1606.03498, sec. 4.

    Args:
        logits: with shape (n, classes).
        splits: parts.
        seed: of the order.

    Raises:
        ValueError: if there are fewer rows than splits or a logit is not finite.
    """
    check_features(logits, "logits")
    if len(logits) < splits:
        raise ValueError(f"{splits} splits need as many samples at least; got {len(logits)}.")
    log_p = logits.double().log_softmax(1)[torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))]
    scores = []
    for k in range(splits):
        part = log_p[k::splits]
        marginal = part.logsumexp(0) - math.log(len(part))
        scores.append((part.exp() * (part - marginal)).sum(1).mean().exp())
    every = torch.stack(scores)
    return float(every.mean()), float(every.std()) if splits > 1 else float("nan")


NEIGHBOUR = 5
"""The k of precision, recall, density and coverage."""


@dataclasses.dataclass(frozen=True)
class Manifold:
    """How two sets of features cover each other, by balls around each point up to its k-th neighbour.

    Attributes:
        precision: share of samples inside a ball of the reference.
        recall: share of the reference inside a ball of the samples.
        density: balls of the reference that a sample is in, over k: about 1 for equal laws, not bounded by 1.
        coverage: share of the reference whose own ball holds a sample.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def manifold(x: Tensor, reference: Tensor, *, k: int = NEIGHBOUR) -> Manifold:
    r"""Precision, recall, density and coverage.

    Sources: Kynkaanniemi et al., https://arxiv.org/abs/1904.06991, eq. 1 and 2 (with k = 3 there); Naeem et al.,
    https://arxiv.org/abs/2002.09797, eq. 4 and 5.

    Args:
        x, reference: features of samples and of data, with shape (n, d) and (m, d).
        k: the neighbour that gives a ball its radius; the point itself is not one.

    Raises:
        ValueError: if a set has no k-th neighbour, dimensions differ, or a feature is not finite.
    """
    _check_pair(x, reference)
    if min(len(x), len(reference)) <= k:
        raise ValueError(f"a {k}-th neighbour needs more than {k} rows; got {len(x)} and {len(reference)}.")
    x, reference = x.double(), reference.double()
    radius_x, radius_r = _radius(x, k), _radius(reference, k)
    inside, nearest = [], []
    found = torch.zeros(len(reference), dtype=torch.bool)
    for part, radius in zip(x.split(1000), radius_x.split(1000), strict=True):
        distance = torch.cdist(part, reference)
        inside.append((distance <= radius_r).sum(1))
        found |= (distance <= radius[:, None]).any(0)
        nearest.append(distance.amin(0))
    balls = torch.cat(inside).double()
    covered = torch.stack(nearest).amin(0) <= radius_r
    return Manifold(
        precision=float((balls > 0).double().mean()),
        recall=float(found.double().mean()),
        density=float(balls.mean() / k),
        coverage=float(covered.double().mean()),
    )


def _radius(x: Tensor, k: int) -> Tensor:
    """Distance of each row to its k-th neighbour among the others, with shape (n,)."""
    # The row itself is at distance 0, the smallest of all.
    return torch.cat([torch.cdist(part, x).kthvalue(k + 1, dim=1).values for part in x.split(1000)])


def sliced_wasserstein(x: Tensor, y: Tensor, *, projections: int = 256, seed: int = 0) -> float:
    r"""The root mean square, over random directions, of the 2-Wasserstein distance of projections: sliced W2.

    In one dimension the distance is that of the quantile functions. Source: Bonneel et al. (2015),
    https://doi.org/10.1007/s10851-014-0506-3. Samples of one law have a distance too, of order n^(-1/2).

    Args:
        x, y: with shape (n, d) and (m, d).
        projections: directions.
        seed: of the directions.

    Raises:
        ValueError: if dimensions differ, there are fewer than two rows, or a value is not finite.
    """
    _check_pair(x, y)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(x.shape[1], projections, generator=generator, dtype=torch.float64)
    directions /= directions.norm(dim=0)
    n, m = len(x), len(y)
    # Both quantile functions are constant between multiples of 1/n and of 1/m.
    steps = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
    width = torch.diff(steps, prepend=torch.zeros(1, dtype=steps.dtype)).double() / (n * m)
    a, b = (part.double() @ directions for part in (x, y))
    a, b = a.sort(0).values[(steps - 1) // m], b.sort(0).values[(steps - 1) // n]
    return float((width[:, None] * (a - b).square()).sum(0).mean().sqrt())
