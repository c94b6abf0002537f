"""Linear inverse problems: guided scores against closed-form posteriors, operators against matrices, resampling."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import SDES, GivenNoise, assert_independent, bind, draw, exact_variance, fitted_order, inside, vector
from stubs import Recorder, never
from torch import nn
from torch.distributions import MultivariateNormal

import fastsde
from fastsde import DDIM, VESDE, VPSDE, Ancestral, EulerMaruyama, ExponentialPC, Grid, ScoreModel
from fastsde.score import GaussianScore, MixtureScore
from fastsde.score.inverse import DPS, MMPS, PiGDM, Projection
from fastsde.score.operators import Grayscale, Linear, LinearOperator, Mask
from fastsde.solvers.resampling import Resampling

NOISE = 0.1
KNOWN = torch.tensor([1, 0, 1, 0, 0])
each_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES)


def covariance(d, seed=0):
    """Correlated, with standard deviations from 0.2 to 0.6."""
    basis = torch.linalg.qr(draw(d, d, seed=seed))[0]
    return basis * torch.linspace(0.2, 0.6, d, dtype=torch.float64) ** 2 @ basis.mT


def posterior(model, covariances, a, y, noise=NOISE):
    """The mixture that the data become given y = a x + noise: Bayes' rule for each component."""
    means, narrowed, evidence = [], [], []
    for mean, c in zip(model.means, covariances, strict=True):
        precision = torch.linalg.inv(c) + a.mT @ a / noise**2
        narrowed.append(torch.linalg.inv(precision))
        means.append(mean + narrowed[-1] @ a.mT @ (y - a @ mean) / noise**2)
        seen = a @ c @ a.mT + noise**2 * torch.eye(len(a), dtype=torch.float64)
        evidence.append(MultivariateNormal(a @ mean, seen).log_prob(y))
    weights = (model.weights.log() + torch.stack(evidence)).softmax(0)
    narrowed = torch.stack([(c + c.mT) / 2 for c in narrowed])
    return MixtureScore.from_covariances(model.sde, weights, torch.stack(means), narrowed)


def gaussian(sde, d=5):
    c = covariance(d)[None]
    return MixtureScore.from_covariances(sde, vector(1.0), draw(1, d, seed=3), c), c


def mixture(sde, d=5):
    """Three components that a measurement of some elements does not tell apart."""
    c = torch.stack([covariance(d, seed) for seed in range(3)])
    means = draw(3, d, seed=5) * torch.where(KNOWN == 1, 0.3, 1.0)
    return MixtureScore.from_covariances(sde, vector(0.2, 0.3, 0.5), means, c), c


def dense(a):
    """The operator of a matrix, by its forward map alone."""
    return Linear(lambda x: x @ a.mT.to(x), (a.shape[1],))


A = draw(3, 5, seed=1) / 2
Y = vector(0.4, -0.6, 0.3)


def cond(y, n):
    return {"measurement": y.expand(n, *y.shape)}


# ---- Gaussian data: MMPS is exact ------------------------------------------------------------------------------------


@each_sde
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.7, 1.0])
def test_mmps_is_the_posterior_score_on_gaussian_data(sde, share):
    model, c = gaussian(sde)
    exact = posterior(model, c, A, Y)
    t = inside(sde, share).expand(8)
    x = sde.marginal(exact.draw(8, torch.Generator().manual_seed(0)), t, draw(8, 5))
    guided = MMPS(model, dense(A), NOISE, iterations=10)(x, t, cond(Y, 8))
    # V = (1 + sigma^2 H) sigma^2 / alpha^2 loses the digits of (sigma / alpha)^2, 1e6 for a flow at its start; M^{-1}
    # divides by 0.1^2: 1e-16 * 1e6 / 1e-2.
    torch.testing.assert_close(guided.x_0, exact(x, t).x_0, rtol=1e-6, atol=1e-6)
    # The score is that error times alpha / sigma^2.
    loss = max(1.0, float((sde.alpha(t) / sde.sigma(t) ** 2)[0]))
    torch.testing.assert_close(guided.score, exact(x, t).score, rtol=1e-6, atol=1e-6 * loss)


