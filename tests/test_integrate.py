"""`integrate` against SDEs with known solutions on the same Brownian path."""

import math

import numpy as np
import pytest
import torch
from oracles import fitted_order, vector
from scipy.integrate import solve_ivp

import fastsde
from fastsde import Status
from fastsde.noise import BrownianPath

pytestmark = pytest.mark.long
MU, VOLATILITY, N = 0.5, 0.8, 400


def brownian(n, size, t0, t1, times, seed=0):
    """W(t) - W(t0) of the first n samples, as `integrate` walks it: on the clock u = -t, with shape (n, size)."""
    path = BrownianPath(seed, (size,), torch.float64, t_min=-t1, t_max=-t0)
    index = torch.arange(n)
    return path(index, torch.full((n,), -t0, dtype=torch.float64)) - path(index, -times)


def geometric(ito, w, t):
    """The exact geometric Brownian motion from 1 at time t, for the increment w = W(t) - W(0)."""
    return torch.exp((MU - VOLATILITY**2 / 2 if ito else MU) * t + VOLATILITY * w)


def drift(x, t):
    return MU * x


def diffusion(x, t):
    return VOLATILITY * x


@pytest.mark.parametrize(
    ("ito", "extrapolate", "order"), [(True, True, 1), (False, True, 1), (True, False, 0.5)], ids=str
)
def test_strong_order_with_multiplicative_noise(ito, extrapolate, order):
    """Algorithm 9 has strong order 1 in both senses; Euler-Maruyama 1/2 (measured 0.94, 0.98 and 0.49)."""
    exact = geometric(ito, brownian(N, 1, 0.0, 1.0, torch.ones(N, dtype=torch.float64)), 1.0)
    steps = (8, 16, 32, 64, 128)
    x0 = torch.ones(N, 1, dtype=torch.float64)
    runs = [
        fastsde.integrate(
            drift, diffusion, x0, 0.0, 1.0, ito=ito, extrapolate=extrapolate, steps=k, batch_size=N
        ).samples
        for k in steps
    ]
    # 400 paths know a mean error to about 5 %, and a slope over four doublings to about 0.03.
    assert fitted_order(steps, [(run - exact).abs().mean() for run in runs]) == pytest.approx(order, abs=0.12)


@pytest.mark.parametrize("ito", [True, False])
def test_adaptive_steps_follow_the_tolerance_in_both_senses(ito):
    exact = geometric(ito, brownian(N, 1, 0.0, 1.0, torch.ones(N, dtype=torch.float64)), 1.0)
    x0 = torch.ones(N, 1, dtype=torch.float64)
    errors = []
    for rtol in (0.1, 0.03, 0.01):
        r = fastsde.integrate(drift, diffusion, x0, 0.0, 1.0, ito=ito, rtol=rtol, atol=rtol / 10, batch_size=N)
        assert r.success.all()
        assert (r.nfe == 2 * (r.accepted + r.rejected)).all()
        errors.append(float((r.samples - exact).abs().mean()))
    # Measured 0.036, 0.024, 0.009 (Ito) and 0.08, 0.06, 0.024. The other sense is 0.6 away.
    assert errors[0] > 1.2 * errors[1] > 2.4 * errors[2]
    assert errors[2] < 0.03


@pytest.mark.parametrize("ito", [True, False])
def test_adaptive_steps_of_geometric_brownian_motion_are_not_biased(ito):
    """E (x - exact) on the same paths, whose fluctuation is small; beside it that of as many equal steps."""
    n = 800
    exact = geometric(ito, brownian(n, 1, 0.0, 1.0, torch.ones(n, dtype=torch.float64)), 1.0)
    x0 = torch.ones(n, 1, dtype=torch.float64)
    adaptive = fastsde.integrate(drift, diffusion, x0, 0.0, 1.0, ito=ito, rtol=0.05, atol=0.01, batch_size=n)
    equal = fastsde.integrate(drift, diffusion, x0, 0.0, 1.0, ito=ito, steps=11, batch_size=n)
    (bias, spread), (usual, _) = (mean_and_spread(r.samples - exact) for r in (adaptive, equal))
    # That steps vary costs half as much again as equal ones have, 0.043 (Stratonovich) or nothing to speak of (Ito).
    # Four standard errors of 0.0025 (Ito). Rejecting Ito steps by their error costs 0.03 here.
    assert abs(bias) < 1.5 * abs(usual) + 4 * spread
    assert spread < (0.004 if ito else 0.01)


