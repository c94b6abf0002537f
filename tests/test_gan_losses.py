"""GAN losses: the formulas of appendix A.7, values at the best critic, gradients that the thesis states."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from fastsde.training.gan_losses import average, gradient_penalty, hinge, lsgan, paired, plain, sgan, wgan

REAL, FAKE = torch.randn(2, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def log_sigmoid(u):
    return logsigmoid(u).mean()


def log_not_sigmoid(u):
    return torch.log(1 - torch.sigmoid(u)).mean()


U_R, U_F = REAL - FAKE.mean(), FAKE - REAL.mean()
MAX = lambda u: torch.maximum(torch.zeros_like(u), u).mean()  # noqa: E731
PUBLISHED = {
    "SGAN": (sgan(), -log_sigmoid(REAL) - log_not_sigmoid(FAKE), -log_sigmoid(FAKE)),
    "RSGAN": (sgan(paired), -2 * log_sigmoid(REAL - FAKE), -2 * log_sigmoid(FAKE - REAL)),
    "RaSGAN": (sgan(average), -log_sigmoid(U_R) - log_not_sigmoid(U_F), -log_sigmoid(U_F) - log_not_sigmoid(U_R)),
    "LSGAN": (lsgan(real=0.0, fake=1.0), (REAL**2).mean() + ((FAKE - 1) ** 2).mean(), (FAKE**2).mean()),
    "LSGAN, chapter 8": (lsgan(), ((REAL - 1) ** 2).mean() + ((FAKE + 1) ** 2).mean(), ((FAKE - 1) ** 2).mean()),
    "RaLSGAN": (
        lsgan(average),
        ((U_R - 1) ** 2).mean() + ((U_F + 1) ** 2).mean(),
        ((U_F - 1) ** 2).mean() + ((U_R + 1) ** 2).mean(),
    ),
    "HingeGAN": (hinge(), MAX(1 - REAL) + MAX(1 + FAKE), -FAKE.mean()),
    "RaHingeGAN": (hinge(average), MAX(1 - U_R) + MAX(1 + U_F), MAX(1 - U_F) + MAX(1 + U_R)),
    "WGAN": (wgan(), -REAL.mean() + FAKE.mean(), -FAKE.mean()),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_losses_are_those_of_the_appendix(name):
    """Of plain generators up to what does not depend on the fake data: g_1 is ignored there."""
    loss, discriminator, generator = PUBLISHED[name]
    ignored = loss.g_1(REAL).mean() if loss.compare is plain else 0.0
    torch.testing.assert_close(loss.discriminator(REAL, FAKE), discriminator)
    torch.testing.assert_close(loss.generator(REAL, FAKE) - ignored, generator)


P = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0], dtype=torch.float64)
Q = torch.tensor([0.1, 0.2, 0.15, 0.35, 0.2], dtype=torch.float64)


def divergence(p, q):
    return float(torch.where(p > 0, p * (p / q).log(), 0.0).sum())


@pytest.mark.parametrize(
    ("loss", "critic", "value"),
    [
        (
            sgan(),
            (P / Q).log(),
            2 * math.log(2) - divergence(P, (P + Q) / 2) - divergence(Q, (P + Q) / 2),
        ),
        (lsgan(), (P - Q) / (P + Q), float(4 * (P * Q / (P + Q)).sum())),
        (hinge(), (P - Q).sign(), 2 - float((P - Q).abs().sum())),
    ],
    ids=["SGAN", "LSGAN", "hinge"],
)
def test_the_best_critic_and_its_value(loss, critic, value):
    """On five points with masses p and q; nothing near the best critic is better."""

    def expected(c):
        real, fake = loss.compare(c, c)
        return float(torch.where(P > 0, P * loss.f_1(real), 0.0).sum() + (Q * loss.f_2(fake)).sum())

    assert expected(critic) == pytest.approx(value, rel=1e-12)
    for k, step in itertools.product(range(5), (-0.1, 0.1)):
        other = critic.clone()
        other[k] += step
        assert expected(other) >= expected(critic)


def gradients(scalar):
    real, fake = REAL.clone().requires_grad_(), FAKE.clone().requires_grad_()
    return torch.autograd.grad(scalar(real, fake), (real, fake))


def test_gradients_of_the_discriminator_are_weighted_by_its_doubt():
    """SGAN: -(1 - D) for real and D for fake data; integral probability metrics have weights of 1."""
    real, fake = gradients(sgan().discriminator)
    torch.testing.assert_close(real, -(1 - torch.sigmoid(REAL)) / 7)
    torch.testing.assert_close(fake, torch.sigmoid(FAKE) / 7)
    real, fake = gradients(wgan().discriminator)
    torch.testing.assert_close(real, torch.full((7,), -1 / 7, dtype=torch.float64))
    torch.testing.assert_close(fake, torch.full((7,), 1 / 7, dtype=torch.float64))


@pytest.mark.parametrize("build", [sgan, lsgan, hinge])
def test_real_data_moves_the_generator_only_in_relativistic_losses(build):
    """How the fake data's gradient depends on the real data."""
    for compare, depends in ((plain, False), (paired, True), (average, True)):
        loss = build(compare)
        fake = FAKE.clone().requires_grad_()
        first, second = (torch.autograd.grad(loss.generator(REAL + shift, fake), fake)[0] for shift in (0.0, 0.3))
        assert torch.equal(first, second) != depends