def test_mmps_is_exact_for_masks_and_colours_of_images():
    sde, shape = VPSDE(), (3, 2, 2)
    mean, std = 0.3 * draw(*shape), torch.linspace(0.2, 0.6, 12, dtype=torch.float64).reshape(shape)
    model, c = GaussianScore(sde, mean, std), torch.diag_embed(std.flatten() ** 2)[None]
    flat = MixtureScore.from_covariances(sde, vector(1.0), mean.reshape(1, 12), c)
    eye, t = torch.eye(12, dtype=torch.float64).reshape(12, *shape), vector(0.1, 0.5, 0.9)
    known = torch.tensor([[[1, 0], [0, 1]]])
    for operator, y in ((Grayscale(3), draw(1, 2, 2)), (Mask(known), draw(*shape))):
        a = operator(eye).reshape(12, -1).mT
        observed = y if isinstance(operator, Grayscale) else torch.where(known == 1, y, torch.zeros_like(y))
        exact, x = posterior(flat, c, a, observed.flatten()), draw(3, *shape, seed=2)
        guided = MMPS(model, operator, NOISE, iterations=12)(x, t, cond(y, 3)).x_0
        # A few roundings, through M^{-1} of condition below 100.
        torch.testing.assert_close(guided.flatten(1), exact(x.flatten(1), t).x_0, rtol=1e-9, atol=1e-9)


@pytest.mark.long
def test_the_probability_flow_of_mmps_carries_the_posterior():
    # On Gaussian data the flow is affine: the images of 0 and of a basis say mean and covariance without noise.
    sde = VPSDE()
    model, c = gaussian(sde)
    exact = posterior(model, c, A, Y)
    mean, spread = exact.moments()
    ends = vector(sde.t_max, sde.t_min)
    alpha, variance = sde.alpha(ends), sde.sigma(ends) ** 2
    eye = torch.eye(5, dtype=torch.float64)
    start, end = (alpha[k] ** 2 * spread + variance[k] * eye for k in (0, 1))
    x_init = alpha[0] * mean + torch.cat([torch.zeros(1, 5), torch.linalg.cholesky(start).mT]).double()
    wrapped = MMPS(model, dense(A), NOISE, Y, iterations=10)
    solver = fastsde.ProbabilityFlow()
    out = fastsde.sample(wrapped, x_init=x_init, solver=solver, rtol=1e-4, atol=1e-6, denoise=False).samples
    lines = out[1:] - out[:1]
    # Errors of some tens of steps, each below rtol of a state of size 1.
    torch.testing.assert_close(out[0], alpha[1] * mean, rtol=0, atol=1e-3)
    torch.testing.assert_close(lines.mT @ lines, end, rtol=0, atol=1e-3)


def test_pigdm_is_exact_on_white_data():
    sde, mean, t, x = VPSDE(), draw(1, 5, seed=3), vector(0.05, 0.5, 1.0), draw(3, 5)
    c = 0.5**2 * torch.eye(5, dtype=torch.float64)[None]
    model = MixtureScore.from_covariances(sde, vector(1.0), mean, c)
    guided = PiGDM(model, dense(A), NOISE, data_std=0.5)(x, t, cond(Y, 3)).x_0
    # A few roundings, through M^{-1} of condition below 100.
    torch.testing.assert_close(guided, posterior(model, c, A, Y)(x, t).x_0, rtol=1e-9, atol=1e-9)


# ---- mixtures: biased, but in the right direction --------------------------------------------------------------------


OBSERVED = vector(0.9, 0.0, -0.8, 0.0, 0.0)
"""Two standard deviations from the mean of the data: elsewhere no guidance may do better than DPS, which overshoots."""


