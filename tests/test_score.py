"""Reading networks, counting their calls, and the exact models against automatic differentiation of log densities."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import SDES, exact_variance, inside, vector
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import fastsde
from fastsde import VPSDE, Prediction, ScoreModel
from fastsde.score.analytic import DatasetScore, GaussianScore, MixtureScore
from fastsde.score.base import BoundModel

KINDS = ("score", "epsilon", "sample", "v_prediction", "flow_prediction")
each_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES)


def outputs(x_0, eps, alpha, sigma):
    """What each kind of network would return for this pair, and how the result calls it."""
    return {
        "score": ("score", -eps / sigma),
        "epsilon": ("epsilon", eps),
        "sample": ("x_0", x_0),
        "v_prediction": ("v", alpha * eps - sigma * x_0),
        "flow_prediction": ("velocity", eps - x_0),
    }


def assert_all_readings_agree(alpha, sigma, x_0, eps):
    x_0, eps = vector(x_0)[None], vector(eps)[None]
    made = outputs(x_0, eps, alpha, sigma)
    x_t = alpha * x_0 + sigma * eps
    # Reading x_0 from the noise or the noise from x_0 subtracts terms sigma / alpha or alpha / sigma times as large
    # as the result, each known to 1e-16; the rest is a factor for the few operations and for values up to 3.
    loss = 1e-14 * (1 + sigma / alpha + alpha / sigma)
    size = {"score": 1 / sigma, "epsilon": 1, "sample": 1, "v_prediction": alpha + sigma, "flow_prediction": 1}
    for kind in KINDS:
        read = Prediction(kind, made[kind][1], x_t, vector(alpha), vector(sigma))
        for other, (name, expected) in made.items():
            torch.testing.assert_close(getattr(read, name), expected, rtol=0, atol=loss * size[other])


NUMBER = st.floats(-3, 3)


@given(alpha=st.floats(1e-2, 1), sigma=st.floats(1e-2, 100), x_0=NUMBER, eps=NUMBER)
def test_all_kinds_of_prediction_tell_the_same(alpha, sigma, x_0, eps):
    assert_all_readings_agree(alpha, sigma, x_0, eps)


@pytest.mark.long
@each_sde
@given(share=st.floats(0, 1), x_0=NUMBER, eps=NUMBER)
def test_all_kinds_of_prediction_tell_the_same_along_a_process(sde, share, x_0, eps):
    t = inside(sde, share)
    assert_all_readings_agree(float(sde.alpha(t)), float(sde.sigma(t)), x_0, eps)


class Recorder(nn.Module):
    """A network with one parameter that remembers what it was called with and returns `scale` times the state."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5, dtype=dtype))

    def forward(self, x, t, **cond):
        self.x, self.t, self.cond = x, t, cond
        return self.scale * x


