"""Kernel densities and the latent flow: closed forms, invariances, what a broken part does."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fastsde
from fastsde import VPSDE, ScoreModel, Status
from fastsde.latent import KernelDensity, LatentFlow, sampler_map
from fastsde.score import GaussianScore


def normals(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def identity(z):
    return z


# Densities.


def test_a_large_ridge_is_the_kernel_density_estimate():
    points, x = normals(40, 2), normals(5, 2, seed=1)
    estimate = (torch.cdist(x, points) ** 2 / (-2 * 0.7**2)).exp().mean(1).log()
    kde = KernelDensity(points, 0.7, math.inf).log_density(x[None])
    torch.testing.assert_close(kde, estimate, rtol=1e-12, atol=0.0)  # float64
    # The first term of the series in 1 / ridge, whose factor is at most the largest eigenvalue of K / n, below 1.
    ridged = KernelDensity(points, 0.7, 1e5).log_density(x[None])
    torch.testing.assert_close(ridged, estimate, rtol=0.0, atol=2e-5)


def test_a_small_ridge_is_flat_on_the_points():
    points = normals(12, 3).requires_grad_()
    density = KernelDensity(points.detach(), 1.0, 1e-10)
    value = density.log_density(points[None])
    # Equal to about the ridge over the smallest eigenvalue of K / n, here above 1e-5.
    torch.testing.assert_close(value, value.mean().expand_as(value), rtol=0.0, atol=1e-4)


def test_one_and_two_points_have_equal_weights():
    x = normals(4, 2, seed=1).requires_grad_()
    for points in (normals(1, 2), normals(2, 2)):
        gradients = []
        for ridge in (0.01, math.inf):
            log_p = KernelDensity(points, 1.3, ridge).log_density(x[None])
            gradients.append(torch.autograd.grad(log_p.sum(), x)[0])
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)  # float64


@given(st.integers(2, 12), st.floats(0.01, 100), st.integers(0, 2**31))
def test_the_distance_to_the_estimate_is_that_of_theorem_5(n, ridge, seed):
    # With lambda = n ridge and kappa the eigenvalues of K,
    # || I - lambda (K + lambda I)^-1 ||_F^2 = sum (kappa / (kappa + lambda))^2 <= (||K||_F / lambda)^2.
    points = normals(n, 3, seed=seed)
    gram = (torch.cdist(points, points) ** 2 / -2).exp()
    kappa, lam = torch.linalg.eigvalsh(gram), n * ridge
    weights = KernelDensity(points, 1.0, ridge).weights * n / (1 + ridge)
    expected = torch.linalg.solve(gram + lam * torch.eye(n, dtype=gram.dtype), torch.ones(n, dtype=gram.dtype)) * n
    torch.testing.assert_close(weights, expected, rtol=1e-8, atol=1e-10)
    off = (1 - ridge * weights).norm()  # I - lambda (K + lambda I)^-1 applied to ones, whose norm is sqrt(n)
    bound = (kappa / (kappa + lam)).square().sum().sqrt()
    assert off <= math.sqrt(n) * bound * (1 + 1e-9)
    assert bound <= gram.norm() / lam * (1 + 1e-9)


def test_the_mollified_kernel_is_a_wider_gaussian():
    # k * N(0, s^2 I) = (h^2 / (h^2 + s^2))^(D/2) exp(-|d|^2 / (2 (h^2 + s^2))) in D dimensions.
    h, s, x = 0.8, 0.5, normals(3, 2, seed=1)
    point = torch.zeros(1, 2, dtype=torch.float64)
    draws = x - s * normals(200_000, 3, 2, seed=2)
    got = KernelDensity(point, h, math.inf).log_density(draws)
    wide = h**2 + s**2
    expected = math.log(h**2 / wide) - x.square().sum(1) / (2 * wide)
    torch.testing.assert_close(got, expected, rtol=0.0, atol=0.01)  # five standard errors of the mean of the draws


def test_a_row_that_weights_of_both_signs_do_not_see_has_no_force():
    density = KernelDensity(normals(6, 2, seed=14), 1.0, 1e-3)
    assert (density.weights < 0).any()
    x = 10 * nn.functional.normalize(normals(200, 2, seed=15), dim=1).requires_grad_()
    value = density.log_density(x[None])
    unseen = value == -math.inf
    assert 0 < int(unseen.sum()) < 200
    (gradient,) = torch.autograd.grad(value.masked_fill(unseen, 0.0).sum(), x)
    assert torch.isfinite(gradient).all()
    assert (gradient[unseen] == 0).all()


# The flow.


def moments(a, s, b, t, h, time, steps=20_000):
    """Mean and standard deviation of the flow from N(a, s^2) to N(b, t^2), both seen by estimates of width h."""
    mean, std, dt = a, s, time / steps
    for _ in range(steps):
        mean -= dt * (mean - b) / (t**2 + h**2)
        std += dt * std * (1 / (std**2 + h**2) - 1 / (t**2 + h**2))
    return mean, std


def test_a_gaussian_flows_to_a_gaussian():
    b, t, h, steps, size = 2.0, 0.5, 0.5, 40, 0.025
    data = b + t * normals(1000, 1)
    options = {"width": h, "ridge": math.inf, "step_size": size, "steps": steps, "bank": 500, "batch_size": 500}
    r = LatentFlow(identity, data, (1,), **options).sample(500)
    mean, std = moments(0.0, 1.0, b, t, h, steps * size)
    # Three standard errors of 500 particles, as many in the bank, and Euler's first order, about 0.02.
    assert abs(float(r.samples.mean()) - mean) < 0.15
    assert abs(float(r.samples.std()) - std) < 0.1
    assert (r.forward == steps + 1).all()
    assert (r.backward == steps).all()
    assert (r.bank_forward, r.bank_backward) == (2 * 500 * steps, 500 * steps)


def test_data_that_are_generated_already_stay():
    data = normals(1000, 1)
    flow = LatentFlow(identity, data, (1,), width=0.6, step_size=0.3, steps=1, bank=500, batch_size=500)
    r = flow.sample(500)
    move = (r.latents - r.start).abs().mean()
    # The density of one side has a relative error of about (n h)^-1/2 = 0.04 per width.
    assert float(move) < 0.3 * 0.15
    assert abs(float(r.samples.std()) - float(r.start.std())) < 0.05


def test_a_linear_generator_pulls_the_gradient_back():
    # Only log p(y | x) = -|x - y|^2 / 2: z follows J^T (y - A z), and ends at the least-squares solution.
    A, y = normals(3, 2, seed=3), normals(3, seed=4)
    data = normals(50, 3)
    common = {"log_likelihood": lambda x: -(x - y).square().sum(1) / 2, "weights": (0.0, 1.0, 0.0), "step_size": 0.1}
    one = LatentFlow(lambda z: z @ A.T, data, (2,), steps=1, **common).sample(4)
    expected = one.start + 0.1 * (y - one.start @ A.T) @ A
    torch.testing.assert_close(one.latents, expected, rtol=1e-10, atol=1e-12)  # float64
    many = LatentFlow(lambda z: z @ A.T, data, (2,), steps=400, **common).sample(4)
    solution = torch.linalg.lstsq(A, y[:, None]).solution[:, 0]
    torch.testing.assert_close(many.latents, solution.expand(4, 2), rtol=1e-5, atol=1e-5)  # (1 - 0.1 k)^400
    assert one.bank_forward == 0  # no term of q


def two_modes(z):
    """Two modes, the right one with 0.23 of the weight; data have one half on each side."""
    return 1.5 * torch.tanh(3 * (z - 0.8)) + 0.4 * z


@pytest.mark.parametrize(("weights", "restored"), [((1.0, 0.0, 1.0), True), ((1.0, 0.0, 0.0), False)])
def test_the_density_of_what_is_generated_restores_the_weight_of_a_mode(weights, restored):
    data = torch.cat([0.4 * normals(200, 1) + side for side in (-1.5, 1.5)])
    flow = LatentFlow(two_modes, data, (1,), weights=weights, width=1.0, steps=20)
    r = flow.sample(400)
    right = float((r.samples > 0).double().mean())
    # Standard error of a share of 400: 0.025.
    assert right > 0.38 if restored else right < 0.28
    assert (float(r.samples[r.samples > 0].std()) > 0.3) is restored  # alone, log p collapses the mode


def test_a_sample_depends_on_its_number_alone():
    data = normals(60, 2)

    def drawn(batch_size, **which):
        options = {"features": torch.sin, "mollifier": 0.2, "draws": 2, "bank": 32, "steps": 4}
        flow = LatentFlow(two_modes, data, (2,), batch_size=batch_size, **options)
        return flow.sample(seed=7, **which).latents

    whole = drawn(64, n=19)
    for size, numbers in ((16, list(range(19))), (1, [8, 2])):  # of the last three, one slot is empty
        torch.testing.assert_close(drawn(size, index=numbers), whole[numbers], rtol=1e-10, atol=1e-10)  # float64


def test_order_of_data_and_constants_of_the_likelihood_change_nothing():
    data = normals(60, 2)

    def drawn(data, constant):
        flow = LatentFlow(
            two_modes, data, (2,), log_likelihood=lambda x: constant - x.square().sum(1), bank=16, steps=3
        )
        return flow.sample(5).latents

    # The default width is the median of the same distances.
    torch.testing.assert_close(drawn(data, 0.0), drawn(data.flip(0), 100.0), rtol=1e-9, atol=1e-9)  # float64


def test_a_sampler_is_a_differentiable_generator():
    # DDIM for N(m, 0.25 I) is affine, so that a difference over any distance is its gradient.
    sde = VPSDE()
    model = GaussianScore(sde, torch.full((2,), 0.5, dtype=torch.float64), torch.full((2,), 0.5, dtype=torch.float64))
    generator = sampler_map(model, solver=fastsde.DDIM(steps=8))
    z = normals(3, 2).requires_grad_()
    x = generator(z)
    r = fastsde.sample(model, x_init=sde.prior(z.detach()), solver=fastsde.DDIM(steps=8))
    assert torch.equal(x, r.samples)
    (slope,) = torch.autograd.grad(x.sum(), z)
    expected = generator(z.detach() + 1) - generator(z.detach())
    torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-9)  # float64
    flow = LatentFlow(generator, 0.5 + 0.5 * normals(40, 2), (2,), bank=8, steps=2)
    assert (flow.sample(3).status == Status.SUCCESS).all()
    with pytest.raises(ValueError, match="needs a deterministic solver"):
        sampler_map(model, solver=fastsde.ExponentialPC(eta=1.0))


def test_networks_run_in_evaluation_mode():
    generator = nn.Sequential(nn.Dropout(0.9), nn.Linear(2, 2)).double()
    flow = LatentFlow(generator, normals(20, 2), (2,), bank=8, steps=2)
    assert torch.equal(flow.sample(4).latents, flow.sample(4).latents)
    assert generator.training


def test_the_decoder_of_diffusers_is_a_generator():
    """One step along log p(y | x) alone is that of the gradient through the decoder."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    small = {"block_out_channels": (8,), "norm_num_groups": 4, "latent_channels": 2}
    vae = diffusers.AutoencoderKL(**small, in_channels=1, out_channels=1)
    vae = vae.double().eval().requires_grad_(False)

    def decoder(z):
        return vae.decode(z / vae.config.scaling_factor).sample

    def likelihood(x):
        return -x.square().flatten(1).sum(1)

    given = {"log_likelihood": likelihood, "weights": (0.0, 1.0, 0.0), "step_size": 0.01, "steps": 1}
    r = LatentFlow(decoder, normals(8, 1, 4, 4), (2, 4, 4), **given).sample(3)
    z = r.start.clone().requires_grad_()
    expected = r.start + 0.01 * torch.autograd.grad(likelihood(decoder(z)).sum(), z)[0]
    torch.testing.assert_close(r.latents, expected, rtol=1e-9, atol=1e-12)  # float64
    torch.testing.assert_close(r.samples, decoder(r.latents), rtol=1e-9, atol=1e-12)