def wrappers(model):
    mask = Mask(KNOWN)
    return {
        "Projection": Projection(model, mask),
        "DPS": DPS(model, mask, NOISE),
        "PiGDM": PiGDM(model, mask, NOISE),
        "MMPS": MMPS(model, mask, NOISE, iterations=2),
    }


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_guided_scores_of_a_mixture_are_closer_to_its_posterior(share):
    sde, n = VPSDE(), 400
    model, c = mixture(sde)
    exact = posterior(model, c, torch.eye(5, dtype=torch.float64)[KNOWN == 1], OBSERVED[KNOWN == 1])
    t = inside(sde, share).expand(n)
    x = sde.marginal(exact.draw(n, torch.Generator().manual_seed(0)), t, draw(n, 5))
    wanted, found = exact(x, t).x_0, {"none": model(x, t).x_0}
    found |= {name: w(x, t, cond(OBSERVED, n)).x_0 for name, w in wrappers(model).items()}
    error = {name: float((x_0 - wanted).square().mean().sqrt()) for name, x_0 in found.items()}
    for name in ("Projection", "DPS", "PiGDM"):
        assert error["MMPS"] < error[name] < error["none"], name


def test_samples_of_a_mixture_move_towards_its_posterior():
    model, c = mixture(VPSDE())
    exact = posterior(model, c, torch.eye(5, dtype=torch.float64)[KNOWN == 1], OBSERVED[KNOWN == 1])
    (mean, spread), n = exact.moments(), 400
    options = {"n": n, "batch_size": n, "solver": ExponentialPC(steps=25), "dtype": torch.float64}
    rows = cond(OBSERVED, n)
    found = {name: fastsde.sample(w, cond=rows, **options).samples for name, w in wrappers(model).items()}
    found["none"] = fastsde.sample(model, **options).samples
    error = {name: float((x.mean(0) - mean).norm() / spread.trace().sqrt()) for name, x in found.items()}
    # The floor of exact samples is 1 / sqrt(n) = 0.05.
    for name in ("Projection", "DPS", "PiGDM", "MMPS"):
        assert error[name] < error["none"] - 5 * 0.05, name
    assert error["MMPS"] < 0.25


# ---- formulas by hand ------------------------------------------------------------------------------------------------


def by_hand(model, x, t, log_likelihood):
    """x_0 + (sigma^2 / alpha) grad log p(y | x_t), with the gradient of a scalar function of x_0."""
    x = x.clone().requires_grad_()
    x_0 = model(x, t).x_0
    (gradient,) = torch.autograd.grad(log_likelihood(x_0).sum(), x)
    return (x_0 + (model.sde.sigma(t) ** 2 / model.sde.alpha(t))[:, None] * gradient).detach()


def test_dps_is_the_gradient_of_the_most_likely_white_gaussian():
    model, t, x = mixture(VPSDE())[0], vector(0.1, 0.4, 0.8), draw(3, 5)
    # max over v of log N(r; 0, v I) is -(m / 2) log |r|^2 and a constant; a large noise_std holds v there instead.
    for noise, log_likelihood in (
        (1e-3, lambda x_0: -0.7 * 3 / 2 * (Y - x_0 @ A.mT).square().sum(1).log()),
        (50.0, lambda x_0: -0.7 / 2 * (Y - x_0 @ A.mT).square().sum(1) / 50.0**2),
    ):
        guided = DPS(model, dense(A), noise, scale=0.7)(x, t, cond(Y, 3)).x_0
        # The same operations in another order.
        torch.testing.assert_close(guided, by_hand(model, x, t, log_likelihood), rtol=1e-10, atol=1e-10)


def test_dps_counts_known_elements_only():
    model, t, x = mixture(VPSDE())[0], vector(0.5), draw(1, 5)
    y = torch.where(KNOWN == 1, draw(5, seed=9), math.nan)  # what is unknown is not read

    def log_likelihood(x_0):
        return -2 / 2 * (y - x_0)[:, KNOWN == 1].square().sum(1).log()

    guided = DPS(model, Mask(KNOWN), 1e-3)(x, t, cond(y, 1)).x_0
    torch.testing.assert_close(guided, by_hand(model, x, t, log_likelihood), rtol=1e-10, atol=1e-10)


