"""Relativistic divergences: closed forms on finitely many points, biases, and a critic that finds them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from fastsde.evaluation.divergence import FUNCTIONS, fit_critic, relativistic
from fastsde.training.gan_losses import all_pairs, centred, hinge, lsgan, one_way, sgan

P = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
Q = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
L = float(((P - Q).square() / (P + Q)).sum())
X = float(((P - Q).square() / P).sum())


def objective(c, f, kind, p=P, q=Q):
    """The divergence's objective for a critic c on finitely many points, written with expectations."""
    f, mean_p, mean_q = FUNCTIONS[f], p @ c, q @ c
    middle = (mean_p + mean_q) / 2
    return {
        "symmetric": lambda: p @ f(c) + q @ f(-c),
        "paired": lambda: 2 * p @ f(c[:, None] - c) @ q,
        "average": lambda: p @ f(c - mean_q) + q @ f(mean_p - c),
        "one way": lambda: 2 * p @ f(c - mean_q),
        "centred": lambda: p @ f(c - middle) + q @ f(middle - c),
    }[kind]()


def largest(f, kind, p=P, q=Q):
    """Its supremum: by L-BFGS on a concave function, or for hinge, min(z, 1), as a linear program."""
    if f == "hinge":
        return largest_of_hinge(kind, p.numpy(), q.numpy())
    c = (p - q).clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [c], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = -objective(c, f, kind, p, q)
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(objective(c.detach(), f, kind, p, q))


def largest_of_hinge(kind, p, q):
    """Maximises w . u over critics c and u <= 1, u <= A c, the rows of A giving what f is taken of."""
    one, n = np.eye(len(p)), len(p)
    middle = (p + q) / 2
    arguments, weights = {
        "symmetric": ([one, -one], [p, q]),
        "paired": ([np.repeat(one, n, 0) - np.tile(one, (n, 1))], [2 * np.outer(p, q).ravel()]),
        "average": ([one - q, p - one], [p, q]),
        "one way": ([one - q], [2 * p]),
        "centred": ([one - middle, middle - one], [p, q]),
    }[kind]
    rows, w = np.concatenate(arguments), np.concatenate(weights)
    bounds = [(None, None)] * n + [(None, 1)] * len(w)
    return -linprog(
        np.concatenate([np.zeros(n), -w]), np.hstack([-rows, np.eye(len(w))]), np.zeros(len(w)), bounds=bounds
    ).fun


JSD = float(sum((a * (2 * a / (P + Q)).log()).sum() for a in (P, Q))) / 2
TV = float((P - Q).abs().sum()) / 2


@pytest.mark.parametrize(
    ("f", "kind", "expected"),
    [
        ("least squares", "symmetric", L),
        ("least squares", "centred", L),
        ("least squares", "paired", 4 * L / (2 + L)),
        ("least squares", "average", 8 * L / (2 + 3 * L)),
        ("least squares", "one way", 2 * X / (1 + X)),
        ("log", "symmetric", 2 * JSD),
        ("hinge", "symmetric", 2 * TV),
    ],
)
def test_closed_forms_on_four_points(f, kind, expected):
    assert largest(f, kind) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("f", FUNCTIONS)
@given(weights=st.lists(st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)), min_size=2, max_size=5))
@settings(max_examples=8)
def test_they_are_in_the_order_of_theorem_10(f, weights):
    """Symmetric <= paired <= average, and paired <= one way, for random laws."""
    p, q = (law / law.sum() for law in torch.tensor(weights, dtype=torch.float64).T)
    symmetric, paired, average, one_way = (
        largest(f, kind, p, q) for kind in ("symmetric", "paired", "average", "one way")
    )
    # The maximisers stop within 1e-8 of the suprema, which are at most 2.
    assert -1e-8 <= symmetric <= paired + 1e-8
    assert paired <= min(average, one_way) + 1e-8
    if f == "least squares":
        # Functions of L alone: all three go to 0 together, so none of them is strictly weaker (against Theorem 2).
        both = float(((p - q).square() / (p + q)).sum())
        assert symmetric == pytest.approx(both, abs=1e-8)
        assert paired == pytest.approx(4 * both / (2 + both), abs=1e-8)
        assert average == pytest.approx(8 * both / (2 + 3 * both), abs=1e-8)


def test_estimates_are_the_objective_on_empirical_laws():
    """With as many draws of each point as the laws say, the batch estimates are the objectives themselves."""
    c = torch.tensor([0.3, -1.2, 0.5, 1.4], dtype=torch.float64)
    real, fake = (c.repeat_interleave((10 * law).round().long()) for law in (P, Q))
    for f in FUNCTIONS:
        for kind in ("symmetric", "average", "one way", "centred"):
            assert float(relativistic(real, fake, f, kind)) == pytest.approx(float(objective(c, f, kind)), rel=1e-12)
        pairs = relativistic(real, fake, f, "paired", "mvue")
        assert float(pairs) == pytest.approx(float(objective(c, f, "paired")), rel=1e-12)


