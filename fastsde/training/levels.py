"""Noise levels for training and annealed sampling: how large, how many, which."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsde.sde.base import SDE


def largest_distance(data: Tensor, *, exact_up_to: int = 10_000) -> float:
    """The largest distance between two data points, which sigma_1 should be about (Song and Ermon's technique 1).

    Exact for sets up to `exact_up_to` rows; above, a bound from above: twice the largest distance from the mean, at
    most twice the truth.

    Args:
        data: floats, with shape (N, *event).
        exact_up_to: rows.

    Raises:
        ValueError: if there are fewer than two rows, a value is not finite, or all rows are the same.
    """
    x = data.flatten(1).double()
    if len(x) < 2 or not torch.isfinite(x).all():
        raise ValueError(f"data must be at least two finite rows; got shape {tuple(data.shape)}.")
    if bool((x == x[:1]).all()):
        raise ValueError("all rows of data are the same: there is nothing to learn, and no level of noise to choose.")
    x = x - x.mean(0)  # cdist takes differences of squares, which cancel far from 0
    if len(x) > exact_up_to:
        return 2 * float(x.norm(dim=1).amax())
    return max(float(torch.cdist(part, x).amax()) for part in x.split(1000))


def number_of_levels(sigma_1: float, sigma_L: float, d: int, *, overlap: float = 0.5) -> int:
    r"""How many geometric levels make the noise of neighbours overlap by a given share (technique 2).

        Phi(sqrt(2 d) (g - 1) + 3 g) - Phi(sqrt(2 d) (g - 1) - 3 g) = overlap,    g = sigma_i / sigma_(i+1)

    The authors say overlap of about 0.5, which gives 219 for CIFAR-10 (50 to 0.01, d = 3072); the 232 that they and the
    thesis use are an overlap of 0.57, and so are the 788 for 96 x 96 churches. In up to 4 dimensions any two levels
    overlap by more than that: the rule then says 2. Source: Song and Ermon, https://arxiv.org/abs/2006.09011, sec. 3.2.

    Args:
        sigma_1, sigma_L: the largest level and the smallest.
        d: number of elements of a sample.
        overlap: in (0, 0.99).

    Raises:
        ValueError: if the levels do not fall, or `overlap` is outside its range.
    """
    _check(sigma_1, sigma_L)
    if not 0 < overlap < 0.99 or d < 1:
        raise ValueError(f"overlap must be in (0, 0.99) and d at least 1; got {overlap} and {d}.")

    def share(g: float) -> float:
        both = torch.tensor([3 * g, -3 * g], dtype=torch.float64) + math.sqrt(2 * d) * (g - 1)
        upper, lower = torch.special.ndtr(both).tolist()
        return float(upper - lower)

    low, high = 1.0, 2.0
    while share(high) > overlap and high < 1e6:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) > overlap else (low, middle)
    return max(2, round(math.log(sigma_1 / sigma_L) / math.log(low)) + 1)


def geometric_levels(sigma_1: float, sigma_L: float, levels: int) -> Tensor:
    """sigma_i = sigma_1 gamma^(i - 1), gamma = (sigma_L / sigma_1)^(1 / (L - 1)) (thesis, eq. 8.2).

    Returns:
        Float64, falling, with shape (levels,).

    Raises:
        ValueError: if the levels do not fall or there are fewer than two.
    """
    _check(sigma_1, sigma_L)
    if levels < 2:
        raise ValueError(f"levels must be at least 2; got {levels}.")
    return torch.logspace(math.log10(sigma_1), math.log10(sigma_L), levels, dtype=torch.float64)


def level_times(sde: SDE, sigmas: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """Times at which sigma / alpha is one of the given levels, each as likely: p(sigma) of eq. 8.1.

    Args:
        sde: any process.
        sigmas: levels, with shape (L,).
        batch, generator: rows, and what draws them.

    Returns:
        Float64 times with shape (batch,).

    Raises:
        ValueError: if the levels do not fall, are not positive or outside of the process.
    """
    if len(sigmas) < 1 or sigmas[-1] <= 0 or (sigmas.diff() >= 0).any():
        raise ValueError(f"sigmas must fall and be positive, the largest first; got {sigmas.tolist()[:4]}.")
    ends = sde.log_snr(torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)).div(-2).exp()
    if sigmas[0] > ends[0] * (1 + 1e-6) or sigmas[-1] < ends[1] * (1 - 1e-6):  # an end rounded to float32 is one
        raise ValueError(
            f"sigmas must be noise over signal that the process has, {float(ends[1]):.4g} to {float(ends[0]):.4g}; got "
            f"{float(sigmas[-1]):.4g} to {float(sigmas[0]):.4g}."
        )
    chosen = sigmas[torch.randint(len(sigmas), (batch,), generator=generator)]
    return sde.t_of_log_snr(-2 * chosen.double().log()).clamp(sde.t_min, sde.t_max)


def _check(sigma_1: float, sigma_L: float) -> None:
    if not 0 < sigma_L < sigma_1 < math.inf:
        raise ValueError(f"levels must fall from sigma_1 to a positive sigma_L; got {sigma_1} and {sigma_L}.")