@pytest.mark.parametrize("network_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float64])
def test_network_sees_its_own_dtype_and_the_state_keeps_its_own(network_dtype, state_dtype):
    network = Recorder(network_dtype)
    t = vector(0.1, 0.7)
    x = torch.tensor([[0.5], [-2.0]], dtype=state_dtype)  # exact in every dtype
    out = ScoreModel(network, VPSDE(), "epsilon")(x, t)
    assert network.x.dtype == network_dtype
    # float16 holds 11 bits: a time in it would be off by up to 2e-4, a fifth of VP's t_min at the end.
    expected = torch.float64 if network_dtype == torch.float64 else torch.float32
    assert network.t.dtype == expected
    assert torch.equal(network.t, t.to(expected))
    assert out.epsilon.dtype == out.x_0.dtype == state_dtype
    # 0.5 x is exact in float16 too, and epsilon is read without arithmetic on it.
    assert torch.equal(out.epsilon, x * 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plain_function_sees_state_and_time_in_the_precision_of_the_state(dtype):
    seen = {}

    def score_fn(x, t, **cond):
        seen.update(x=x, t=t, **cond)
        return -x

    t, x, label = vector(1 / 3, 2 / 3), torch.ones(2, 4, dtype=dtype), torch.tensor([3, 1])
    ScoreModel(score_fn, VPSDE(), timestep=lambda t: 1000 * t - 1)(x, t, {"label": label})
    assert seen["x"].dtype == seen["t"].dtype == dtype
    # The timestep is computed in float64 and rounded once.
    assert torch.equal(seen["t"], (1000 * t - 1).to(dtype))
    assert torch.equal(seen["label"], label)


def test_alpha_and_sigma_are_taken_at_the_unrounded_time_of_the_process():
    sde, t = VPSDE(), vector(1e-3, 0.123456789)
    out = ScoreModel(Recorder(), sde, timestep=lambda t: 999 * t)(torch.ones(2, 1), t)
    assert torch.equal(out.alpha, sde.alpha(t))
    assert torch.equal(out.sigma, sde.sigma(t))


def test_output_may_hide_under_sample_as_in_diffusers():
    x, t = torch.tensor([[1.0, -2.0]]), vector(0.4)
    plain = ScoreModel(lambda x, t: -3 * x, VPSDE())(x, t)
    wrapped = ScoreModel(lambda x, t: SimpleNamespace(sample=-3 * x), VPSDE())(x, t)
    assert torch.equal(wrapped.out, plain.out)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda x, t: x[:, :1], ValueError, r"given x with shape \(2, 3\) and must return the same shape.*\(2, 1\)"),
        (lambda x, t: x[:1], ValueError, r"it returned \(1, 3\)"),
        (lambda x, t: torch.empty_like(x, device="meta"), ValueError, "given x on cpu and returned a tensor on meta"),
        (lambda x, t: x.long(), TypeError, "floating-point tensor; it returned a tensor of torch.int64"),
        (lambda x, t: None, TypeError, "it returned NoneType"),
        (lambda x, t: (), TypeError, "it returned tuple"),
        (lambda x, t: SimpleNamespace(sample=None), TypeError, "it returned NoneType"),
    ],
)
def test_wrong_outputs_are_refused(wrong, error, message):
    with pytest.raises(error, match=message):
        ScoreModel(wrong, VPSDE())(torch.zeros(2, 3), vector(0.1, 0.2))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: ScoreModel(3, VPSDE()), TypeError, "must be callable.*got int"),
        (lambda: ScoreModel(Recorder(), VPSDE(), "noise"), ValueError, "one of score, epsilon, sample.*'noise'"),
        (lambda: ScoreModel(Recorder(), VPSDE(), data_range=(1.0, 1.0)), ValueError, "low < high"),
        (lambda: GaussianScore(VPSDE(), torch.zeros(2), -torch.ones(2)), ValueError, "std >= 0"),
        (lambda: GaussianScore(VPSDE(), torch.zeros(2), torch.ones(3)), ValueError, r"\(2,\) and \(3,\)"),
        (lambda: DatasetScore(VPSDE(), torch.zeros(0, 2)), ValueError, "N >= 1"),
        (lambda: mixture(VPSDE(), weights=vector(0.5, 0.4)), ValueError, "must be a distribution"),
        (lambda: mixture(VPSDE(), weights=vector(1.0)), ValueError, r"shapes must be \(K,\)"),
        (lambda: mixture(VPSDE(), bases=torch.ones(2, 3, 2)), ValueError, "orthonormal"),
        (lambda: mixture(VPSDE(), variances=-torch.ones(2, 2)), ValueError, "must not be negative"),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_refusals_name_what_came_and_what_is_allowed(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_calls_are_counted_per_active_row():
    class Doubled(ScoreModel):
        calls = 2

    active = torch.tensor([True, False, True])
    x, t = torch.zeros(3, 2), vector(0.1, 0.2, 0.3)
    for model, per_call in ((ScoreModel(Recorder(), VPSDE()), 1), (Doubled(Recorder(), VPSDE()), 2)):
        bound = BoundModel(model, {}, active)
        for calls in (1, 2, 3):
            bound(x, t)
            assert bound.nfe.tolist() == [calls * per_call, 0, calls * per_call]


def mixture(sde, **changes):
    """Two components in three dimensions, each spread in its own plane and a little in every direction."""
    generator = torch.Generator().manual_seed(1)
    bases = torch.linalg.qr(torch.randn(2, 3, 2, dtype=torch.float64, generator=generator))[0]
    parts = {
        "weights": vector(0.3, 0.7),
        "means": torch.tensor([[1.0, -0.5, 0.2], [-1.0, 0.3, 0.8]], dtype=torch.float64),
        "bases": bases,
        "variances": torch.tensor([[0.5, 0.01], [0.2, 0.3]], dtype=torch.float64),
        "floor": 0.04,
    }
    return MixtureScore(sde, **parts | changes)


def covariances(model):
    eye = torch.eye(model.means.shape[1], dtype=torch.float64)
    return model.bases @ torch.diag_embed(model.variances) @ model.bases.mT + model.floor * eye


def noised(sde, points, share):
    """The points carried to a share of the process's range with fixed noise; returns x_t and t, a row per point."""
    noise = torch.randn(points.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    t = inside(sde, share).expand(len(points))
    return sde.marginal(points, t, noise), t


def gradient(log_density, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(log_density(x).sum(), x)[0]


def assert_scores_close(actual, expected, x, sigma):
    """Exact scores divide a difference of numbers of the size of x by sigma^2: they keep the digits of x / sigma^2."""
    loss = 1e-14 * float((1 + x.abs().max()) / sigma**2)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=loss)


@each_sde
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_mixture_score_is_the_gradient_of_its_log_density(sde, share):
    model = mixture(sde)
    full = MixtureScore.from_covariances(sde, model.weights, model.means, covariances(model))
    x, t = noised(sde, model.draw(16, torch.Generator().manual_seed(3)), share)
    alpha, sigma = sde.alpha(t)[0], sde.sigma(t)[0]
    explicit = MixtureSameFamily(
        Categorical(model.weights),
        MultivariateNormal(
            alpha * model.means, alpha**2 * covariances(model) + sigma**2 * torch.eye(3, dtype=torch.float64)
        ),
    )
    expected = gradient(explicit.log_prob, x)
    assert_scores_close(model(x, t).score, expected, x, sigma)
    assert_scores_close(full(x, t).score, expected, x, sigma)


@each_sde
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_dataset_score_is_the_gradient_of_its_log_density(sde, share):
    points = torch.randn(7, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    model = DatasetScore(sde, points)
    assert model.event_shape == (2, 3)
    assert model.data_range == (float(points.min()), float(points.max()))
    x, t = noised(sde, points, share)
    alpha, sigma = sde.alpha(t)[0], sde.sigma(t)[0]

    def log_density(x):
        distance = (x[:, None] - alpha * points).square().flatten(2).sum(2)
        return torch.logsumexp(-distance / (2 * sigma**2), 1)

    assert_scores_close(model(x, t).score, gradient(log_density, x), x, sigma)


@each_sde
@given(share=st.floats(0, 1), mean=NUMBER, std=st.floats(0.1, 2), x=NUMBER)
def test_denoised_gaussian_is_the_posterior_mean(sde, share, mean, std, x):
    t = inside(sde, share)
    alpha, variance = sde.alpha(t), exact_variance(sde, std, t)
    x = alpha * mean + variance.sqrt() * vector(x)
    # E[x_0 | x_t] by regression of x_0 on x_t: Cov(x_0, x_t) / Var(x_t) = alpha std^2 / variance.
    posterior = mean + alpha * std**2 / variance * (x - alpha * mean)
    denoised = GaussianScore(sde, vector(mean), vector(std))(x[None], t).x_0[0]
    # (x + sigma^2 score) / alpha cancels to numbers of size x / alpha, at most 1 / alpha(t_max) = 1e3 (rectified flow).
    torch.testing.assert_close(denoised, posterior, rtol=1e-12, atol=1e-14 * float((1 + x.abs()) / alpha))


def test_dataset_denoises_to_its_nearest_point_at_low_noise():
    points = torch.tensor([[0.0, 1.0], [1.0, 0.0], [-1.0, -1.0]], dtype=torch.float64)
    sde = VPSDE()
    x, t = noised(sde, points, 0.0)
    # sigma = 0.01 and points 1.4 apart: the other weights are exp(-1e4), which is 0.
    torch.testing.assert_close(DatasetScore(sde, points)(x, t).x_0, points, rtol=0, atol=1e-13)


def test_draws_have_the_moments_they_claim():
    model, n = mixture(VPSDE()), 20_000
    x = model.draw(n, torch.Generator().manual_seed(5))
    mean, covariance = model.moments()
    products = torch.einsum("ni,nj->nij", x - mean, x - mean)
    # 5 standard errors, with the spread of the products themselves for those of the covariance.
    assert ((x.mean(0) - mean).abs() < 5 * (covariance.diagonal() / n).sqrt()).all()
    assert ((products.mean(0) - covariance).abs() < 5 * products.std(0) / math.sqrt(n)).all()


def test_moments_follow_the_law_of_total_variance():
    model = mixture(VPSDE())
    w, m, c = model.weights, model.means, covariances(model)
    second = sum(w[k] * (c[k] + torch.outer(m[k], m[k])) for k in range(2))
    mean, covariance = model.moments()
    torch.testing.assert_close(mean, w[0] * m[0] + w[1] * m[1], rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(covariance, second - torch.outer(mean, mean), rtol=1e-13, atol=1e-14)


def test_a_network_that_works_in_place_does_not_change_its_conditioning():
    seen = []

    def network(x, t, scale):
        seen.append(float(scale[0]))
        scale.mul_(2)
        return -x

    fastsde.sample(network, VPSDE(), shape=(2, 2), solver=fastsde.DDIM(3), cond={"scale": torch.ones(2)})
    assert seen == [1.0] * 4
