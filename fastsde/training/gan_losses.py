r"""GAN losses in one form: four scalar functions of the critic, and what the critic is compared with.

    L_D = E f_1(u_r) + E f_2(u_f),    L_G = E g_1(u_r) + E g_2(u_f)

with u_r, u_f made of the critic's values C(x_r) of real and C(x_f) of fake data by `plain` (themselves), `paired`,
`average`, `centred`, `one_way` or `all_pairs`. Source: Jolicoeur-Martineau, "The relativistic discriminator",
https://arxiv.org/abs/1807.00734, eqs. 9-16; thesis, eqs. 4.9-4.16, ch. 6 and appendix A.7.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

Scalar = Callable[[Tensor], Tensor]
Comparison = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def plain(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """The critic itself: u_r = C(x_r), u_f = C(x_f)."""
    return real, fake


def paired(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Relativistic: u_r = C(x_r) - C(x_f), u_f = -u_r, in pairs of independent x_r and x_f (eqs. 4.11, 4.12).

    Where f_2(-u) = f_1(u), as for SGAN, both terms are the same: the loss is twice that of eqs. 4.7 and 4.8.
    """
    return real - fake, fake - real


def average(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Relativistic average: u_r = C(x_r) - E C(x_f), u_f = C(x_f) - E C(x_r) (eqs. 4.15, 4.16)."""
    return real - fake.mean(), fake - real.mean()


def centred(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Relativistic centred: both less the mean of the two means (thesis, thm. 6.4.1, R_c)."""
    middle = (real.mean() + fake.mean()) / 2
    return real - middle, fake - middle


def one_way(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Relativistic average of real data alone: u_r = C(x_r) - E C(x_f), u_f = -u_r (R_alf)."""
    u = real - fake.mean()
    return u, -u


def all_pairs(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """`paired` over all B^2 pairs, the unbiased estimate of least variance (thesis, corollary 6.5.1)."""
    u = (real[:, None] - fake).flatten()
    return u, -u


@dataclasses.dataclass(frozen=True)
class GANLoss:
    """The four functions and the comparison.

    Attributes:
        f_1, f_2: of the discriminator, for real and for fake data; elementwise.
        g_1: of the generator, for real data: without gradient for `plain`, with one for relativistic comparisons.
        g_2: of the generator, for fake data.
        compare: `plain`, `paired`, `average`, `centred`, `one_way` or `all_pairs`.
    """

    f_1: Scalar
    f_2: Scalar
    g_1: Scalar
    g_2: Scalar
    compare: Comparison = plain

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """L_D, a scalar, of the critic's values with shape (B,) each."""
        u_r, u_f = self.compare(real, fake)
        return self.f_1(u_r).mean() + self.f_2(u_f).mean()

    def generator(self, real: Tensor, fake: Tensor) -> Tensor:
        """L_G, a scalar, of the critic's values with shape (B,) each."""
        u_r, u_f = self.compare(real, fake)
        return self.g_1(u_r).mean() + self.g_2(u_f).mean()


def _adversarial(f_1: Scalar, f_2: Scalar, compare: Comparison, *, saturating: bool) -> GANLoss:
    """Non-saturating: the generator exchanges the roles. Saturating: it maximises what the discriminator minimises."""
    if saturating:
        return GANLoss(f_1, f_2, lambda u: -f_1(u), lambda u: -f_2(u), compare)
    return GANLoss(f_1, f_2, f_2, f_1, compare)


def sgan(compare: Comparison = plain, *, saturating: bool = False) -> GANLoss:
    r"""The standard GAN: f_1 = -log sigmoid(u), f_2 = -log(1 - sigmoid(u)) (eqs. A.4-A.9).

    At the best critic, log p/q, L_D = 2 log 2 - 2 JSD(p, q). Source: Goodfellow et al., https://arxiv.org/abs/1406.2661.
    """
    return _adversarial(lambda u: softplus(-u), softplus, compare, saturating=saturating)


def lsgan(compare: Comparison = plain, *, saturating: bool = False, real: float = 1.0, fake: float = -1.0) -> GANLoss:
    r"""Least squares: f_1 = (u - real)^2, f_2 = (u - fake)^2, the generator's target being `real` (eqs. 8.4, 8.5).

    Appendix A.7 prints the targets 0 and 1 for the plain loss (eq. A.10), 1 and -1 elsewhere, which are the defaults.
    At the best critic, (real p + fake q) / (p + q), L_D = (real - fake)^2 times the integral of p q / (p + q). Source:
    Mao et al., https://arxiv.org/abs/1611.04076.
    """
    return _adversarial(lambda u: (u - real).square(), lambda u: (u - fake).square(), compare, saturating=saturating)


def hinge(compare: Comparison = plain) -> GANLoss:
    r"""Hinge: f_1 = max(0, 1 - u), f_2 = max(0, 1 + u); the generator's plain loss is -u (eqs. A.12-A.15).

    At the best critic, the sign of p - q, L_D = 2 - 2 TV(p, q), TV the total variation. Source: Lim and Ye,
    https://arxiv.org/abs/1705.02894.
    """
    loss = _adversarial(lambda u: relu(1 - u), lambda u: relu(1 + u), compare, saturating=False)
    return dataclasses.replace(loss, g_1=torch.zeros_like, g_2=torch.neg) if compare is plain else loss


def wgan(compare: Comparison = plain) -> GANLoss:
    r"""Wasserstein: f_1 = -u, f_2 = u, g_1 = u, g_2 = -u, for a critic that is bounded in slope (eqs. A.16, A.17).

    Add `gradient_penalty` to the discriminator's loss. A relativistic comparison only doubles it. Source: Arjovsky et
    al., https://arxiv.org/abs/1701.07875; Gulrajani et al., https://arxiv.org/abs/1704.00028.
    """
    return GANLoss(torch.neg, lambda u: u, lambda u: u, torch.neg, compare)


def gradient_penalty(critic: Scalar, real: Tensor, fake: Tensor, mix: Tensor, *, one_sided: bool = False) -> Tensor:
    r"""E (|grad C(x^)|_2 - 1)^2 at x^ = mix x_r + (1 - mix) x_f, to be multiplied by lambda (eq. A.16).

    One-sided, E max(0, |grad C(x^)|_2 - 1)^2: slopes below 1 are free.

    Args:
        critic: from (B, *event) to (B,).
        real, fake: data, with shape (B, *event).
        mix: uniform in [0, 1], with shape (B,).
        one_sided: whether only slopes above 1 are penalised.

    Raises:
        ValueError: if the shapes differ or `mix` has not one entry for each row.
    """
    if real.shape != fake.shape or mix.shape != real.shape[:1]:
        raise ValueError(
            f"real and fake must have one shape and mix one entry a row; got {tuple(real.shape)}, {tuple(fake.shape)} "
            f"and {tuple(mix.shape)}."
        )
    share = mix.reshape(-1, *[1] * (real.ndim - 1))
    between = (share * real + (1 - share) * fake).detach().requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    excess = slope.flatten(1).norm(dim=1) - 1
    return (relu(excess) if one_sided else excess).square().mean()
