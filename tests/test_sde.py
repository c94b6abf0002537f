"""Every forward process against calculus, its published constants and the Fokker-Planck equation."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from oracles import LINEAR_BETAS, SDES, derivative, exact_variance, inside, vector

from fastsde import EDM, VESDE, VPSDE, DiscreteVPSDE, RectifiedFlow, SubVPSDE

SHARE = st.floats(0, 1)
each_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES)


def off_the_levels(sde, share):
    """A time at which log alpha is differentiable: the table's interpolation has a kink at each level."""
    t = inside(sde, share)
    if isinstance(sde, DiscreteVPSDE):
        t = (t * sde.levels).floor().clamp(max=sde.levels - 1).add(0.5) / sde.levels
    return t


@each_sde
@given(share=SHARE)
def test_coefficients_are_the_derivatives_of_the_marginal(sde, share):
    t = off_the_levels(sde, share)
    f = derivative(sde.log_alpha, t)
    growth = derivative(lambda u: sde.sigma(u) ** 2, t)
    g2 = growth - 2 * f * sde.sigma(t) ** 2
    # Both sides are a few roundings of float64 (1e-16) away from exact; g2 may cancel between terms of the size of its
    # parts, so the parts set its scale. The table's slope is a difference of numbers up to 5, times N = 1000.
    torch.testing.assert_close(sde.f(t), f, rtol=1e-12, atol=1e-11)
    scale = float((growth.abs() + 2 * (f * sde.sigma(t) ** 2).abs()).max())
    torch.testing.assert_close(sde.g2(t), g2, rtol=0, atol=1e-11 * scale)


@each_sde
@given(share=SHARE)
def test_time_of_log_snr_inverts_log_snr(sde, share):
    t = inside(sde, share)
    # log alpha near t_min is about 1e-5 and known to 1e-16, hence the time to 1e-11 of itself.
    torch.testing.assert_close(sde.t_of_log_snr(sde.log_snr(t)), t, rtol=1e-10, atol=1e-14)


@given(
    betas=st.lists(st.floats(1e-4, 0.9), min_size=1, max_size=8),
    share=SHARE,
)
def test_time_of_log_snr_inverts_any_table(betas, share):
    sde = DiscreteVPSDE(betas, t_min=1e-3)
    t = inside(sde, share)
    # At most 8 levels of beta <= 0.9 leave alpha^2 >= 1e-8, so nothing is lost but roundings of a log alpha >= 5e-8.
    torch.testing.assert_close(sde.t_of_log_snr(sde.log_snr(t)), t, rtol=1e-7, atol=0)


@each_sde
@given(first=SHARE, second=SHARE)
def test_log_snr_strictly_decreases(sde, first, second):
    # A millionth of the range moves the log-SNR by far more than the 1e-14 to which float64 knows it.
    assume(abs(first - second) >= 1e-6)
    early, late = sorted((first, second))
    assert sde.log_snr(inside(sde, late)) < sde.log_snr(inside(sde, early))


@each_sde
def test_marginal_and_prior_are_built_from_alpha_and_sigma(sde):
    t, x_0, noise = inside(sde, 0.3), vector(2.0, -1.0)[None], vector(0.5, 3.0)[None]
    expected = sde.log_alpha(t).exp() * x_0 + sde.sigma(t) * noise
    torch.testing.assert_close(sde.marginal(x_0, t, noise), expected, rtol=1e-14, atol=0)
    assert sde.prior_std == float(sde.sigma(vector(sde.t_max)))
    torch.testing.assert_close(sde.prior(noise), sde.prior_std * noise, rtol=1e-14, atol=0)


@each_sde
@given(share=SHARE)
def test_level_is_alpha_sigma_and_log_snr(sde, share):
    t = inside(sde, share)
    level = sde.level(t)
    assert (level.alpha, level.sigma) == (sde.alpha(t), sde.sigma(t))  # the same operations, to the bit
    # A few roundings of logarithms of at most 12.
    torch.testing.assert_close(level.log_snr, sde.log_snr(t), rtol=0, atol=1e-13)


