"""Exact problems: laws whose denoiser is known at every noise level, with the Frechet distance to their moments."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor

import fastsde
from fastsde.evaluation.statistics import Moments, frechet_distance
from fastsde.score import MixtureScore

SDE = fastsde.VPSDE()
"""beta 0.1 .. 20, t_min 1e-3: noise over signal from 152 down to 0.01."""
RHO_MAX, RHO_MIN = ((-0.5 * SDE.log_snr(torch.tensor([SDE.t_max, SDE.t_min], dtype=torch.float64))).exp()).tolist()


class Problem(ABC):
    """A law of data, its denoiser, and how far samples are from it.

    Attributes:
        n: samples to draw.
        rows: denoised rows so far: the network calls of everybody, counted in the model.
    """

    name: str
    d: int

    def __init__(self, n: int) -> None:
        self.n, self.rows = n, 0

    def denoise(self, y: Tensor, rho: Tensor) -> Tensor:
        """E[x_0 | y] for y = x_0 + rho eps with shape (B, d), and rho with shape (B,) or (), in the dtype of y."""
        self.rows += len(y)
        rho = rho.double().reshape(-1, 1)
        return self.exact(y, rho[:1] if (rho == rho[0]).all() else rho)

    @abstractmethod
    def exact(self, y: Tensor, rho: Tensor) -> Tensor:
        """The denoiser, for rho with shape (B, 1) or (1, 1) in float64."""

    @abstractmethod
    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Exact samples, with shape (n, d)."""

    @abstractmethod
    def distance(self, x: Tensor) -> float:
        """Frechet distance between the moments of samples and the exact ones."""

    def model(self, sde: fastsde.SDE = SDE) -> fastsde.ScoreModel:
        """The same denoiser as fastsde reads it, under any process."""

        def network(x: Tensor, t: Tensor) -> Tensor:
            t = t.double()
            alpha = sde.alpha(t)
            return self.denoise((x / alpha[:, None]).to(x.dtype), sde.sigma(t) / alpha)

        return fastsde.ScoreModel(network, sde, "sample", event_shape=(self.d,))

    def floor(self, draws: int) -> tuple[float, float]:
        """Mean and standard deviation of the distance of n exact samples."""
        generator = torch.Generator().manual_seed(0)
        values = torch.tensor([self.distance(self.draw(self.n, generator)) for _ in range(draws)])
        return float(values.mean()), float(values.std())


class Mixture(Problem):
    """Gaussians with covariance U diag(v) U^T + floor I, in two matrix products a call."""

    def __init__(self, name: str, law: MixtureScore, n: int) -> None:
        super().__init__(n)
        self.name, self.law, (k, self.d, r) = name, law, law.bases.shape
        self.basis = law.bases.permute(1, 0, 2).reshape(self.d, k * r).float().contiguous()
        self.centres = torch.einsum("kd,kdr->kr", law.means, law.bases).float()
        self.means = law.means.float()
        self.mean, self.covariance = law.moments()

    def exact(self, y: Tensor, rho: Tensor) -> Tensor:
        law, (k, r) = self.law, self.centres.shape
        rest = law.floor + rho**2
        variance = law.variances + rest[..., None]
        along = (y @ self.basis).reshape(-1, k, r) - self.centres
        distance = y.square().sum(1, keepdim=True) - 2 * y @ self.means.T + self.means.square().sum(1)
        log_det = ((law.variances / rest[..., None]).log1p().sum(2) + self.d * rest.log()).float()
        inside = along.square() * (1 / rest[..., None] - 1 / variance).float()
        logits = law.weights.log().float() - 0.5 * (distance / rest.float() - inside.sum(2) + log_det)
        share = logits.softmax(1)
        kept = (law.floor / rest).float()
        gain = (law.variances + law.floor) / variance - (law.floor / rest)[..., None]
        spread = (share[:, :, None] * gain.float() * along).flatten(1) @ self.basis.T
        return kept * y + (1 - kept) * (share @ self.means) + spread

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        return self.law.draw(n, generator)

    def distance(self, x: Tensor) -> float:
        own = Moments.of(x)
        return frechet_distance(own.mean, own.covariance, self.mean, self.covariance)


