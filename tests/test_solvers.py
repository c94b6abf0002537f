"""One-step formulas against independent transcriptions, and orders of convergence, measured."""

import itertools
import math

import numpy as np
import pytest
import torch
from oracles import MILD, GivenNoise, bind, curved, curved_model, exact_variance, fitted_order, vector
from scipy.integrate import solve_ivp

import fastsde
from fastsde import VPSDE, EulerMaruyama, ExtrapolatedEM, Grid
from fastsde.control import Verdict
from fastsde.noise import BrownianPath
from fastsde.score.analytic import GaussianScore, MixtureScore

each_mild = pytest.mark.parametrize("sde", MILD.values(), ids=MILD)
VARIANTS = [
    ExtrapolatedEM(extrapolate=extrapolate, lamba=lamba, reference=reference)
    for extrapolate in (True, False)
    for lamba in (True, False)
    for reference in ("previous", "current", "proposal")
]


# ---- one step, by hand ------------------------------------------------------------------------------------------


def algorithm_6(x, x_prev, t, h, z, *, atol, rtol, lamba, reference):
    """Algorithm 6 of the thesis for VP with its published constants, one scalar row at a time, in NumPy.

    Returns x', x'', the tolerance delta and the error E.
    """

    def beta(time):
        return 0.1 + time * (20.0 - 0.1)

    def drift(state, time):
        return -0.5 * beta(time) * state

    def g(time):
        return math.sqrt(beta(time))

    low = x - h * drift(x, t) + h * g(t) ** 2 * curved(x, t) + math.sqrt(h) * g(t) * z
    g_second = g(t) if lamba else g(t - h)
    second = x - h * drift(low, t - h) + h * g(t - h) ** 2 * curved(low, t - h) + math.sqrt(h) * g_second * z
    high = (low + second) / 2
    other = {"previous": np.abs(x_prev), "current": np.abs(x), "proposal": np.zeros_like(x)}[reference]
    delta = np.maximum(atol, rtol * np.maximum(np.abs(low), other))
    return low, high, delta, np.sqrt(np.mean(((low - high) / delta) ** 2))


@pytest.mark.parametrize("solver", VARIANTS, ids=repr)
def test_extrapolated_step_is_algorithm_6(solver):
    generator = np.random.default_rng(0)
    x, x_prev, z = generator.normal(size=(3, 4, 5))
    t, h = np.array([0.9, 0.5, 0.2, 0.011]), np.array([0.05, 0.001, 0.1, 0.01])
    sde, dw = VPSDE(), np.sqrt(h)[:, None] * z
    carry = {"previous": torch.from_numpy(x_prev)} if solver.reference == "previous" else {}
    model, args = bind(curved_model(sde), 4), [torch.from_numpy(a) for a in (x, t, t - h)]
    step = solver.step(model, sde, *args, GivenNoise(torch.from_numpy(dw)), carry)
    control = fastsde.Adaptive(rtol=0.05, atol=0.0078)
    decision = control.update(
        args[1], args[2], 1e-3, step.error, step.scale, control.init(torch.ones_like(args[1]), 1e-3)
    )
    for row in range(4):
        low, high, delta, error = algorithm_6(
            x[row],
            x_prev[row],
            t[row],
            h[row],
            z[row],
            atol=0.0078,
            rtol=0.05,
            lamba=solver.lamba,
            reference=solver.reference,
        )
        # Two orders of the same few operations: roundings of 1e-16 on numbers up to 10.
        close = {"rtol": 1e-12, "atol": 1e-14}
        np.testing.assert_allclose(step.x[row], high if solver.extrapolate else low, **close)
        np.testing.assert_allclose(step.error[row], low - high, **close)
        np.testing.assert_allclose(np.maximum(0.0078, 0.05 * step.scale[row].numpy()), delta, **close)
        assert (decision.verdict[row] == Verdict.ACCEPT) == (error <= 1)
        # Our two changes: h grows at most tenfold, and has six bits (at most 1/32 below) or whole units of 2^-16.
        wanted = min(h[row] * min(0.9 * error**-0.9, 10), 0.999)
        assert wanted * (1 - 1 / 32) - 2.0**-16 < decision.carry["h"][row] < wanted * (1 + 1 / 64) + 2.0**-16
        if solver.reference == "previous":
            np.testing.assert_allclose(step.carry["previous"][row], low, **close)
    assert model.nfe.tolist() == [2] * 4


def test_first_step_refers_to_the_start_state():
    x = torch.randn(3, 2)
    assert torch.equal(ExtrapolatedEM().init(x)["previous"], x)
    assert ExtrapolatedEM(reference="current").init(x) == {}