@pytest.mark.parametrize("build", [sgan, lsgan])
@pytest.mark.parametrize("compare", [plain, paired, average])
def test_saturating_generators_maximise_the_discriminators_loss(build, compare):
    loss = build(compare, saturating=True)
    torch.testing.assert_close(loss.generator(REAL, FAKE), -loss.discriminator(REAL, FAKE))


def test_a_saturating_generator_loses_its_gradient_where_the_discriminator_is_sure():
    sure = torch.full((7,), -20.0, dtype=torch.float64)
    for saturating, size in ((True, 1e-8), (False, 1.0)):
        fake = sure.clone().requires_grad_()
        (slope,) = torch.autograd.grad(sgan(saturating=saturating).generator(REAL, fake), fake)
        assert float(slope.abs().sum()) == pytest.approx(size, rel=0.8 if saturating else 1e-6, abs=2e-8)


@pytest.mark.parametrize("event", [(3,), (1, 2, 2)])
def test_gradient_penalty_of_a_linear_critic(event):
    weight = torch.randn(event, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x, y = torch.randn(2, 5, *event, dtype=torch.float64)
    mix = torch.rand(5, dtype=torch.float64)

    def critic(z):
        return (z * weight).flatten(1).sum(1)

    expected = (weight.norm() - 1) ** 2
    torch.testing.assert_close(gradient_penalty(critic, x, y, mix), expected)
    # Of |z|^2 / 2 the slope is z itself: the point between is told apart from both ends.
    between = mix.reshape(-1, *[1] * len(event)) * x + (1 - mix.reshape(-1, *[1] * len(event))) * y
    found = gradient_penalty(lambda z: z.flatten(1).square().sum(1) / 2, x, y, mix)
    torch.testing.assert_close(found, (between.flatten(1).norm(dim=1) - 1).square().mean())


def test_the_penalty_reaches_the_critics_weights():
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    x = torch.ones(2, 1, dtype=torch.float64)
    gradient_penalty(lambda z: scale * z.sum(1), x, -x, torch.rand(2, dtype=torch.float64)).backward()
    torch.testing.assert_close(scale.grad, torch.tensor(4.0, dtype=torch.float64))  # d/ds (s - 1)^2 at 3
    with pytest.raises(ValueError, match="one shape"):
        gradient_penalty(lambda z: z.sum(1), x, x[:1], torch.rand(2))