class Gaussian(Problem):
    """Independent elements with standard deviations 0.3 .. 0.0095, log-spaced: the problem of `thesis/algorithm6.py`.

    Distance: the sum over elements of the one-dimensional Frechet distances. What t_min leaves out of the smallest
    elements is everybody's alike.
    """

    name, d = "gaussian", 3072

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.std = torch.logspace(math.log10(0.3), math.log10(0.0095), self.d, dtype=torch.float64)

    def exact(self, y: Tensor, rho: Tensor) -> Tensor:
        return (self.std**2 / (self.std**2 + rho**2)).float() * y

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        # As everybody draws it: denoised at the lowest level of noise.
        clean = torch.randn(n, self.d, dtype=torch.float64, generator=generator) * self.std
        noise = torch.randn(n, self.d, dtype=torch.float64, generator=generator) * RHO_MIN
        return self.std**2 / (self.std**2 + RHO_MIN**2) * (clean + noise)

    def distance(self, x: Tensor) -> float:
        x = x.double()
        return float(x.mean(0).square().sum() + (x.std(0) - self.std).square().sum())


def digits_law() -> MixtureScore:
    """scikit-learn's 8x8 digits in [-1, 1]: one Gaussian for each, with its mean, full covariance and frequency.

    The covariances get a ridge of 4e-4, since some pixels are constant. A factor of 2 in it moves calls by 1 %.
    """
    from sklearn.datasets import load_digits

    pixels, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    classes = [(pixels[labels == k] / 8 - 1).double() for k in range(10)]
    weights = torch.tensor([len(c) for c in classes], dtype=torch.float64) / len(labels)
    means = torch.stack([c.mean(0) for c in classes])
    covariances = torch.stack([c.T.cov() for c in classes]) + 4e-4 * torch.eye(64, dtype=torch.float64)
    return MixtureScore.from_covariances(SDE, weights, means, covariances)


def digits(n: int) -> Mixture:
    """Ten full covariances in 64 dimensions."""
    return Mixture("digits", digits_law(), n)


def scales(n: int) -> Mixture:
    """Sixteen components in 512 dimensions whose standard deviations go from 0.01 to 0.5."""
    generator = torch.Generator().manual_seed(0)
    k, d, r = 16, 512, 32
    means = 0.3 * torch.randn(k, d, generator=generator, dtype=torch.float64)
    bases = torch.linalg.qr(torch.randn(k, d, r, generator=generator, dtype=torch.float64))[0]
    largest = torch.logspace(-2, math.log10(0.5), k, dtype=torch.float64)
    variances = largest[:, None] ** 2 * torch.logspace(0, -2, r, dtype=torch.float64)
    weights = torch.full((k,), 1 / k, dtype=torch.float64)
    return Mixture("scales", MixtureScore(SDE, weights, means, bases, variances, floor=1e-4), n)


def rare(n: int) -> Mixture:
    """97 % one smooth Gaussian in 512 dimensions, 3 % sixteen tight clusters near each other: rare hard samples."""
    generator = torch.Generator().manual_seed(0)
    k, d, r = 17, 512, 32
    bases = torch.linalg.qr(torch.randn(k, d, r, generator=generator, dtype=torch.float64))[0]
    variances = torch.full((k, r), 0.0005**2, dtype=torch.float64)
    variances[0] = 0.5 * torch.logspace(0, -2, r, dtype=torch.float64)
    centre = 0.3 * torch.randn(d, generator=generator, dtype=torch.float64)
    means = centre + 0.3 * torch.randn(k, d, generator=generator, dtype=torch.float64)
    means[0] = 0
    weights = torch.full((k,), 0.03 / (k - 1), dtype=torch.float64)
    weights[0] = 0.97
    return Mixture("rare", MixtureScore(SDE, weights, means, bases, variances, floor=1e-4), n)


def images(n: int, folder: Path) -> Mixture:
    """Ten Gaussians with the means and the 80 largest principal variances of the classes of an IDX image data set."""
    from fastsde.training.data import load_images, to_unit_range

    pixels, labels = load_images(folder)
    x = to_unit_range(pixels).flatten(1).double()
    means, bases, variances = [], [], []
    for c in labels.unique():
        own = x[labels == c]
        values, vectors = torch.linalg.eigh(own.T.cov())
        means.append(own.mean(0))
        bases.append(vectors[:, -80:])
        variances.append(values[-80:] - 4e-4)
    weights = torch.full((len(means),), 1 / len(means), dtype=torch.float64)
    parts = (torch.stack(part) for part in (means, bases, variances))
    return Mixture("images", MixtureScore(SDE, weights, *parts, floor=4e-4), n)


def make(name: str, n: int, folder: Path | None = None) -> Problem:
    """A problem by its name; `folder` is the IDX image data set of "images"."""
    if name == "images":
        if folder is None:
            raise SystemExit("the problem images needs --images FOLDER, with an IDX image data set.")
        return images(n, folder)
    return {"digits": digits, "scales": scales, "rare": rare, "gaussian": Gaussian}[name](n)
