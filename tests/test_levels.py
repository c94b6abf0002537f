"""Levels of noise, losses over them, and networks that are not told them."""

import math

import pytest
import torch
from torch import nn

import fastsde
from fastsde.score import GaussianScore, MixtureScore
from fastsde.training.levels import geometric_levels, largest_distance, level_times, number_of_levels
from fastsde.training.losses import sliced_score_loss
from fastsde.training.networks import Discriminator, Unconditional

GENERATOR = torch.Generator().manual_seed(0)


def test_the_largest_distance_and_its_bound():
    data = torch.randn(300, 2, 3, generator=GENERATOR)
    flat = data.flatten(1).double()
    exact = max(float((a - b).norm()) for a in flat for b in flat)
    assert largest_distance(data) == pytest.approx(exact, rel=1e-6)
    assert exact <= largest_distance(data, exact_up_to=10) <= 2 * exact
    for wrong, message in (
        (torch.ones(5, 2), "all rows of data are the same"),
        (torch.full((5, 2), math.nan), "finite rows"),
        (torch.ones(1, 2), "at least two"),
    ):
        with pytest.raises(ValueError, match=message):
            largest_distance(wrong)


def test_the_number_of_levels_meets_the_overlap_and_the_published_ones():
    """Song and Ermon's 232 for CIFAR-10 and 788 for 96 x 96 churches are one overlap, 0.566."""
    assert number_of_levels(50.0, 0.01, 3072, overlap=0.566) == pytest.approx(232, abs=1)
    assert number_of_levels(140.0, 0.01, 3 * 96 * 96, overlap=0.566) == pytest.approx(788, abs=3)
    assert number_of_levels(50.0, 0.01, 2) == 2
    for d, overlap in ((40, 0.5), (3072, 0.5), (100, 0.8)):
        g = math.exp(math.log(5000) / (number_of_levels(50.0, 0.01, d, overlap=overlap) - 1))
        z = math.sqrt(2 * d) * (g - 1)
        normal = torch.distributions.Normal(0.0, 1.0)
        found = float(normal.cdf(torch.tensor(z + 3 * g)) - normal.cdf(torch.tensor(z - 3 * g)))
        # One level more or less moves g - 1 by (g - 1) / L, most where levels are few.
        assert found == pytest.approx(overlap, abs=0.03)


def test_levels_are_geometric():
    sigmas = geometric_levels(50.0, 0.01, 232)
    torch.testing.assert_close(sigmas[1:] / sigmas[:-1], torch.full((231,), (0.01 / 50) ** (1 / 231)).double())
    assert (float(sigmas[0]), float(sigmas[-1])) == (pytest.approx(50.0), pytest.approx(0.01))
    for wrong in ((0.01, 50.0), (50.0, 0.0), (math.inf, 1.0)):
        with pytest.raises(ValueError, match="must fall"):
            geometric_levels(*wrong, 10)
        with pytest.raises(ValueError, match="must fall"):
            number_of_levels(*wrong, 10)
    with pytest.raises(ValueError, match="at least 2"):
        geometric_levels(50.0, 0.01, 1)
    with pytest.raises(ValueError, match="overlap"):
        number_of_levels(50.0, 0.01, 10, overlap=1.5)


@pytest.mark.parametrize("sde", [fastsde.VESDE(0.01, 50.0), fastsde.VPSDE(), fastsde.EDM()])
def test_times_of_levels_have_those_levels_each_as_often(sde):
    sigmas = geometric_levels(20.0, 0.05, 5)
    t = level_times(sde, sigmas, 5000, torch.Generator().manual_seed(1))
    rho = sde.sigma(t) / sde.alpha(t)
    nearest = (rho[:, None].log() - sigmas.log()).abs()
    assert float(nearest.amin(1).amax()) < 1e-6
    counts = torch.bincount(nearest.argmin(1), minlength=5)
    assert (counts - 1000).abs().max() < 5 * 1000**0.5  # five standard deviations


@pytest.mark.parametrize("sde", [fastsde.VESDE(0.01, 50.0), fastsde.VPSDE(), fastsde.SubVPSDE()])
def test_a_network_that_is_not_told_the_level(sde):
    """Of standard normal data the score of y is -y / (1 + rho^2): at one level an unconditional net can be exact."""
    t = torch.full((5,), 0.6, dtype=torch.float64)
    rho = (sde.sigma(t) / sde.alpha(t))[0]

    class Exact(nn.Module):
        def forward(self, y):
            return -y * rho / (1 + rho**2)

    model = fastsde.ScoreModel(Unconditional(Exact(), sde), sde, "epsilon")
    x = torch.randn(5, 2, generator=GENERATOR, dtype=torch.float64)
    exact = GaussianScore(sde, torch.zeros(2), torch.ones(2)).exact_score(x, t)
    # The network gets its time in single precision for single states, in double for double ones.
    torch.testing.assert_close(model(x, t).score, exact, rtol=1e-6, atol=1e-9)


def test_sliced_score_matching_is_least_at_the_score():
    """On a mixture at one level of noise: the gradient along a change of the exact score vanishes, within its error."""
    sde = fastsde.VPSDE()
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    means = torch.tensor([[-0.5, 0.2], [0.6, 0.0]], dtype=torch.float64)
    law = MixtureScore(sde, weights, means, torch.zeros(2, 2, 0).double(), torch.zeros(2, 0).double(), floor=0.04)
    n = 100_000
    generator = torch.Generator().manual_seed(3)
    t = torch.full((n,), 0.3, dtype=torch.float64)
    x = sde.marginal(law.draw(n, generator), t, torch.randn(n, 2, generator=generator, dtype=torch.float64))
    v = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    for bump in (torch.sin, torch.neg, torch.tanh):
        size = torch.zeros((), dtype=torch.float64, requires_grad=True)
        values = sliced_score_loss(lambda y: law.exact_score(y, t) + size * bump(y), x, v)  # noqa: B023
        (slope,) = torch.autograd.grad(values.mean(), size)
        # A mean of n terms of size about 10: five standard errors.
        assert abs(float(slope)) < 5 * 10 / n**0.5
    wrong = sliced_score_loss(lambda y: 1.2 * law.exact_score(y, t), x, v).mean()
    right = sliced_score_loss(lambda y: law.exact_score(y, t), x, v).mean()
    # Up to a constant it is half the mean square error: 0.2^2 / 2 E |score|^2.
    expected = 0.02 * float(law.exact_score(x, t).square().sum(1).mean())
    assert float(wrong - right) == pytest.approx(expected, rel=0.2)


def test_the_discriminator_is_bounded_in_slope():
    """Each layer has spectral norm 1 at most, once the power iterations have converged: a residual block slope 2."""
    torch.manual_seed(0)
    judge = Discriminator(1, width=8, halvings=2)
    for _ in range(30):
        judge(torch.randn(4, 1, 16, 16))
    judge.eval()
    x = torch.randn(4, 1, 16, 16, requires_grad=True)
    out = judge(x)
    assert out.shape == (4,)
    (slope,) = torch.autograd.grad(out.sum(), x)
    # Three blocks of slope 2 at most, then a mean over pixels and a linear layer of norm 1; convolutions of norm 1 as
    # matrices have at most 9 as maps, rarely near it.
    assert float(slope.flatten(1).norm(dim=1).max()) < 2**3
