"""Distances between sets of features: closed forms, other people's formulas, unbiasedness."""

import math

import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastsde.evaluation.statistics import (
    Moments,
    frechet,
    frechet_distance,
    inception_score,
    kernel_distance,
    manifold,
    sliced_wasserstein,
)


def gaussian(n, mean, root, generator):
    return mean + torch.randn(n, len(mean), generator=generator, dtype=torch.float64) @ root.T


def law(seed, d):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5
    return torch.randn(d, generator=generator, dtype=torch.float64), root


@given(st.lists(st.integers(1, 40), min_size=2, max_size=6), st.sampled_from([0.0, 1e6]))
def test_streamed_moments_are_those_of_the_whole(sizes, offset):
    x = torch.randn(sum(sizes), 5, generator=torch.Generator().manual_seed(sum(sizes)), dtype=torch.float64) + offset
    moments = Moments(5)
    for part in x.split(sizes):
        moments.update(part)
    # Of the mean, rounding at its own size; of the covariance at the size of the spread: sums of squares would lose
    # all digits at an offset of 1e6.
    torch.testing.assert_close(moments.mean, x.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moments.covariance, x.T.cov(), rtol=1e-7, atol=1e-9)
    assert moments.n == len(x)


def test_frechet_distance_of_commuting_gaussians_in_closed_form():
    vectors = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    a, b = torch.tensor([4.0, 1, 9, 0.25, 1, 16]).double(), torch.tensor([1.0, 1, 4, 1, 0, 9]).double()
    mean = torch.arange(6.0).double()
    found = frechet_distance(mean, vectors * a @ vectors.T, mean + 0.5, vectors * b @ vectors.T)
    expected = 6 * 0.25 + float((a.sqrt() - b.sqrt()).square().sum())
    assert found == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(("d", "near"), [(3, False), (64, False), (64, True)])
def test_frechet_distance_agrees_with_other_formulas(d, near):
    """pytorch-fid takes the root of S_1 S_2 by SciPy, torchmetrics its eigenvalues; 1e-6 is what the issue asks for."""
    (m_1, r_1), (m_2, r_2) = law(0, d), law(1, d)
    if near:
        m_2, r_2 = m_1 + 1e-2, r_1 + 1e-2 * r_2
    # Without the identity the smallest eigenvalues of the product are lost to rounding in both other formulas.
    s_1, s_2 = (r @ r.T + torch.eye(d, dtype=torch.float64) for r in (r_1, r_2))
    shared = float((m_1 - m_2).square().sum() + s_1.trace() + s_2.trace())
    root = scipy.linalg.sqrtm((s_1 @ s_2).numpy())
    found = frechet_distance(m_1, s_1, m_2, s_2)
    assert found == pytest.approx(shared - 2 * float(root.trace().real), rel=1e-6)
    assert found == pytest.approx(shared - 2 * float(torch.linalg.eigvals(s_1 @ s_2).sqrt().real.sum()), rel=1e-6)


def test_frechet_distance_is_that_of_torchmetrics_on_the_same_features():
    fid = pytest.importorskip("torchmetrics.image.fid")

    class Flat(torch.nn.Module):
        num_features = 12

        def forward(self, x):
            return x.flatten(1)

    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.rand(200, 3, 2, 2, generator=generator) ** p for p in (1, 2))
    theirs = fid.FrechetInceptionDistance(Flat(), normalize=True, input_img_size=(3, 2, 2)).set_dtype(torch.float64)
    for images, is_real in ((real, True), (fake, False)):
        theirs.update(images, real=is_real)
    a, b = Moments.of(real.flatten(1)), Moments.of(fake.flatten(1))
    found = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    assert found == pytest.approx(float(theirs.compute()), rel=1e-6)


@pytest.mark.parametrize(("distance", "ratio"), [(0.02, (1, 1.8)), (1.0, (0.8, 1.2))])
def test_extrapolation_takes_off_the_bias_and_the_bootstrap_tells_the_error(distance, ratio):
    """Near, where bias is not small beside spread and the bootstrap too careful; and apart."""
    d, n = 8, 400
    (m_1, r_1), (m_2, r_2) = law(2, d), law(3, d)
    m_2, r_2 = m_1 + distance * m_2, r_1 + 2 * distance * r_2
    exact = frechet_distance(m_1, r_1 @ r_1.T, m_2, r_2 @ r_2.T)
    generator = torch.Generator().manual_seed(0)
    runs = [frechet(gaussian(n, m_1, r_1, generator), m_2, r_2 @ r_2.T, draws=30) for _ in range(150)]
    value, extrapolated, error = (
        torch.tensor([getattr(r, name) for r in runs]) for name in ("value", "extrapolated", "error")
    )
    if distance < 1:
        assert float(value.mean() - exact) > 4 * float(value.std()) / 150**0.5
    # Three standard errors of a mean over 150 runs.
    assert abs(float(extrapolated.mean() - exact)) < 3 * float(extrapolated.std()) / 150**0.5
    # The spread over 150 runs has itself a relative error of 6 %, each bootstrap of 30 one of 13 %.
    assert ratio[0] < float(error.mean() / value.std()) < ratio[1]