def mean_and_spread(error):
    """The mean of a batch of errors, and the standard error of that mean."""
    return float(error.mean()), float(error.std()) / math.sqrt(len(error))


def test_adaptive_steps_are_not_biased_by_additive_noise():
    """A double well, dx = (x - x^3) dt + 0.5 dw: rejecting steps by their error costs 0.0175 at this tolerance."""
    x0 = torch.full((1000, 1), 0.5, dtype=torch.float64)
    runs = [
        fastsde.integrate(lambda x, t: x - x**3, lambda x, t: 0.5, x0, 0.0, 1.0, additive=True, batch_size=1000, **k)
        for k in ({"rtol": 0.05}, {"steps": 64})  # the error of the latter is about 1e-4
    ]
    bias, spread = mean_and_spread(runs[0].samples - runs[1].samples)
    # Measured 0.006, with 21 calls and a standard error of 0.001.
    assert abs(bias) < 0.006 + 4 * spread
    assert spread < 0.0015


def test_a_step_that_blows_up_is_taken_again():
    """dx = -1000 (x - 1) dt + 0.1 x dw: a first step of 0.01 would multiply the distance from 1 by 41."""
    x0 = torch.full((50, 1), 3.0, dtype=torch.float64)
    r = fastsde.integrate(lambda x, t: -1000 * (x - 1), lambda x, t: 0.1 * x, x0, 0.0, 0.05, batch_size=50, dense=True)
    assert r.success.all()
    # No step is wrong by more than ten tolerances, of 0.05 near 1.
    assert all(float(path.x.min()) > 0.5 and float(path.x.max()) <= 3.0 for path in r.trajectory)


def coupled(x, t):
    """Each element's diffusion is the other element: one sign for both would bias the mean."""
    return x.flip(1)


@pytest.mark.parametrize("steps", [8, None])
@pytest.mark.parametrize("ito", [True, False])
def test_coupled_diffusion_has_the_right_mean(ito, steps):
    """dx_1 = x_2 dw_1, dx_2 = x_1 dw_2: the mean stays (Ito), and also in Stratonovich's sense, as dg_1/dx_1 = 0."""
    n = 10_000
    x0 = torch.ones(n, 2, dtype=torch.float64)
    r = fastsde.integrate(lambda x, t: 0 * x, coupled, x0, 0.0, 0.5, ito=ito, steps=steps, batch_size=n)
    error = r.samples.std(0) / math.sqrt(n)
    # With one sign for both elements, every step multiplies the mean by 1 - h / 2: the mean would be 0.78.
    assert ((r.samples.mean(0) - 1).abs() < 5 * error).all()


def test_weak_order_two_with_additive_noise():
    """dx = -x dt + 0.5 dw: mean and variance of the improved Euler step, exact by linearity, in one step of size h."""
    x0 = vector(2.0, 1.0)[:, None]
    biases = []
    for steps in (4, 8, 16):
        r = fastsde.integrate(lambda x, t: -x, lambda x, t: 0.5, x0, 0.0, 1.0, additive=True, steps=steps, seed=3)
        # Two samples with other starts share no path, so the noise is taken out with a run from elsewhere.
        moved = fastsde.integrate(
            lambda x, t: -x, lambda x, t: 0.5, x0 + 1, 0.0, 1.0, additive=True, steps=steps, seed=3
        )
        biases.append(float((moved.samples - r.samples - math.exp(-1)).abs().max()))
    assert fitted_order((4, 8, 16), biases) == pytest.approx(2, abs=0.15)  # the next term of the series on 4 steps