def test_a_table_takes_times_of_single_precision(without_type_checks):
    sde = DiscreteVPSDE(LINEAR_BETAS)
    # Rounding of a time near 0.5, times d log alpha / dt of at most 10.
    torch.testing.assert_close(sde.alpha(vector(0.5).float()), sde.alpha(vector(0.5)), rtol=1e-6, atol=0)


def test_published_constants():
    ve, vp, edm = VESDE(), VPSDE(), EDM()
    assert (ve.sigma_min, ve.sigma_max, ve.t_min, ve.t_max) == (0.01, 50.0, 1e-5, 1.0)
    assert (vp.beta_min, vp.beta_max, vp.t_min, vp.t_max) == (0.1, 20.0, 1e-3, 1.0)
    assert (edm.t_min, edm.t_max) == (0.002, 80.0)
    assert (RectifiedFlow().t_min, RectifiedFlow().t_max) == (1e-3, 0.999)
    # sigma at both ends, from the closed forms of the papers, to float64 rounding.
    assert ve.prior_std == pytest.approx(50.0, rel=1e-14)
    assert float(ve.sigma(vector(0.0))) == 0.01
    assert edm.prior_std == 80.0
    assert RectifiedFlow().prior_std == 0.999
    assert vp.prior_std == pytest.approx(math.sqrt(1 - math.exp(-10.05)), rel=1e-14)
    assert SubVPSDE().prior_std == pytest.approx(1 - math.exp(-10.05), rel=1e-14)


def test_vp_at_the_published_end():
    sde = VPSDE()
    t = vector(1e-3)
    # The reference values carry six and five digits.
    assert float(sde.alpha(t)) == pytest.approx(0.999945, abs=5e-7)
    assert float(sde.sigma(t) ** 2) == pytest.approx(1.0994e-4, abs=5e-9)


@given(share=SHARE)
def test_sub_vp_has_the_drift_of_vp_and_less_noise(share):
    vp, sub = VPSDE(), SubVPSDE()
    t = inside(vp, share)
    assert torch.equal(sub.f(t), vp.f(t))
    # sigma_sub = sigma_vp^2, to rounding
    torch.testing.assert_close(sub.sigma(t), vp.sigma(t) ** 2, rtol=1e-13, atol=0)
    assert sub.g2(t) < vp.g2(t)


def test_discrete_levels_lie_at_k_plus_one_over_n():
    bars = np.cumprod(1 - LINEAR_BETAS.numpy())
    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    for sde in (SDES["DiscreteVPSDE"], DiscreteVPSDE(alphas_cumprod=bars.tolist())):
        # A product of up to 1000 factors and a sum of up to 1000 logarithms agree to 1000 roundings of float64.
        np.testing.assert_allclose((sde.alpha(t) ** 2).numpy(), bars, rtol=2e-13)
        assert (sde.levels, sde.t_min, sde.t_max) == (1000, 1e-3, 1.0)


def test_discrete_time_starts_at_clean_data_and_is_log_linear_between_levels():
    sde = DiscreteVPSDE([0.1, 0.5], t_min=0.1)
    levels = [0.0, math.log(0.9), math.log(0.9 * 0.5)]
    t = vector(0.0, 0.125, 0.5, 0.875, 1.0)
    expected = vector(levels[0], 0.25 * levels[1], levels[1], 0.25 * levels[1] + 0.75 * levels[2], levels[2])
    torch.testing.assert_close(2 * sde.log_alpha(t), expected, rtol=1e-14, atol=1e-16)
    # On a level the drift is that of the cell below it, which a backward step enters.
    assert float(sde.f(vector(0.5))) == pytest.approx(0.5 * levels[1] * 2, rel=1e-14)