def test_pigdm_is_the_gradient_of_its_gaussian():
    sde = VPSDE()
    model, t, x = mixture(sde)[0], vector(0.1, 0.4, 0.8), draw(3, 5)
    alpha2, sigma2, data2 = sde.alpha(t) ** 2, sde.sigma(t) ** 2, 0.7**2
    r2 = sigma2 * data2 / (alpha2 * data2 + sigma2)
    m = NOISE**2 * torch.eye(3, dtype=torch.float64) + r2[:, None, None] * (A @ A.mT)

    def log_likelihood(x_0):
        residual = Y - x_0 @ A.mT
        return -0.5 * (residual * torch.linalg.solve(m, residual)).sum(1)

    guided = PiGDM(model, dense(A), NOISE, data_std=0.7)(x, t, cond(Y, 3)).x_0
    torch.testing.assert_close(guided, by_hand(model, x, t, log_likelihood), rtol=1e-9, atol=1e-9)


class Shrink(nn.Module):
    """x_0 = W x with one parameter; counts backward passes through it."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(covariance(5).to(dtype))
        self.backward, self.modes = 0, []

    def forward(self, x, t):
        self.modes.append((self.training, x.dtype))
        out = x @ self.weight
        if out.requires_grad:
            out.register_hook(self.count)
        return out

    def count(self, gradient):
        self.backward += 1


def test_guidance_goes_through_a_module_in_single_precision():
    sde, network, t, x = VPSDE(), Shrink(), vector(0.3, 0.6), draw(2, 5)
    model = ScoreModel(network, sde, "sample", event_shape=(5,))
    guided = MMPS(model, dense(A), NOISE, iterations=3)
    with torch.no_grad():
        out = guided(x, t, cond(Y, 2)).x_0
    assert network.backward == 3 + 1
    w, gain = covariance(5), (sde.sigma(t) ** 2 / sde.alpha(t))[:, None, None]
    m = NOISE**2 * torch.eye(3, dtype=torch.float64) + gain * (A @ w @ A.mT)
    pull = torch.linalg.solve(m, Y - x @ w @ A.mT)
    # Single precision, through M^{-1} of condition below 1e3.
    torch.testing.assert_close(out, x @ w + gain[:, :, 0] * (pull @ A @ w), rtol=0, atol=1e-4)
    network.train()
    r = fastsde.sample(MMPS(model, dense(A), NOISE, Y), n=3, solver=DDIM(5))
    assert r.nfe.tolist() == [6] * 3
    assert network.modes[1:] == [(False, torch.float32)] * 6
    assert network.training
    assert network.weight.grad is None


@pytest.mark.parametrize("wrapper", [DPS, PiGDM, MMPS])
def test_a_network_without_gradients_is_refused(wrapper):
    model = ScoreModel(lambda x, t: -x.detach(), VPSDE())
    with pytest.raises(TypeError, match="must be differentiable"):
        wrapper(model, dense(A), NOISE)(draw(2, 5), vector(0.1, 0.2), cond(Y, 2))


# ---- projection ------------------------------------------------------------------------------------------------------

TIMES = Grid([1.0, 0.7, 0.3])


@pytest.mark.parametrize("solver", [DDIM(), ExponentialPC()], ids=repr)
def test_projection_imputes_the_measurement_with_the_noise_of_the_sample(solver):
    sde = VPSDE()
    model, y, z, known = mixture(sde)[0], draw(5, seed=7), draw(4, 5), KNOWN == 1
    first, last = vector(1.0), vector(0.3)
    wrapped = Projection(model, Mask(KNOWN), y)
    x_init = sde.sigma(first) * z
    options = {"x_init": x_init, "solver": solver, "controller": TIMES}
    x = fastsde.sample(wrapped, denoise=False, **options).samples
    noise = z - sde.alpha(first) / sde.sigma(first) * y  # the start holds no signal
    # A few roundings.
    expected = sde.alpha(last) * y + sde.sigma(last) * noise
    torch.testing.assert_close(x[:, known], expected[:, known], rtol=0, atol=1e-13)
    denoised = fastsde.sample(wrapped, **options).samples
    torch.testing.assert_close(denoised[:, known], y[known].expand(4, -1), rtol=0, atol=1e-15)


def test_projection_with_ancestral_steps_keeps_the_law_of_the_measured_part():
    sde, n = VPSDE(), 4000
    y, known, last = draw(5, seed=7), KNOWN == 1, vector(0.3)
    wrapped = Projection(mixture(sde)[0], Mask(KNOWN), y)
    options = {"solver": Ancestral(), "controller": TIMES, "denoise": False, "batch_size": n}
    x = fastsde.sample(wrapped, x_data=y.expand(n, 5), **options).samples[:, known]
    z = (x - sde.alpha(last) * y[known]) / sde.sigma(last)
    # 5 standard errors.
    assert float(z.mean(0).abs().max()) < 5 / n**0.5
    assert float((z.square().mean(0) - 1).abs().max()) < 5 * (2 / n) ** 0.5


def test_projection_is_orthogonal():
    t, x = vector(0.2, 0.8), draw(2, 5)
    model = mixture(VPSDE())[0]
    x_0, projected = model(x, t).x_0, Projection(model, dense(A))(x, t, cond(Y, 2)).x_0
    nearest = x_0 + (Y - x_0 @ A.mT) @ torch.linalg.pinv(A).mT
    # Conjugate gradients on A^T A, of condition below 1e3.
    torch.testing.assert_close(projected, nearest, rtol=0, atol=1e-11)


# ---- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", [Projection, DPS, PiGDM, MMPS])
def test_rows_do_not_see_each_other(wrapper):
    model, x, y, t = mixture(VPSDE())[0], draw(3, 5), draw(3, 3, seed=4), vector(0.9, 0.4, 0.02)
    x[1, 2] = math.inf
    wrapped = wrapper(model, dense(A)) if wrapper is Projection else wrapper(model, dense(A), NOISE)
    joint = wrapped(x, t, {"measurement": y}).x_0
    assert torch.isfinite(joint[[0, 2]]).all()
    for i in (0, 2):
        alone = wrapped(x[i : i + 1], t[i : i + 1], {"measurement": y[i : i + 1]}).x_0
        # Matrix products of other sizes round differently; conjugate gradients amplify that by M's condition, 1e3.
        torch.testing.assert_close(joint[i : i + 1], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.long
def test_each_sample_keeps_its_measurement_through_refills():
    model, n = mixture(VPSDE())[0], 7
    y, solver = draw(n, 5, seed=8), fastsde.ExtrapolatedEM()  # own steps, so that rows end at different turns
    wrapped = Projection(model, Mask(KNOWN), torch.zeros(5))
    options = {"solver": solver, "rtol": 0.5, "dtype": torch.float64}
    few = fastsde.sample(wrapped, n=n, cond={"measurement": y}, batch_size=2, **options)
    all_at_once = fastsde.sample(wrapped, n=n, cond={"measurement": y}, batch_size=n, **options)
    assert len(set(few.nfe.tolist())) > 1
    torch.testing.assert_close(few.samples[:, KNOWN == 1], y[:, KNOWN == 1], rtol=0, atol=1e-14)
    # Matrix products of other sizes round differently.
    torch.testing.assert_close(few.samples, all_at_once.samples, rtol=1e-8, atol=1e-8)


# ---- operators against matrices --------------------------------------------------------------------------------------


@given(m=st.integers(1, 6), d=st.integers(1, 6), rank=st.integers(1, 6), seed=st.integers(0, 99))
def test_linear_maps_are_their_matrices(m, d, rank, seed):
    rank = min(rank, m, d)
    u, v = (torch.linalg.qr(draw(k, k, seed=seed + i))[0][:, :rank] for i, k in enumerate((m, d)))
    a = u * torch.linspace(0.5, 2, rank, dtype=torch.float64) @ v.mT
    operator, x, y = dense(a), draw(3, d, seed=seed), draw(3, m, seed=seed)
    # Singular values from 0.5 to 2, so A^T A has condition 16 at most; all else are roundings.
    torch.testing.assert_close(operator.adjoint(y), y @ a, rtol=0, atol=1e-13)
    torch.testing.assert_close(operator.pinv(y), y @ torch.linalg.pinv(a, rtol=1e-9).mT, rtol=0, atol=1e-11)
    torch.testing.assert_close(operator.residual(y, x), y - x @ a.mT, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "operator",
    [
        Mask(torch.tensor([[1, 0], [0, 1]])),
        Mask(torch.tensor([[[True]], [[False]], [[True]]])),
        Grayscale(3),
        Linear(lambda x: x[..., ::2].mean(2), (3, 2, 2)),
    ],
    ids=["mask", "channels", "gray", "linear"],
)
def test_adjoints_and_pseudoinverses_are_those_of_the_matrix(operator):
    eye = torch.eye(12, dtype=torch.float64).reshape(12, 3, 2, 2)
    made = operator(eye)
    a = made.reshape(12, -1).mT
    y = draw(4, *made.shape[1:])
    torch.testing.assert_close(operator.adjoint(y).flatten(1), y.flatten(1) @ a, rtol=0, atol=1e-14)
    inverse = torch.linalg.pinv(a)
    torch.testing.assert_close(operator.pinv(y).flatten(1), y.flatten(1) @ inverse.mT, rtol=0, atol=1e-13)
    operator.check(y, (3, 2, 2))


# ---- refusals, before the first call ---------------------------------------------------------------------------------


def model_of(*event):
    return ScoreModel(never, VPSDE(), event_shape=event)


def sampled(wrapped, **options):
    return fastsde.sample(wrapped, n=2, **options)


def broken(**maps):
    return Linear(**{"forward": lambda x: x[:, :3], "event_shape": (5,)} | maps)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: sampled(Projection(model_of(5), dense(A))), ValueError, "measurement is missing"),
        (lambda: sampled(Projection(model_of(5), dense(A), torch.zeros(4))), ValueError, r"shape \(3,\).*got \(4,\)"),
        (lambda: sampled(DPS(model_of(5), Mask(KNOWN), 1.0, torch.zeros(3))), ValueError, r"\(5,\).*got \(3,\)"),
        (
            lambda: sampled(Projection(model_of(5), dense(A)), cond={"measurement": torch.zeros(3)}),
            ValueError,
            "leading axis n=2",
        ),
        (lambda: sampled(Projection(model_of(5), Mask(KNOWN), KNOWN)), ValueError, "floating dtype.*int64"),
        (lambda: sampled(MMPS(model_of(4), Mask(KNOWN), 1.0, torch.zeros(4))), ValueError, r"\(4,\); got \(5,\)"),
        (lambda: sampled(MMPS(model_of(4), dense(A), 1.0, Y)), ValueError, r"event_shape of Linear is \(5,\)"),
        (lambda: sampled(Projection(model_of(5, 2), Grayscale(), torch.zeros(1, 2))), ValueError, "3 channels"),
        (
            lambda: sampled(Projection(model_of(5), broken(forward=lambda x: x[:, :3] + 1), Y)),
            ValueError,
            "must be linear",
        ),
        (lambda: sampled(Projection(model_of(5), broken(forward=lambda x: x**3), Y)), ValueError, r"got \(3,\)"),
        (
            lambda: sampled(Projection(model_of(5), broken(forward=lambda x: x[:, :3] ** 3), Y)),
            ValueError,
            "must be linear",
        ),
        (lambda: sampled(Projection(model_of(5), broken(adjoint=lambda y: y), Y)), ValueError, "adjoint must return"),
        (
            lambda: sampled(Projection(model_of(5), broken(adjoint=lambda y: y @ A.to(y)), Y)),
            ValueError,
            "must be linear",
        ),
        (lambda: DPS(model_of(5), Mask(KNOWN), 0.0), ValueError, "noise_std must be a positive.*got 0.0"),
        (lambda: DPS(model_of(5), Mask(KNOWN), 1.0, scale=-1.0), ValueError, "scale must be.*got -1.0"),
        (lambda: PiGDM(model_of(5), Mask(KNOWN), 1.0, data_std=0.0), ValueError, "data_std must be a positive"),
        (lambda: PiGDM(model_of(5), Mask(KNOWN), 1.0, iterations=0), ValueError, "at least 1; got 0"),
        (lambda: Projection(model_of(5), KNOWN), TypeError, "operator must be a LinearOperator.*got Tensor"),
        (lambda: Projection(model_of(5), Mask(KNOWN), 3.0), TypeError, "y must be a tensor.*got float"),
        (lambda: Projection(never, Mask(KNOWN)), TypeError, "model must be a fastsde.ScoreModel"),
        (lambda: Mask(torch.tensor([0.0, 0.5])), ValueError, "mask must hold 0"),
        (lambda: Mask(torch.zeros(3)), ValueError, "at least one of them known"),
        (lambda: Grayscale(0), ValueError, "channels must be an integer of at least 1; got 0"),
        (lambda: Linear(3, (5,)), TypeError, "forward must be callable.*got int"),
        (lambda: broken(pinv=3), TypeError, "pinv must be callable"),
        (lambda: Resampling(3), TypeError, "solver must be a Solver"),
        (lambda: Resampling(repeats=0), ValueError, "repeats must be an integer of at least 1; got 0"),
        (lambda: Resampling(ExponentialPC(5)), ValueError, "ExponentialPC cannot be resampled: use Ancestral"),
        (lambda: Resampling(Resampling()), ValueError, "Resampling cannot be resampled"),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_refusals_come_before_the_first_call(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_an_operator_of_ones_own():
    class Difference(LinearOperator):
        def __call__(self, x):
            return x[:, 1:] - x[:, :-1]

        def adjoint(self, y):
            return torch.nn.functional.pad(y, (1, 0)) - torch.nn.functional.pad(y, (0, 1))

        def pinv(self, y):
            return y @ torch.linalg.pinv(self(torch.eye(5).to(y)).mT).mT

    y = draw(4, seed=2)
    x = fastsde.sample(Projection(mixture(VPSDE())[0], Difference(), y), n=2, dtype=torch.float64).samples
    # The last prediction is projected; the pseudoinverse is good to a few roundings.
    torch.testing.assert_close(x.diff(dim=1), y.expand(2, 4), rtol=0, atol=1e-13)


# ---- resampling ------------------------------------------------------------------------------------------------------


class UnitNoise(GivenNoise):
    """Every draw that is asked for is 1 in a row of its own, and 0 elsewhere: a step's result shows its factor."""

    def __init__(self, rows, t, s):
        self.rows, self.root, self.asked = rows, (t - s).sqrt(), {}

    def _unit(self, key):
        z = torch.zeros(self.rows, 1, dtype=torch.float64)
        z[2 + self.asked.setdefault(key, len(self.asked))] = 1
        return z

    z = property(lambda self: self._unit("z"))
    dw = property(lambda self: self.root[:, None] * self.z)

    def normal(self, k=0):
        return self._unit(k)


