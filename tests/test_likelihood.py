"""Log-likelihoods against closed forms."""

import math

import pytest
import torch

import fastsde
from fastsde import EDM, VPSDE, Grid, RectifiedFlow, ScoreModel, Status
from fastsde.score import GaussianScore, MixtureScore

pytestmark = pytest.mark.long
BITS = math.log(2)


def mixture(sde, d=4):
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(3, d, dtype=torch.float64, generator=generator)
    spread = torch.rand(3, d, dtype=torch.float64, generator=generator) * 0.2 + 0.02
    turn = torch.linalg.qr(torch.randn(3, d, d, dtype=torch.float64, generator=generator)).Q
    covariances = turn @ torch.diag_embed(spread) @ turn.mT
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    return MixtureScore.from_covariances(sde, weights, means, covariances), covariances


def exact_log_prob(model, covariances, x):
    """log p at t_min: the mixture blurred by the process."""
    t = torch.tensor([model.sde.t_min], dtype=torch.float64)
    alpha, variance = float(model.sde.alpha(t)), float(model.sde.sigma(t)) ** 2
    eye = variance * torch.eye(x.shape[1], dtype=torch.float64)
    parts = [
        weight.log() + torch.distributions.MultivariateNormal(alpha * mean, alpha**2 * c + eye).log_prob(x)
        for weight, mean, c in zip(model.weights, model.means, covariances, strict=True)
    ]
    return torch.stack(parts).logsumexp(0)


# The prior at t_max is wider than these by the data's own share, alpha(t_max)^2: 4e-5 of the variance for VP, 1e-6 for
# the flow and 1 / 6400 for EDM.
@pytest.mark.parametrize("sde", [VPSDE(), EDM(), RectifiedFlow()], ids=lambda sde: type(sde).__name__)
def test_exact_trace_on_a_mixture(sde):
    model, covariances = mixture(sde)
    x = model.draw(40, torch.Generator().manual_seed(1))
    r = fastsde.log_likelihood(model, x=x, exact=True)
    error = r.bits_per_dim + exact_log_prob(model, covariances, x) / 4 / BITS
    # The requirement: 0.01 bits per dimension. Measured 0.002 or less.
    assert abs(float(error.mean())) < 0.005
    assert float(error.square().mean().sqrt()) < 0.01
    assert (r.standard_error == 0).all()
    torch.testing.assert_close(r.log_prob, -r.bits_per_dim * 4 * BITS)
    tight = fastsde.log_likelihood(model, x=x, exact=True, rtol=1e-6, atol=1e-6)
    error = tight.bits_per_dim + exact_log_prob(model, covariances, x) / 4 / BITS
    # What is left is the prior (up to alpha_T |x| |y_T| / sigma_T = 0.007 bits for VP in 4 dimensions).
    assert float(error.abs().max()) < 0.012


@pytest.mark.parametrize("gaussian", [False, True], ids=["rademacher", "gaussian"])
def test_the_standard_error_is_honest(gaussian):
    model, _ = mixture(VPSDE())
    x = model.draw(300, torch.Generator().manual_seed(2))
    r = fastsde.log_likelihood(model, x=x, probes=16, gaussian=gaussian, batch_size=300)
    exact = fastsde.log_likelihood(model, x=x, exact=True, batch_size=300)
    z = (r.bits_per_dim - exact.bits_per_dim) / r.standard_error
    # 300 cases know a rate of 0.95 to 0.013. Student's t with 15 degrees of freedom covers 95 % within 2.13; the
    # skewness of the estimates at 16 probes costs some of it (measured 0.93 and 0.91).
    covered = float((z.abs() < 2.13).double().mean())
    assert 0.87 < covered < 0.99
    assert abs(float(z.mean())) < 0.35