def test_a_sample_that_is_not_finite_is_its_own():
    def broken(z):
        return z * torch.where(z.detach()[:, :1] > 1.5, torch.nan, 1.0)

    flow = LatentFlow(
        identity, normals(30, 2), (2,), weights=(1.0, 1.0, 0.0), log_likelihood=lambda x: broken(x).sum(1), steps=3
    )
    r = flow.sample(40, seed=1)
    failed = r.start[:, 0] > 1.5
    assert failed.any()
    assert (r.status[failed] == Status.NON_FINITE).all()
    assert torch.isnan(r.samples[failed]).all()
    assert torch.isfinite(r.samples[r.status == Status.SUCCESS]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_shape": (3,)}, "generator must return samples like the data"),
        ({"latent_shape": (0,)}, "latent_shape must be the shape"),
        ({"data": normals(1, 2)}, "data must be at least two"),
        ({"data": normals(9, 2).fill_(math.nan)}, "data holds NaN"),
        ({"data": torch.ones(9, 2)}, "no width can be chosen"),
        ({"generator": lambda z: z * math.nan}, "generator must return finite"),
        ({"features": lambda x: x * math.nan}, "features of the data are not finite"),
        ({"features": lambda x: x.sum()}, "features must return one row"),
        ({"weights": (1.0, 1.0)}, "weights must be three numbers"),
        ({"weights": (0.0, 1.0, 0.0)}, "at least one term"),
        ({"ridge": 0.0}, "ridge must be a positive"),
        ({"step_size": -1.0}, "step_size must be a positive"),
        ({"bank": 1}, "bank must be an integer of at least 2"),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_what_does_not_fit_is_refused(changes, message):
    given = {"generator": identity, "data": normals(9, 2), "latent_shape": (2,), "bank": 8} | changes
    with pytest.raises((ValueError, TypeError), match=message):
        LatentFlow(**given)


def test_what_may_be_wrong_is_warned_of():
    with pytest.warns(UserWarning, match="on one scale"):
        LatentFlow(lambda z: 100 * z, normals(20, 2), (2,), bank=8)
    with pytest.warns(UserWarning, match="features have dimension 10"):
        LatentFlow(lambda z: z.repeat(1, 5), normals(20, 10), (2,), bank=8)
    exploding = LatentFlow(
        identity, normals(20, 2), (2,), log_likelihood=lambda x: x.square().sum(1), step_size=1e30, bank=8, steps=20
    )
    with pytest.raises(ValueError, match="features of the bank are not finite"):
        exploding.sample(2)


def test_a_model_with_failing_rows_gives_failing_samples():
    def network(x, t):
        return x * torch.where(x.detach()[:, :1] > 1.5, torch.nan, -1.0)

    model = ScoreModel(network, VPSDE(), event_shape=(2,))
    flow = LatentFlow(sampler_map(model, nfe=4), normals(30, 2), (2,), weights=(1.0, 0.0, 0.0), steps=2)
    r = flow.sample(40, seed=2)
    assert {int(s) for s in r.status} == {Status.SUCCESS, Status.NON_FINITE}
    assert torch.isfinite(r.latents[r.status == Status.SUCCESS]).all()