@pytest.mark.parametrize("extrapolate", [True, False], ids=["extrapolated", "Euler-Maruyama"])
@pytest.mark.parametrize("h", [0.5, 1.6])
def test_the_stationary_variance_at_equal_steps(h, extrapolate):
    """Appendix D.6: for dx = -x dt + sqrt(2) dw a step is x <- a x + sqrt(2 h) b z, so the variance is that below.

    The thesis has 1. Both rules are biased at a fixed h, and stable for h below 2.
    """
    a, b = (1 - h + h * h / 2, 1 - h / 2) if extrapolate else (1 - h, 1.0)
    n, steps = 8000, 25
    x0 = torch.randn(n, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    r = fastsde.integrate(
        lambda x, t: -x,
        lambda x, t: 2**0.5,
        x0,
        0.0,
        h * steps,
        steps=steps,
        extrapolate=extrapolate,
        additive=True,
        batch_size=n,
    )
    # Five standard deviations of the variance of 4 n normals.
    assert float(r.samples.var()) == pytest.approx(2 * h * b * b / (1 - a * a), rel=5 * (2 / (4 * n)) ** 0.5)


def test_without_noise_it_is_heun_with_adaptive_steps():
    def field(x, t):
        return torch.stack([x[:, 1], -torch.sin(x[:, 0]) * (1 + t)], 1)

    x0 = vector(1.0, 0.2)[None]
    exact = solve_ivp(
        lambda t, y: [y[1], -math.sin(y[0]) * (1 + t)], (0, 3), x0[0].numpy(), method="DOP853", rtol=1e-12, atol=1e-12
    ).y[:, -1]
    r = fastsde.integrate(field, None, x0, 0.0, 3.0, rtol=1e-4, atol=1e-5)
    # Some 100 steps, each wrong by at most about 1e-4 of numbers near 1.
    np.testing.assert_allclose(r.samples[0], exact, atol=2e-3)


@pytest.mark.parametrize(("rate", "rtol"), [(50.0, 1e-4), (1000.0, 1e-2), (1e6, 1e-3)])
def test_a_first_step_that_is_far_too_long_is_shortened(rate, rtol):
    """x' = -k x: the second step must be far below 2^-16 of the range, or below what the first error asks for."""
    x0 = torch.ones(1, 1, dtype=torch.float64)
    r = fastsde.integrate(lambda x, t: -rate * x, None, x0, 0.0, 20 / rate, rtol=rtol, atol=rtol / 100)
    assert r.success.all()
    # Each step's error is at most max(atol, rtol |x|), and it decays with x: some ten tolerances in all.
    assert float((r.samples - math.exp(-20)).abs()) < 10 * rtol / 100


@pytest.mark.parametrize("end", [1.0, 1e4])
def test_a_jump_in_the_drift_is_resolved_as_far_as_the_time_is(end):
    """x' = -x / 2 up to the jump, x^2 after it, over 1 and with the same jump in a range of 10^4 where x stays."""

    def field(x, t):
        after = torch.where(t < 1.0, 1.0, 0.0)[:, None]
        return torch.where(t[:, None] < 0.5, -0.5 * x, x**2) * after

    x0 = torch.ones(1, 1, dtype=torch.float64)
    r = fastsde.integrate(field, None, x0, 0.0, end, rtol=1e-6, atol=1e-7)
    assert r.success.all()
    # dx/dt is near 1: some 300 steps with an error of at most 1e-6 each, most of them far smaller.
    assert float(r.samples) == pytest.approx(1 / (math.exp(0.25) - 0.5), abs=1e-5)


def test_saved_states_lie_on_the_exact_path():
    times = [0.0, 0.3, 0.71, 1.0]
    x0 = torch.ones(20, 1, dtype=torch.float64)
    r = fastsde.integrate(
        drift, diffusion, x0, 0.0, 1.0, ito=False, rtol=0.01, atol=0.001, save_at=times, batch_size=20
    )
    for i, path in enumerate(r.trajectory):
        assert path.t.tolist() == times
        w = brownian(20, 1, 0.0, 1.0, torch.full((20,), 0.71, dtype=torch.float64))[i]
        # Measured 0.005 at the end for this tolerance, on average; another path would be 0.5 away.
        torch.testing.assert_close(path.x[2], geometric(False, w, 0.71), rtol=0.04, atol=0.0)
        assert torch.equal(path.x[0], x0[i])
        assert torch.equal(path.x[-1], r.samples[i])


def test_dense_output_has_every_accepted_state():
    x0 = torch.ones(5, 2, dtype=torch.float64)
    r = fastsde.integrate(drift, diffusion, x0, -1.0, 0.5, rtol=0.1, dense=True, batch_size=2)
    for i, path in enumerate(r.trajectory):
        assert len(path.t) == int(r.accepted[i]) + 1
        assert path.t[0] == -1.0
        assert path.t[-1] == 0.5
        assert (path.t.diff() > 0).all()
        assert torch.equal(path.x[-1], r.samples[i])


def test_a_sample_is_the_same_in_any_batch():
    x0 = torch.linspace(0.5, 2, 7, dtype=torch.float64)[:, None]
    whole = fastsde.integrate(drift, diffusion, x0, 0.0, 1.0)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    shuffled = fastsde.integrate(drift, diffusion, x0[order], 0.0, 1.0, index=order, batch_size=3)
    assert shuffled.nfe.tolist() == whole.nfe[order].tolist()
    torch.testing.assert_close(shuffled.samples, whole.samples[order], rtol=1e-12, atol=0)


def test_a_sample_that_blows_up_is_retired_alone():
    def explode(x, t):
        return torch.where(x > 1.5, x**9 * 1e12, 0 * x)

    r = fastsde.integrate(explode, None, vector(1.0, 2.0)[:, None], 0.0, 1.0)
    assert r.status[0] == Status.SUCCESS
    assert r.status[1] != Status.SUCCESS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t1": 0.0}, "finite with t0 < t1; got 0.0 and 0.0"),
        ({"x0": torch.ones(3, 1, dtype=torch.int64)}, "x0 must be real floating point; got torch.int64"),
        ({"x0": torch.full((3, 1), math.nan)}, "x0 holds NaN"),
        ({"x0": [1.0]}, "x0 must be a tensor; got list"),
        ({"drift": 1.0}, "drift must be callable"),
        ({"diffusion": 0.5}, "diffusion must be callable"),
        ({"rtol": 0.0}, "rtol must be a positive"),
        ({"rtol": 1e-7}, "rtol must be at least 4.8e-07 for a state in torch.float32; got 1e-07"),
        ({"x0": torch.ones(3, 1).double(), "rtol": 1e-16}, "rtol must be at least 8.9e-16 .* torch.float64; got 1e-16"),
        ({"t0": 1e12, "t1": 1e12 + 1}, "t0 and t1 must differ by more than 2.-32 of their size"),
        ({"steps": 0}, "steps must be an integer of at least 1; got 0"),
        ({"save_at": [2.0]}, r"times from 0.0 to 1.0; got \[2.0\]"),
        ({"save_at": [0.5], "dense": True}, "either save_at= or dense=True"),
        ({"ito": False, "extrapolate": False}, "solves Ito SDEs"),
        ({"ito": "yes"}, "ito must be True or False"),
        ({"ito": False, "additive": "no"}, "additive must be True or False"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refusals(change, message):
    def never(x, t):
        raise AssertionError("called")

    arguments = {"drift": never, "diffusion": never, "x0": torch.ones(3, 1), "t0": 0.0, "t1": 1.0} | change
    with pytest.raises((ValueError, TypeError), match=message):
        fastsde.integrate(**arguments)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"drift": lambda x, t: x[:, :1]}, "drift was given x with shape"),
        ({"diffusion": lambda x, t: torch.ones(7)}, r"diffusion was given x .*\(3, 2\).* it returned \(7,\)"),
    ],
)
def test_wrong_shapes_are_named(wrong, message):
    arguments = {"drift": drift, "diffusion": diffusion} | wrong
    with pytest.raises(ValueError, match=message):
        fastsde.integrate(**arguments, x0=torch.ones(3, 2), t0=0.0, t1=1.0)


