"""Langevin dynamics at one level of noise: correctors, and the kernels of `fastsde.langevin`."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from fastsde.batching import all_finite, expand_like, row_dot, row_norm
from fastsde.checks import check_flags, check_kind, check_number
from fastsde.score.base import BoundModel
from fastsde.sde.base import SDE
from fastsde.types import Coef, Mask, State, Time

Normals = Callable[[int], State]
"""Standard normals by number, each with shape (B, *event)."""
_LEAST_SCORE = 1e-12
"""Root mean square of a score below which there is no Langevin step."""


class Corrector(ABC):
    """Steps of a Markov chain at one level of noise, whose law they leave alone, up to their error.

    Attributes:
        calls: network calls of a correction.
    """

    calls: int = 1

    @abstractmethod
    def correct(self, model: BoundModel, sde: SDE, x: State, t: Time, shrink: Coef, normal: Normals) -> State:
        """One step.

        Args:
            model: the bound score model.
            sde: the forward process.
            x: with shape (B, *event).
            t: the level, with shape (B,).
            shrink: (alpha_t / alpha_s)^2 of the predictor's step, with shape (B,).
            normal: independent standard normals by number.
        """


@dataclasses.dataclass(frozen=True)
class Langevin(Corrector):
    r"""One step of Langevin dynamics, whose size makes noise and score relate as `snr` says.

        x <- x + eps score(x, t) + sqrt(2 eps) z,    eps = 2 (snr |z| / |score|)^2 (1 - beta)    (per sample)
        eps = 2 (snr sigma_t)^2 (1 - beta)                                                       (`annealed`)

    with 1 - beta = (alpha_t / alpha_s)^2 of the predictor's step, 1 on VE. The norms are those of each sample, so that
    samples stay independent; the released code averages both norms over the batch, which `batch_mean` replicates: the
    result then depends on the batch. Source: Song et al., https://arxiv.org/abs/2011.13456, app. G, algorithms 4, 5.

    Args:
        snr: r of the paper, positive: 0.16 for VE and 0.01 for VP were its best on CIFAR-10.
        annealed: take the size from sigma_t rather than from the score (annealed Langevin dynamics).
        batch_mean: use the mean norms of the batch.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    snr: float = 0.16
    annealed: bool = False
    batch_mean: bool = False

    def __post_init__(self) -> None:
        check_number("snr", self.snr, 0.0, ends="()")
        check_flags(annealed=self.annealed, batch_mean=self.batch_mean)

    def correct(self, model: BoundModel, sde: SDE, x: State, t: Time, shrink: Coef, normal: Normals) -> State:
        z = normal(0)
        score = model(x, t).score
        if self.annealed:
            ratio = sde.sigma(t)
        else:
            above, below = row_norm(z), row_norm(score)
            if self.batch_mean:
                above, below = above.mean().expand_as(above), below.mean().expand_as(below)
            # A score of zero asks for an infinite step, or says nothing about it: none is taken.
            ratio = torch.where(below > _LEAST_SCORE, above / below, 0.0)
        size = 2 * (self.snr * ratio) ** 2 * shrink
        return x + expand_like(size, x) * score + expand_like((2 * size).sqrt(), x) * z