def test_linear_betas_are_close_to_continuous_vp():
    discrete, vp = SDES["DiscreteVPSDE"], VPSDE()
    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    # The sum of betas is at most (beta_max - beta_min) / (8 (N - 1)) from the integral, and -log(1 - b) is at most
    # b^2 / (2 (1 - b)) above b; half of both is in log alpha.
    sum_error = 19.9 / (8 * 999)
    log_error = (LINEAR_BETAS**2 / (2 * (1 - LINEAR_BETAS))).cumsum(0)
    assert ((discrete.log_alpha(t) - vp.log_alpha(t)).abs() <= 0.5 * (sum_error + log_error)).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VESDE(0.0), "VESDE needs 0 < sigma_min < sigma_max; got 0.0 and 50.0"),
        (lambda: VESDE(t_min=0.0), "VESDE needs 0 < t_min < t_max; got t_min=0.0"),
        (lambda: VPSDE(0.0), "VPSDE needs 0 < beta_min <= beta_max; got 0.0 and 20.0"),
        (lambda: SubVPSDE(3.0, 1.0), "SubVPSDE needs 0 < beta_min <= beta_max; got 3.0 and 1.0"),
        (lambda: SubVPSDE(t_min=1.0), "SubVPSDE needs 0 < t_min < t_max; got t_min=1.0, t_max=1.0"),
        (lambda: EDM(t_min=-1.0), "EDM needs 0 < t_min < t_max; got t_min=-1.0"),
        (lambda: RectifiedFlow(t_max=1.0), "RectifiedFlow needs 0 < t_min < t_max <= 0.999999; got .* t_max=1.0"),
        (lambda: DiscreteVPSDE(), "exactly one of betas and alphas_cumprod"),
        (lambda: DiscreteVPSDE([0.1], alphas_cumprod=[0.9]), "exactly one of betas and alphas_cumprod"),
        (lambda: DiscreteVPSDE([0.1, 1.0]), r"every value in \(0, 1\)"),
        (lambda: DiscreteVPSDE(torch.full((2, 2), 0.1)), "one-dimensional"),
        (lambda: DiscreteVPSDE(alphas_cumprod=[0.9, 0.9]), "strictly decreasing"),
        (lambda: DiscreteVPSDE(alphas_cumprod=[0.9, 0.0]), "zero terminal SNR"),
        (lambda: DiscreteVPSDE([0.1, 0.2], t_max=1.5), "DiscreteVPSDE needs 0 < t_min < t_max <= 1.0"),
    ],
)
def test_refusals_name_what_came_and_what_is_allowed(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_repr_shows_the_constants():
    assert re.fullmatch(r"VPSDE\(beta_min=0.1, beta_max=20.0, t_min=0.001, t_max=1.0\)", repr(VPSDE()))


@each_sde
@given(share=SHARE, std=st.floats(0, 2), data_mean=st.floats(-3, 3))
def test_backward_drifts_keep_the_marginals(sde, share, std, data_mean):
    """Fokker-Planck for Gaussian data: each drift is affine, b = A x + c, and must move mean and variance right."""
    t = off_the_levels(sde, share)
    mean, variance = sde.alpha(t) * data_mean, exact_variance(sde, std, t)
    d_mean = derivative(lambda u: sde.alpha(u) * data_mean, t)
    d_variance = derivative(lambda u: exact_variance(sde, std, u), t)
    x = torch.stack([mean, mean + 1], 1)
    score = -(x - mean) / variance
    # Backwards in time the noise adds g^2, so forwards dV/dt = 2 A V - g^2; the flow has no noise: dV/dt = 2 A V.
    for drift, diffusion in ((sde.reverse_drift, sde.g2(t)), (sde.probability_flow_drift, 0)):
        b = drift(x, t, score)
        slope = b[:, 1] - b[:, 0]
        # Roundings relative to the parts that may cancel.
        scale = float((2 * slope.abs() * variance + sde.g2(t)).max())
        torch.testing.assert_close(2 * slope * variance - diffusion, d_variance, rtol=0, atol=1e-10 * scale)
        torch.testing.assert_close(b[:, 0], d_mean, rtol=1e-10, atol=1e-10)