@pytest.mark.parametrize("n", [2, 4])
def test_a_vector_over_elements_is_no_diffusion(n):
    # With as many rows as elements it could be either; it is refused whatever the batch.
    with pytest.raises(ValueError, match=r"must return that shape, \(\d, 1\) or a number, real; it returned \(2,\)"):
        fastsde.integrate(drift, lambda x, t: torch.tensor([0.0, 1.0]), torch.ones(n, 2), 0.0, 1.0)


def test_the_diffusion_may_be_a_number_a_row_or_a_state_in_any_precision():
    x0 = torch.ones(3, 2)
    forms = [
        lambda x, t: 0.1,
        lambda x, t: torch.tensor(0.1, dtype=torch.float64),
        lambda x, t: torch.full((len(x), 1), 0.1),
        lambda x, t: torch.full_like(x, 0.1, dtype=torch.float64),
    ]
    runs = [fastsde.integrate(drift, form, x0, 0.0, 1.0, steps=5, dense=True) for form in forms]
    for run in runs:
        assert torch.equal(run.samples, runs[0].samples)
        assert run.trajectory[0].x.dtype == torch.float32


@pytest.mark.parametrize(
    "times", [[0.3], np.linspace(0, 1, 11), torch.linspace(0, 1, 11)], ids=["list", "numpy", "torch"]
)
def test_times_to_save_need_not_match_the_grid_to_the_last_bit(times):
    r = fastsde.integrate(lambda x, t: -x, None, torch.ones(2, 2), 0.0, 1.0, steps=10, save_at=times)
    assert [len(path.t) for path in r.trajectory] == [len(times)] * 2
    with pytest.raises(ValueError, match=r"save_at has times that are not on the grid: \[0.35\]"):
        fastsde.integrate(lambda x, t: -x, None, torch.ones(2, 2), 0.0, 1.0, steps=10, save_at=[0.35])