def variance_after(solver, sde, std, times, draws):
    """Variance of the numerical solution for centred Gaussian data, exactly: each step is affine in x and the draws."""
    model, variance = GaussianScore(sde, vector(0.0), vector(std)), float(exact_variance(sde, std, times[:1]))
    for t, s in itertools.pairwise(times):
        rows = 2 + draws
        x = torch.zeros(rows, 1, dtype=torch.float64)
        x[1] = 1
        bound = bind(model, rows)
        noise = UnitNoise(rows, t.expand(rows), s.expand(rows))
        factor = solver.step(bound, sde, x, t.expand(rows), s.expand(rows), noise, {}).x[:, 0]
        assert len(noise.asked) == draws  # each use its own
        variance = float(factor[1] ** 2) * variance + float(factor[2:].square().sum())
    return variance


@each_sde
@pytest.mark.parametrize(("solver", "draws"), [(Ancestral(), 5), (DDIM(eta=0.5), 5), (DDIM(), 2)], ids=repr)
def test_resampling_leaves_the_law_of_a_point_alone(sde, solver, draws):
    # These solvers are exact for a point, whatever the steps, and so is the way back.
    times = Grid.log_snr(sde, 6).times
    got = variance_after(Resampling(solver, 3), sde, 0.0, times, draws)
    # Roundings, of 1 / alpha = 1e3 at the start of a flow.
    assert got == pytest.approx(float(sde.sigma(times[-1:])) ** 2, rel=1e-9)