def test_kernel_distance_by_its_definition():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(7, 3, generator=generator, dtype=torch.float64) for _ in range(2))

    def k(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    same = sum(k(s[i], s[j]) for s in (x, y) for i in range(7) for j in range(7) if i != j) / 42
    cross = sum(k(a, b) for a in x for b in y) / 49
    found, error = kernel_distance(x, y)
    assert found == pytest.approx(same - 2 * cross, rel=1e-12)
    assert math.isnan(error)


def test_kernel_distance_of_equal_laws_is_unbiased_and_its_error_honest():
    generator = torch.Generator().manual_seed(1)
    runs = [
        kernel_distance(*(torch.randn(200, 4, generator=generator, dtype=torch.float64) for _ in range(2)), block=20)
        for _ in range(200)
    ]
    values, errors = torch.tensor(runs).T
    # Three standard errors of the mean; the spread over 200 runs is known to 5 %.
    assert abs(float(values.mean())) < 3 * float(values.std()) / 200**0.5
    assert float(errors.mean()) == pytest.approx(float(values.std()), rel=0.15)


def test_inception_score_of_sure_and_of_clueless_classifiers():
    sure = 100 * torch.eye(5).repeat(40, 1)
    assert inception_score(sure, splits=1)[0] == pytest.approx(5, rel=1e-6)
    assert inception_score(sure[:1].repeat(40, 1))[0] == pytest.approx(1, rel=1e-6)
    assert inception_score(torch.zeros(40, 5))[0] == pytest.approx(1, rel=1e-6)


def test_classes_in_turn_are_no_trap_for_the_inception_score():
    """Ten sure classes in turn, ten splits: every tenth row is one class alone."""
    in_turn = 100 * torch.eye(10).repeat(200, 1)
    score, _ = inception_score(in_turn)
    # Splits of 200 rows hold classes unevenly: about (10 - 1) / (2 * 200) of the entropy is lost.
    assert score == pytest.approx(10, rel=0.05)


def test_precision_and_recall_of_constructed_sets():
    """Two clusters far apart; one set has half of its points in each, the other all in the first."""
    generator = torch.Generator().manual_seed(0)
    first, second, more = (torch.randn(200, 2, generator=generator) for _ in range(3))
    both, one = torch.cat([first, second + 100]), torch.cat([more, more + 1e-3])
    found = manifold(one, both)
    assert found.precision > 0.95  # all of it lies where the reference is, but for points outside the hull
    assert 0.4 < found.recall <= 0.5  # it covers one of two clusters
    assert 0.4 < found.coverage <= 0.5
    reverse = manifold(both, one)
    assert 0.4 < reverse.precision <= 0.5
    assert reverse.recall > 0.9
    far = manifold(first + 1000, first)
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)


def test_a_ball_reaches_to_the_kth_neighbour():
    """Points 0 .. 9 on a line, k = 2: balls of radius 1 inside, 2 at the ends. 4.5 is in those of 4 and 5."""
    reference = torch.arange(10.0)[:, None]
    x = torch.tensor([[4.5], [4.5], [50.0], [60.0]])
    found = manifold(x, reference, k=2)
    assert found.precision == 0.5
    assert found.density == pytest.approx((2 + 2) / 4 / 2)
    assert found.coverage == pytest.approx(2 / 10)  # 4 and 5
    assert found.recall == 1  # radii of the samples reach 45 and more


def test_sliced_distance_in_one_dimension_is_that_of_quantiles():
    """{0, 1} and {0, 1, 2}, in sixths: 0 0 0 1 1 1 and 0 0 1 1 2 2."""
    found = sliced_wasserstein(torch.tensor([[1.0], [0.0]]), torch.tensor([[2.0], [0.0], [1.0]]))
    assert found == pytest.approx((3 / 6) ** 0.5, rel=1e-12)


def test_sliced_distance_of_a_shift():
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shift = torch.tensor([1.0, -2.0, 2.0], dtype=torch.float64)
    # A projection of the shift has mean square |shift|^2 / d; 20,000 directions tell it to 0.6 %.
    assert sliced_wasserstein(x, x + shift, projections=20_000) == pytest.approx(3 / 3**0.5, rel=0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: frechet(x, torch.zeros(4), torch.eye(4)), "8 samples are too few for 4 features: at least 10"),
        (lambda x: frechet(x * math.nan, torch.zeros(4), torch.eye(4)), "8 of 8 rows of x are not finite"),
        (lambda x: frechet_distance(x[0], torch.eye(4), torch.zeros(3), torch.eye(3)), "must agree in dimension"),
        (lambda x: frechet_distance(x[0] / 0, torch.eye(4), torch.zeros(4), torch.eye(4)), "must be finite"),
        (lambda x: kernel_distance(x, x[:, :3]), "equal width"),
        (lambda x: kernel_distance(x, x[0]), r"shape \(n, d\)"),
        (lambda x: manifold(x, x[:5]), "more than 5 rows; got 8 and 5"),
        (lambda x: inception_score(x), "10 splits need as many samples"),
        (lambda x: sliced_wasserstein(x, x[:1]), "at least 2 rows"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))