@pytest.mark.parametrize("kind", ["average", "one way", "centred"])
def test_the_bias_of_least_squares_is_what_is_said_and_can_be_taken_off(kind):
    k, draws = 4, 1000
    generator = torch.Generator().manual_seed(0)
    real = 1.0 + 0.7 * torch.randn(draws, k, generator=generator, dtype=torch.float64)
    fake = -0.5 + 1.3 * torch.randn(draws, k, generator=generator, dtype=torch.float64)
    x, y = 0.49, 1.69
    # E (C - a)^2 = s^2 + (mean - a)^2.
    truth = {
        "average": 2 - (x + 0.25) - (y + 0.25),
        "one way": 2 - 2 * (x + 0.25),
        "centred": 2 - (x + 0.0625) - (y + 0.0625),
    }[kind]
    bias = {"average": -(x + y) / k, "one way": -2 * y / k, "centred": (x + y) / (2 * k)}[kind]
    for estimator, expected in (("batch", truth + bias), ("unbiased", truth)):
        values = torch.stack(
            [relativistic(a, b, kind=kind, estimator=estimator) for a, b in zip(real, fake, strict=True)]
        )
        # Five standard errors of the mean, and a bias that is larger than five.
        error = 5 * float(values.std()) / draws**0.5
        assert float(values.mean()) == pytest.approx(expected, abs=error)
        assert estimator == "unbiased" or abs(bias) > error


def test_all_pairs_have_less_variance_and_the_same_mean():
    generator = torch.Generator().manual_seed(1)
    real, fake = torch.randn(2, 2000, 8, generator=generator, dtype=torch.float64)
    pairs, every = (
        torch.stack([relativistic(a + 1, b, "log", "paired", e) for a, b in zip(real, fake, strict=True)])
        for e in ("batch", "mvue")
    )
    assert float((pairs - every).mean().abs()) < 5 * float((pairs - every).std()) / 2000**0.5
    assert float(every.var()) < 0.95 * float(pairs.var())


@pytest.mark.long
def test_a_fitted_critic_finds_the_divergence_of_two_gaussians():
    """N(0, I) and N(m, I), |m| = 1: symmetric least squares is the integral of (p - q)^2 / (p + q) along m."""
    generator = torch.Generator().manual_seed(2)
    p, q = torch.randn(2, 8000, 2, generator=generator)
    q[:, 0] += 1.0
    grid = torch.linspace(-9, 10, 20_001, dtype=torch.float64)
    a, b = ((-0.5 * (grid - m) ** 2).exp() / math.sqrt(2 * math.pi) for m in (0.0, 1.0))
    truth = float(torch.trapezoid((a - b) ** 2 / (a + b), grid))
    found = fit_critic(p, q, steps=300)
    # A lower bound in the mean; the critic's own error is a few percent of the divergence.
    assert truth - 5 * found.standard_error - 0.05 * truth < found.value < truth + 5 * found.standard_error
    same = fit_critic(p[:4000], p[4000:], steps=100)
    assert same.value < 3 * same.standard_error
    again = fit_critic(p, q, steps=300)
    assert again.value == found.value


def test_comparisons_of_gan_losses_are_these_divergences():
    generator = torch.Generator().manual_seed(3)
    real, fake = torch.randn(2, 16, generator=generator, dtype=torch.float64)
    for make, f, top in ((lsgan, "least squares", 2.0), (sgan, "log", 2 * math.log(2)), (hinge, "hinge", 2.0)):
        for compare, kind, estimator in (
            (centred, "centred", "batch"),
            (one_way, "one way", "batch"),
            (all_pairs, "paired", "mvue"),
        ):
            loss = make(compare).discriminator(real, fake)
            assert float(top - loss) == pytest.approx(float(relativistic(real, fake, f, kind, estimator)), rel=1e-12)


GOOD = torch.tensor([0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((GOOD, GOOD[:2], "log", "paired"), "real and fake must be as many"),
        ((GOOD[:1], GOOD), "real must be floats with shape"),
        ((GOOD, torch.tensor([math.nan, 1.0])), "fake holds NaN"),
        ((GOOD, GOOD, "square"), "f must be one of least squares, log, hinge"),
        ((GOOD, GOOD, "log", "pair"), "kind must be one of"),
        ((GOOD, GOOD, "log", "average", "unbiased"), "estimator 'unbiased' is known for least squares"),
        ((GOOD, GOOD, "log", "average", "mvue"), "estimator 'mvue' is for kind 'paired'"),
        (([0.1, 0.2], GOOD), "real must be a tensor"),
    ],
)
def test_refusals(arguments, message, without_type_checks):
    with pytest.raises((ValueError, TypeError), match=message):
        relativistic(*arguments)


@pytest.mark.parametrize(
    ("p", "q", "message"),
    [
        (torch.zeros(5, 2), torch.zeros(30, 2), "features_p must be floats .* n at least 20"),
        (torch.zeros(30, 2), torch.zeros(30, 3), "features must be as wide"),
        (torch.zeros(30, 2), torch.full((30, 2), math.inf), "features_q holds NaN or infinity"),
    ],
)
def test_refusals_of_features(p, q, message):
    with pytest.raises(ValueError, match=message):
        fit_critic(p, q)


def test_constant_features_are_no_disaster():
    assert fit_critic(torch.zeros(40, 2), torch.zeros(40, 2), steps=20).value == pytest.approx(0.0, abs=0.1)