def test_euler_maruyama_step():
    x, dw, t, s = vector(1.0, -2.0)[:, None], vector(0.3, -0.1)[:, None], vector(0.8, 0.1), vector(0.7, 0.09)
    step = EulerMaruyama().step(bind(curved_model(VPSDE()), 2), VPSDE(), x, t, s, GivenNoise(dw), {})
    h, beta, time = (t - s)[:, None], 0.1 + 19.9 * t[:, None], t[:, None]
    # beta (x / 2 + score) is the drift in reversed time; roundings only.
    expected = x + h * beta * (x / 2 + curved(x, time)) + beta.sqrt() * dw
    torch.testing.assert_close(step.x, expected, rtol=1e-14, atol=1e-15)
    assert step.error is None
    assert step.scale is None


@pytest.mark.parametrize("solver", [EulerMaruyama(), *VARIANTS], ids=repr)
def test_rows_of_a_step_do_not_see_each_other(solver):
    sde, n = VPSDE(), 6
    generator = torch.Generator().manual_seed(0)
    x, dw, previous = torch.randn(3, n, 4, dtype=torch.float64, generator=generator)
    # One row of infinities must stay alone as well.
    x[2] = math.inf
    t = torch.linspace(0.2, 1.0, n, dtype=torch.float64)
    s = t - torch.linspace(0.1, 0.001, n, dtype=torch.float64)
    carry = {"previous": previous} if solver.init(x) else {}
    joint = solver.step(bind(curved_model(sde), n), sde, x, t, s, GivenNoise(dw), carry)
    for i in range(n):
        row = slice(i, i + 1)
        own = {key: value[row] for key, value in carry.items()}
        alone = solver.step(bind(curved_model(sde), 1), sde, x[row], t[row], s[row], GivenNoise(dw[row]), own)
        for name in ("x", "error", "scale"):
            if getattr(alone, name) is not None:
                # Vectorised and scalar kernels may round elementary functions differently by an ulp.
                torch.testing.assert_close(
                    getattr(joint, name)[row], getattr(alone, name), rtol=1e-15, atol=1e-15, equal_nan=True
                )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EulerMaruyama(steps=0), "steps must be an integer of at least 1; got 0"),
        (lambda: ExtrapolatedEM(reference="best"), "one of previous, current, proposal; got 'best'"),
    ],
)
def test_refusals_name_what_came_and_what_is_allowed(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# ---- order without noise ------------------------------------------------------------------------------------------


def walk(solver, model, sde, times, x):
    """The solver along the given times with no noise."""
    carry = solver.init(x)
    for t, s in itertools.pairwise(times):
        step = solver.step(
            bind(model, len(x)), sde, x, t.expand(len(x)), s.expand(len(x)), GivenNoise(torch.zeros_like(x)), carry
        )
        x, carry = step.x, step.carry
    return x


@pytest.mark.long
@pytest.mark.parametrize(
    ("solver", "order"),
    [
        (EulerMaruyama(), 1),
        (ExtrapolatedEM(), 2),
        (ExtrapolatedEM(lamba=True), 2),
        (ExtrapolatedEM(extrapolate=False), 1),
    ],
    ids=repr,
)
def test_order_without_noise(solver, order):
    """What is left is an ordinary differential equation, on which x' is Euler's method and x'' is Heun's."""
    sde, x = MILD["VPSDE"], vector(-2.0, 0.3, 1.0)[:, None]

    def slope(t, y):
        return -0.5 * (0.5 + 2.5 * t) * y - (0.5 + 2.5 * t) * curved(y, t)

    # An independent integrator, eight digits beyond the smallest error below.
    exact = solve_ivp(slope, (sde.t_max, sde.t_min), x[:, 0].numpy(), method="DOP853", rtol=1e-12, atol=1e-13).y[:, -1]
    steps = (16, 32, 64, 128)
    ends = [walk(solver, curved_model(sde), sde, Grid.uniform(sde, n).times, x)[:, 0].numpy() for n in steps]
    # The next term of the error series still shifts the slope by about 1/16 of an order on the coarsest grid.
    assert fitted_order(steps, [np.abs(end - exact).max() for end in ends]) == pytest.approx(order, abs=0.1)


# ---- weak order, without sampling -----------------------------------------------------------------------------------


def moments_after(solver, sde, data_mean, std, times):
    """Mean and variance of the numerical solution for Gaussian data, exactly: each step is an affine map of (x, z).

    The map is read off by probing the step with x and z equal to 0 or 1.
    """
    model = GaussianScore(sde, vector(data_mean), vector(std))
    start = vector(sde.t_max)
    mean, variance = float(sde.alpha(start)) * data_mean, float(exact_variance(sde, std, start))
    x, z = vector(0.0, 1.0, 0.0)[:, None], vector(0.0, 0.0, 1.0)[:, None]
    for t, s in itertools.pairwise(times):
        given = GivenNoise((t - s).sqrt() * z, t.expand(3), s.expand(3))
        step = solver.step(bind(model, 3), sde, x, t.expand(3), s.expand(3), given, solver.init(x))
        at_zero, at_x, at_z = step.x[:, 0].tolist()
        slope, noise = at_x - at_zero, at_z - at_zero
        mean, variance = slope * mean + at_zero, slope**2 * variance + noise**2
    return mean, variance


@pytest.mark.long
@each_mild
@pytest.mark.parametrize(
    ("solver", "orders"),
    [
        (EulerMaruyama(), (1, 1)),
        (ExtrapolatedEM(), (2, 2)),
        # x' as the result is Euler-Maruyama.
        (ExtrapolatedEM(extrapolate=False), (1, 1)),
        # g(t) dW in both halves has variance g(t)^2 h, one order short of that of the exact noise.
        (ExtrapolatedEM(lamba=True), (2, 1)),
        (fastsde.ReverseDiffusion(), (1, 1)),
        (fastsde.Ancestral(), (1, 1)),
        (fastsde.Ancestral(posterior=False), (1, 1)),
    ],
    ids=repr,
)
def test_weak_order_on_gaussian_data(sde, solver, orders):
    std, data_mean, end = 0.5, 1.5, vector(sde.t_min)
    exact = (float(sde.alpha(end)) * data_mean, float(exact_variance(sde, std, end)))
    steps = (64, 256)
    runs = [moments_after(solver, sde, data_mean, std, Grid.uniform(sde, n).times) for n in steps]
    for moment, order in enumerate(orders):
        errors = [abs(run[moment] - exact[moment]) for run in runs]
        if moment == 0 and max(errors) < 1e-13:
            continue  # Where the mean moves on a straight line, or not at all, every method is exact, or ancestral.
        # No Monte Carlo error: what is left is the next term of the series, about a tenth of an order on these grids.
        assert fitted_order(steps, errors) == pytest.approx(order, abs=0.12)


# ---- strong order ---------------------------------------------------------------------------------------------------

SAMPLES, FINE = 64, 2**9


def two_wells(sde):
    """A mixture in four dimensions, so that the drift is not linear."""
    means = torch.tensor([[0.6, 0.4, 0.0, -0.4], [-0.6, -0.2, 0.3, 0.4]], dtype=torch.float64)
    basis = torch.zeros(2, 4, 0, dtype=torch.float64)
    return MixtureScore(sde, vector(0.4, 0.6), means, basis, basis[:, 0], floor=0.5)


def fine_solution(sde, seed):
    """Euler-Maruyama by hand on a very fine grid along the Brownian paths of the first samples."""
    model, index = two_wells(sde), torch.arange(SAMPLES)
    path = BrownianPath(seed, (4,), torch.float64, t_min=sde.t_min, t_max=sde.t_max)
    times = torch.linspace(sde.t_max, sde.t_min, FINE + 1, dtype=torch.float64)
    w = path(index.repeat(FINE + 1), times.repeat_interleave(SAMPLES)).reshape(FINE + 1, SAMPLES, 4)
    x, h = path.prior(index) * sde.prior_std, (sde.t_max - sde.t_min) / FINE
    rows = times[:, None].expand(-1, SAMPLES)
    for t, f, g2, dw in zip(rows, sde.f(times), sde.g2(times), w[:-1] - w[1:], strict=False):
        x = x - h * (f * x - g2 * model.exact_score(x, t)) + g2.sqrt() * dw
    return x


@pytest.mark.long
@pytest.mark.parametrize("name", ["VPSDE", "VESDE"])
def test_strong_order_on_shared_paths(name):
    """Both methods have strong order 1, as the noise is additive; x'' has the smaller constant.

    x'' stops at 1 because a step sees its increment but not how the path ran inside the step.
    """
    sde, steps = MILD[name], (8, 16, 32)
    exact = fine_solution(sde, seed=3)
    errors = {}
    for solver in (EulerMaruyama(keep_path=True), ExtrapolatedEM()):
        runs = [
            fastsde.sample(
                two_wells(sde),
                n=SAMPLES,
                solver=solver,
                controller=Grid.uniform(sde, n),
                seed=3,
                denoise=False,
                batch_size=SAMPLES,
                dtype=torch.float64,
            )
            for n in steps
        ]
        errors[solver] = [(run.samples - exact).square().mean().sqrt() for run in runs]
        # Measured 0.95 to 1.06. 256 numbers know an error to about 5 %, and a slope over two doublings to about 0.05;
        # the reference is 16 times finer than the finest run. An order of 1/2 or 3/2 is far outside.
        assert fitted_order(steps, errors[solver]) == pytest.approx(1, abs=0.2)
    euler, extrapolated = errors.values()
    # Measured 0.3 (VP) and 0.2 (VE).
    assert all(b < 0.5 * a for a, b in zip(euler, extrapolated, strict=True))