@pytest.mark.long
@pytest.mark.parametrize(("solver", "draws"), [(Ancestral(), 5), (DDIM(), 2), (EulerMaruyama(), 5)], ids=repr)
def test_resampling_has_the_order_of_its_solver(solver, draws):
    sde, steps = VPSDE(0.5, 3.0, t_min=0.05), (32, 64, 128)
    exact = float(exact_variance(sde, 0.5, vector(sde.t_min)))
    found = [variance_after(Resampling(solver, 3), sde, 0.5, Grid.uniform(sde, n).times, draws) for n in steps]
    errors = [abs(v - exact) for v in found]
    # No Monte Carlo error: what is left is the next term of the series.
    assert fitted_order(steps, errors) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("solver", [Ancestral(7), DDIM(7, eta=0.7), EulerMaruyama(7), EulerMaruyama(7, True)], ids=repr)
def test_once_is_the_solver_alone(solver):
    model = mixture(VPSDE())[0]
    a, b = (fastsde.sample(model, n=4, solver=s, seed=3, batch_size=3) for s in (solver, Resampling(solver, 1)))
    assert torch.equal(a.samples, b.samples)
    assert a.nfe.tolist() == b.nfe.tolist() == [8] * 4


@pytest.mark.parametrize("solver", [Ancestral(3), EulerMaruyama(3), EulerMaruyama(3, True)], ids=repr)
def test_every_repeat_has_noise_of_its_own(solver):
    # Under a zero score on VE the states only collect noise: a step down, then b z back up, before each of the
    # further steps of a level; the last one stays down.
    sde, network, repeats, d = VESDE(), Recorder(), 4, 4096
    r = fastsde.sample(network, sde, shape=(2, d), solver=Resampling(solver, repeats), dtype=torch.float64)
    assert r.nfe.tolist() == [3 * repeats + 1] * 2
    moves = torch.stack([x for x, _, _ in network.calls]).diff(dim=0)
    variances = []
    for t, s in itertools.pairwise(Grid.uniform(sde, 3).times[:, None]):
        b2 = sde.transition(t, s)[1]
        down = b2 * (sde.sigma(s) / sde.sigma(t)) ** 2 if isinstance(solver, Ancestral) else sde.g2(t) * (t - s)
        variances += [float(down + b2)] * (repeats - 1) + [float(down)]
    z = (moves / torch.tensor(variances, dtype=torch.float64).sqrt()[:, None, None]).flatten(0, 1)
    assert_independent(z)


@pytest.mark.long
def test_resampling_helps_projection_towards_the_posterior():
    # Two elements that go together, one of them known: projection alone leaves too much of the prior in the other.
    sde, c, n = VPSDE(), vector(1.0, 0.9, 0.9, 1.0).reshape(1, 2, 2) * 0.25, 1500
    model = MixtureScore.from_covariances(sde, vector(1.0), torch.zeros(1, 2, dtype=torch.float64), c)
    wrapped = Projection(model, Mask(torch.tensor([1, 0])), vector(0.8, 0.0))
    options = {"n": n, "batch_size": n, "controller": Grid.log_snr(sde, 30), "dtype": torch.float64}
    errors = [
        abs(float(fastsde.sample(wrapped, solver=Resampling(Ancestral(), k), **options).samples[:, 1].mean()) - 0.72)
        for k in (1, 10)
    ]
    # The conditional mean is 0.9 * 0.8; five standard errors of 0.25 / sqrt(n) are 0.03.
    assert errors[0] > 0.06
    assert errors[1] < errors[0] / 2