def test_rademacher_probes_are_exact_on_diagonal_jacobians():
    sde = VPSDE()
    model = GaussianScore(sde, torch.zeros(6, dtype=torch.float64), torch.linspace(0.1, 1, 6, dtype=torch.float64))
    x = torch.randn(10, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * model.std
    # v^T diag(j) v = sum j for signs: no variance at all, up to roundings.
    r = fastsde.log_likelihood(model, x=x, probes=3, rtol=1e-6, atol=1e-6)
    exact = fastsde.log_likelihood(model, x=x, exact=True, rtol=1e-6, atol=1e-6)
    # The columns of the probes enter the norm that chooses the steps: equal up to the tolerance.
    torch.testing.assert_close(r.log_prob, exact.log_prob, rtol=0, atol=2e-4)
    assert float(r.standard_error.max()) < 1e-12
    t = torch.tensor([sde.t_min], dtype=torch.float64)
    std = (sde.alpha(t) ** 2 * model.std**2 + sde.sigma(t) ** 2).sqrt()
    truth = torch.distributions.Normal(0, std).log_prob(x).sum(1)
    # alpha(t_max)^2 = 4e-5 of the variance of y_T, on sums of six squares.
    torch.testing.assert_close(r.log_prob, truth, rtol=0, atol=2e-3)


def test_images_and_grids_and_batches_agree():
    sde = VPSDE()
    model = GaussianScore(sde, torch.zeros(1, 2, 3), torch.full((1, 2, 3), 0.5))
    x = 0.5 * torch.randn(7, 1, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = fastsde.log_likelihood(model, x=x)
    parts = fastsde.log_likelihood(model, x=x, batch_size=2)
    # Rows are independent; only the order of sums differs.
    torch.testing.assert_close(whole.log_prob, parts.log_prob, rtol=1e-10, atol=1e-10)
    assert whole.nfe.tolist() == parts.nfe.tolist()
    grid = fastsde.log_likelihood(model, x=x, controller=Grid.log_snr(sde, 40), tableau=fastsde.RK4)
    assert grid.nfe.tolist() == [160] * 7
    # Fourth order, steps of 0.24 in log rho: errors below 1e-3 nats; the adaptive run's tolerance is 1e-3 as well.
    torch.testing.assert_close(grid.log_prob, whole.log_prob, rtol=0, atol=0.02)


def test_dequantised_bits_of_uniform_bins():
    """Gaussian data in bins of width w: -log2 of the probability of a bin, from above by Jensen, close for small w."""
    sde = VPSDE()
    std, width = 0.4, 0.02
    model = GaussianScore(sde, torch.zeros(3, dtype=torch.float64), torch.full((3,), std, dtype=torch.float64))
    x = (
        torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) * std / width
    ).round() * width
    r = fastsde.log_likelihood(model, x=x, bin_width=width, draws=16, exact=True)
    t = torch.tensor([sde.t_min], dtype=torch.float64)
    normal = torch.distributions.Normal(0, float((sde.alpha(t) ** 2 * std**2 + sde.sigma(t) ** 2).sqrt()))
    truth = -(normal.cdf(x + width / 2) - normal.cdf(x - width / 2)).log().sum(1) / 3 / BITS
    z = (r.bits_per_dim - truth) / r.standard_error
    # 20 draws of a t with 15 degrees of freedom: their mean is known to 0.24, and their size to a fifth. The bias of
    # Jensen's inequality, (w / std)^2 / 24 nats, is 1e-4.
    assert abs(float(z.mean())) < 1.2
    assert 0.5 < float(z.square().mean().sqrt()) < 1.9
    assert float((r.bits_per_dim - truth).abs().max()) < 0.05


def test_failures_are_nan_and_alone():
    def network(x, t):
        return torch.where(x.sum(1, keepdim=True) > 100, torch.nan, 1.0) * torch.tanh(x)

    model = ScoreModel(network, VPSDE(), "sample", event_shape=(2,))
    x = torch.tensor([[0.1, 0.2], [90.0, 90.0]], dtype=torch.float64)
    r = fastsde.log_likelihood(model, x=x)
    assert r.status[0] == Status.SUCCESS
    assert r.status[1] == Status.NON_FINITE
    assert torch.isfinite(r.log_prob).tolist() == torch.isfinite(r.bits_per_dim).tolist() == [True, False]


def test_labels_travel_with_their_sample():
    sde = VPSDE()
    std = torch.tensor([0.2, 0.9], dtype=torch.float64)

    def network(x, t, label):
        alpha, sigma = sde.alpha(t.double())[:, None], sde.sigma(t.double())[:, None]
        variance = alpha**2 * std[label][:, None] ** 2 + sigma**2
        return -x / variance

    model = ScoreModel(network, sde, event_shape=(3,))
    x = torch.full((4, 3), 0.3, dtype=torch.float64)
    r = fastsde.log_likelihood(model, x=x, exact=True, cond={"label": torch.tensor([0, 1, 1, 0])}, batch_size=1)
    truth = torch.distributions.Normal(0, std).log_prob(torch.tensor(0.3)) * 3
    # The blur at t_min is 1e-4 of variances 0.04 and 0.81.
    torch.testing.assert_close(r.log_prob, truth[[0, 1, 1, 0]], rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probes": 0}, "probes must be an integer of at least 1"),
        ({"draws": 3}, "draws is the number of dequantisations; it needs bin_width"),
        ({"bin_width": 0.0}, "bin_width must be a positive"),
        ({"exact": 1}, "exact must be True or False"),
        ({"x": torch.ones(2, 5)}, r"samples have shape \(2,\); got \(5,\)"),
        ({"x": None}, "x must|shape"),
        ({"rtol": -1.0}, "rtol must be a positive"),
        ({"tableau": "RK4"}, "tableau must be a fastsde.Tableau"),
        ({"cond": {"y": torch.ones(2)}}, r"cond\['y'\] must be a tensor with leading axis n=3; got \(2,\)"),
        ({"controller": Grid([2.0, 0.001])}, "grid must lie within"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refusals(change, message):
    def never(x, t):
        raise AssertionError("called")

    model = ScoreModel(never, VPSDE(), event_shape=(2,))
    with pytest.raises((ValueError, TypeError), match=message):
        fastsde.log_likelihood(model, **({"x": torch.ones(3, 2)} | change))


@pytest.mark.parametrize(
    "network",
    [torch.no_grad()(lambda x, t: -x), lambda x, t: -x.detach(), lambda x, t: torch.ones_like(x)],
    ids=["no_grad", "detach", "constant"],
)
def test_a_network_without_gradients_is_refused(network):
    # Its divergence would be taken for zero, and the likelihood would be wrong without a word.
    with pytest.raises(ValueError, match="must be differentiable in x"):
        fastsde.log_likelihood(network, VPSDE(), x=torch.ones(3, 2))


def test_numbers_are_events_too():
    model = ScoreModel(
        lambda x, t: -x / (0.25 * VPSDE().alpha(t.double()) ** 2 + VPSDE().sigma(t.double()) ** 2), VPSDE()
    )
    x = torch.tensor([0.1, -0.4, 0.7], dtype=torch.float64)
    r = fastsde.log_likelihood(model, x=x, exact=True)
    # Blur of 1e-4 on a variance of 0.25, tolerance 1e-4.
    torch.testing.assert_close(r.log_prob, torch.distributions.Normal(0, 0.5).log_prob(x), rtol=0, atol=2e-3)


def test_an_error_estimate_is_needed_to_choose_steps():
    model = GaussianScore(VPSDE(), torch.zeros(2), torch.ones(2))
    with pytest.raises(ValueError, match="RK4 has no error estimate to choose steps by; give controller=Grid"):
        fastsde.log_likelihood(model, x=torch.ones(3, 2), tableau=fastsde.RK4)