@dataclasses.dataclass(frozen=True)
class LangevinDynamics(Corrector):
    r"""Unadjusted Langevin dynamics with a step size of its own, constant or falling.

        x <- x + lam_k score(x, t) + sqrt(2 lam_k) z,    lam_k = step_size (k + 1)^-decay

    On N(0, 1) the chain has variance 2 / (2 - lam): right as lam falls to 0. With decay in (1/2, 1] the steps have an
    infinite sum and their squares a finite one (thesis eq. 2.3 prints 0 and infinity), and the law at the end is right
    in the limit. Source: Welling and Teh, "Bayesian learning via stochastic gradient Langevin dynamics", ICML 2011;
    thesis eqs. 2.2 and 2.3.

    Args:
        step_size: lam of the first step, positive, in units of x^2; of sigma_t^2 if `relative`.
        decay: exponent in [0, 1]; 0 for constant steps. A corrector always takes the first step size.
        relative: whether step sizes are multiples of sigma_t^2, as in annealed sampling.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    step_size: float
    decay: float = 0.0
    relative: bool = False

    def __post_init__(self) -> None:
        check_number("step_size", self.step_size, 0.0, ends="()")
        check_number("decay", self.decay, 0.0, 1.0)
        check_flags(relative=self.relative)

    def size(self, sde: SDE, t: Time, k: Tensor | int = 0) -> Coef:
        """lam of step k, counted from 0, with shape (B,)."""
        scale = sde.sigma(t) ** 2 if self.relative else torch.ones_like(t)
        return self.step_size * scale * torch.as_tensor(k + 1.0, device=t.device) ** -self.decay

    def correct(self, model: BoundModel, sde: SDE, x: State, t: Time, shrink: Coef, normal: Normals) -> State:
        return moved(x, model(x, t).score, self.size(sde, t), normal(0))


@dataclasses.dataclass(frozen=True)
class MALA(LangevinDynamics):
    r"""Langevin dynamics with an acceptance step for each sample, which makes the law right at any step size.

        x' = x + lam score(x) + sqrt(2 lam) z
        log a = log p(x') - log p(x) + log q(x | x') - log q(x' | x),    q(b | a) = N(b; a + lam score(a), 2 lam I)

    and x' is taken with probability min(1, a). Without `log_density` the difference of log p is the line integral of
    the score from x to x' by Simpson's rule, (s(x) + 4 s((x + x') / 2) + s(x')) . (x' - x) / 6: exact where the score
    is a cubic, else with an error of about | x' - x |^5 / 2880 times its fourth derivative along the line. It costs one
    call more a step. (The trapezoidal rule, which costs none, was as far from the law of a mixture as no acceptance.)
    Where a network's score is no gradient of a function, the integral depends on the path and the law is not exact.
    Source: Besag 1994; Roberts and Tweedie, "Exponential convergence of Langevin distributions", 1996; thesis sec.
    2.2.2.

    Args:
        step_size, decay, relative: as for `LangevinDynamics`.
        log_density: `log_density(x, t)`, up to a constant, with x of shape (B, *event), t and the result of shape (B,);
            the exact models have one of that name.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    log_density: Callable[[Tensor, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kind("log_density", self.log_density, Callable, "callable as log_density(x, t)")

    @property
    def calls(self) -> int:  # type: ignore[override]
        return 1 + self.calls_per_move

    @property
    def calls_per_move(self) -> int:
        """Network calls of a move where the score at x is known."""
        return 2 if self.log_density is None else 1

    def move(
        self, score: Callable[[State], State], x: State, at_x: State, t: Time, lam: Coef, z: State, u: Coef
    ) -> tuple[State, State, Mask]:
        """One move of rows whose score is known, with `u` uniform on (0, 1): states, scores, and who has moved.

        A proposal of density 0 is refused. A row becomes NaN where its own score, or the integral, is not a number.
        """
        after = moved(x, at_x, lam, z)
        step, at_after = after - x, score(after)
        if self.log_density is None:
            mean = (at_x + 4 * score(x + step / 2) + at_after) / 6
            gain = row_dot(step, mean)
        else:
            gain = (self.log_density(after, t) - self.log_density(x, t)).double()
        scale = expand_like(lam, x)
        there, back = ((v.flatten(1).double() ** 2).sum(1) for v in (step - scale * at_x, -step - scale * at_after))
        taken = u.log() <= gain + (there - back) / (4 * lam).clamp(min=1e-300)  # false for NaN; true where lam is 0
        # Where lam is 0 the score after the move is that of the row itself.
        lost = gain.isnan() | ~all_finite(at_x) | ((lam == 0) & ~all_finite(at_after))
        rows = expand_like(taken, x)
        x = torch.where(rows, after, x).masked_fill(expand_like(lost, x), torch.nan)
        return x, torch.where(rows, at_after, at_x), taken

    def correct(self, model: BoundModel, sde: SDE, x: State, t: Time, shrink: Coef, normal: Normals) -> State:
        def score(where: State) -> State:
            return model(where, t).score

        u = uniform(normal(1).flatten(1)[:, 0])
        return self.move(score, x, score(x), t, self.size(sde, t), normal(0), u)[0]


def moved(x: State, score: State, lam: Coef, z: State) -> State:
    """x + lam score + sqrt(2 lam) z, with shape (B, *event)."""
    return x + expand_like(lam, x) * score + expand_like((2 * lam).sqrt(), x) * z


def uniform(normal: Tensor) -> Coef:
    """Uniform numbers on (0, 1) from standard normals, in float64."""
    return torch.special.ndtr(normal.double())
