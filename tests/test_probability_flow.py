"""The probability flow: orders, parity with torchdiffeq, encoding, trajectories."""

import numpy as np
import pytest
import torch
from oracles import SDES, GivenNoise, bind, flow_map
from torchdiffeq import odeint

import fastsde
from fastsde import DDIM, EDM, HEUN, VPSDE, Ancestral, ExponentialPC, Grid, ProbabilityFlow, ProbabilityFlowODE
from fastsde.score import GaussianScore, MixtureScore


def two_clusters(sde):
    """A wide component, and a rare one so narrow that samples near it need more steps."""
    means = torch.tensor([[1.0, 0.5, -0.5], [-1.0, 0.0, 0.3]], dtype=torch.float64)
    basis = torch.eye(3, dtype=torch.float64).expand(2, 3, 3).contiguous()
    variances = torch.tensor([[0.3, 0.2, 0.25], [1e-5, 2e-5, 1e-5]], dtype=torch.float64)
    return MixtureScore(sde, torch.tensor([0.9, 0.1], dtype=torch.float64), means, basis, variances)


def start(sde, n, d=3):
    return sde.prior_std * torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def gaussian(sde):
    return GaussianScore(sde, torch.full((3,), 0.2), torch.linspace(0.2, 0.6, 3, dtype=torch.float64))


@pytest.mark.long
@pytest.mark.parametrize("name", SDES)
def test_adaptive_steps_solve_every_process(name):
    sde = SDES[name]
    model, x = gaussian(sde), start(sde, 5)
    exact = flow_map(model, x, sde.t_max, sde.t_min)
    errors = []
    for rtol in (1e-3, 1e-6):
        r = fastsde.sample(model, x_init=x, solver=ProbabilityFlow(), rtol=rtol, atol=rtol / 10, denoise=False)
        assert r.success.all()
        # One turn of 6 calls to start, then 6 for each attempt: the last slope of a step is the first of the next.
        assert r.nfe.tolist() == (6 * (1 + r.accepted + r.rejected)).tolist()
        errors.append(float((r.samples - exact).abs().max()))
    # Ten to fifty steps of relative error rtol, on a contracting flow. (A table of betas has kinks: fewer digits.)
    assert errors[0] < 1e-2
    assert errors[1] < 2e-5


def test_the_last_slope_gives_the_denoised_sample():
    model = gaussian(VPSDE())
    state = fastsde.sample(model, n=4, solver=ProbabilityFlow(), denoise=False, dtype=torch.float64)
    denoised = fastsde.sample(model, n=4, solver=ProbabilityFlow(), dtype=torch.float64)
    assert denoised.nfe.tolist() == state.nfe.tolist()
    t = torch.full((4,), model.sde.t_min, dtype=torch.float64)
    torch.testing.assert_close(denoised.samples, model(state.samples, t).x_0, rtol=1e-9, atol=1e-9)


def solve_with_torchdiffeq(model, x, method="dopri5", points=2, **tolerances):
    """The end of the flow and the calls; it must be told not to step beyond t_min."""
    times = torch.linspace(model.sde.t_max, model.sde.t_min, points, dtype=torch.float64)
    ode = ProbabilityFlowODE(model)
    options = {} if method == "rk4" else {"options": {"step_t": times[1:]}}
    return odeint(ode, x, times, method=method, **options, **tolerances)[-1], ode.nfe


@pytest.mark.long
def test_parity_with_torchdiffeq_and_fewer_calls():
    sde = VPSDE()
    model, x = two_clusters(sde), start(sde, 256)
    theirs, _ = solve_with_torchdiffeq(model, x, rtol=1e-8, atol=1e-9)
    ours = fastsde.sample(model, x_init=x, solver=ProbabilityFlow(), rtol=1e-8, atol=1e-9, denoise=False)
    # Both have about 1e-8 per step; the requirement is 1e-6.
    torch.testing.assert_close(ours.samples, theirs, rtol=0, atol=1e-6)
    # The batch pays for its hardest rows, a row of ours for itself: here 147 calls on average, and less
    # than half the error of their 218 for everyone.
    loose, calls = solve_with_torchdiffeq(model, x, rtol=1e-6, atol=1e-7)
    r = fastsde.sample(model, x_init=x, solver=ProbabilityFlow(), rtol=1e-6, atol=1e-7, denoise=False)
    assert (r.samples - ours.samples).square().mean() <= (loose - ours.samples).square().mean()
    assert float(r.nfe.double().mean()) < 0.85 * calls
    assert int(r.nfe.max()) > 1.5 * int(r.nfe.min())


@pytest.mark.long
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4"])
def test_the_ode_for_other_libraries_is_the_same_ode(method):
    sde = VPSDE(0.5, 3.0, t_min=0.05)
    model, x = gaussian(sde), start(sde, 5)
    end, calls = solve_with_torchdiffeq(model, x, method, 101 if method == "rk4" else 2, rtol=1e-8, atol=1e-9)
    # 1e-8 per step; 100 steps of fourth order on a mild flow.
    torch.testing.assert_close(end, flow_map(model, x, sde.t_max, sde.t_min), rtol=0, atol=1e-6)
    if method == "rk4":
        assert calls == 400


def test_the_ode_takes_a_time_for_each_row():
    model, x = gaussian(VPSDE()), start(VPSDE(), 3)
    ode, t = ProbabilityFlowODE(model), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    rows = torch.cat([ode(float(time), x[i : i + 1]) for i, time in enumerate(t)])
    torch.testing.assert_close(ode(t, x), rows, rtol=1e-14, atol=0)
    assert ode.nfe == 4


def test_heun_embeds_euler():
    """One adaptive step by hand: y' = y + H k1 (Euler), y'' = y + H (k1 + k2) / 2, error (k2 - k1) H / 2."""
    sde, x = EDM(t_max=2.0, t_min=0.5), start(EDM(t_max=2.0), 4)
    model = two_clusters(sde)
    solver = ProbabilityFlow(tableau=HEUN)
    t, s = torch.full((4,), 2.0, dtype=torch.float64), torch.full((4,), 1.5, dtype=torch.float64)
    bound = bind(model, 4)
    step = solver.step(bound, sde, x, t, s, GivenNoise(x), {})
    k1 = model(x, t).epsilon
    k2 = model(x - 0.5 * k1, s).epsilon
    torch.testing.assert_close(step.x, x - 0.25 * (k1 + k2), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(step.error, -0.25 * (k2 - k1), rtol=1e-12, atol=1e-13)
    assert bound.nfe.tolist() == [2] * 4


@pytest.mark.long
@pytest.mark.parametrize("name", ["VPSDE", "VESDE", "RectifiedFlow"])
def test_encoding_inverts_sampling(name):
    sde = SDES[name]
    model = gaussian(sde)
    x = 0.2 + 0.5 * torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    code = fastsde.encode(model, x=x, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(code.samples, flow_map(model, x, sde.t_min, sde.t_max), rtol=1e-6, atol=1e-6)
    back = fastsde.sample(model, x_init=code.samples, solver=ProbabilityFlow(), rtol=1e-8, atol=1e-9, denoise=False)
    torch.testing.assert_close(back.samples, x, rtol=0, atol=1e-6)


@pytest.mark.long
def test_ddim_inversion_has_order_one_and_walks_the_same_grid():
    model, x = gaussian(VPSDE()), 0.3 * torch.ones(2, 3, dtype=torch.float64)
    steps, errors = (50, 100, 200), []
    for k in steps:
        grid = Grid.log_snr(model.sde, k)
        code = fastsde.encode(model, x=x, solver=DDIM(), controller=grid)
        assert code.nfe.tolist() == [k, k]
        back = fastsde.sample(model, x_init=code.samples, solver=DDIM(), controller=grid, denoise=False)
        errors.append(float((back.samples - x).norm()))
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(1, abs=0.15)  # measured 1.0


def test_encoding_refuses_noise():
    model = gaussian(VPSDE())
    for solver in (Ancestral(5), DDIM(5, eta=0.5), ExponentialPC(5, eta=1.0)):
        with pytest.raises(ValueError, match="only a deterministic solver"):
            fastsde.encode(model, x=torch.zeros(2, 3), solver=solver)


def test_trajectories_hold_the_states_on_the_way():
    model = gaussian(VPSDE())
    r = fastsde.sample(model, n=5, trajectory=True, denoise=False, batch_size=2, dtype=torch.float64)
    for i, path in enumerate(r.trajectory):
        assert len(path.t) == int(r.accepted[i]) + 1
        assert (path.t[0], path.t[-1]) == (model.sde.t_max, model.sde.t_min)
        assert (path.t.diff() < 0).all()
        assert torch.equal(path.x[-1], r.samples[i])
    # Adaptive steps stop at given times; on the flow of a Gaussian the states there are known.
    x, times = start(model.sde, 3), [0.9, 0.5, 0.1]
    r = fastsde.sample(model, x_init=x, solver=ProbabilityFlow(), rtol=1e-7, atol=1e-8, trajectory=times, denoise=False)
    for i, path in enumerate(r.trajectory):
        assert path.t.tolist() == times
        for t, state in zip(times, path.x, strict=True):
            torch.testing.assert_close(state, flow_map(model, x, 1.0, t)[i], rtol=1e-5, atol=1e-5)


def test_keeping_states_does_not_change_the_samples():
    model = gaussian(VPSDE())
    plain = fastsde.sample(model, n=4, solver=ExponentialPC(12, eta=1.0))
    kept = fastsde.sample(model, n=4, solver=ExponentialPC(12, eta=1.0), trajectory=True)
    assert torch.equal(plain.samples, kept.samples)
    assert [len(path.t) for path in kept.trajectory] == [13] * 4


@pytest.mark.parametrize(
    ("times", "message"),
    [([0.5, 1.5], r"times from 0.001 to 1.0; got \[1.5\]"), ([], "times from"), ([0.5], "not on the grid")],
)
def test_trajectory_times_are_checked(times, message):
    with pytest.raises(ValueError, match=message):
        fastsde.sample(gaussian(VPSDE()), n=2, solver=DDIM(7), trajectory=times)


@pytest.mark.long
@pytest.mark.parametrize("name", SDES)
def test_default_tolerances_are_safe_on_every_process(name):
    """A step from much noise to none has a tiny error estimate and a large error: it must not be taken."""
    sde = SDES[name]
    model, n = GaussianScore(sde, torch.zeros(8), torch.full((8,), 0.5)), 200
    for tableau in (fastsde.DORMAND_PRINCE, HEUN):
        solver = ProbabilityFlow(tableau=tableau)
        r = fastsde.sample(model, n=n, solver=solver, denoise=False, batch_size=n, dtype=torch.float64)
        t = torch.tensor([sde.t_min], dtype=torch.float64)
        exact = float((sde.alpha(t) ** 2 * 0.25 + sde.sigma(t) ** 2).sqrt())
        # rtol is 0.05 (Heun's method: up to 7 %, as its errors have one sign); 1600 normals know a deviation to 2 %.
        assert float(r.samples.std()) == pytest.approx(exact, rel=0.12)


def test_stops_hold_on_the_way_back():
    model = gaussian(VPSDE())
    stops = fastsde.Adaptive(0.01, 0.001, r=0.2, stops=(0.5, 0.9))
    r = fastsde.encode(model, x=torch.full((2, 3), 0.3), controller=stops, trajectory=True)
    for path in r.trajectory:
        assert {0.5, 0.9} <= set(path.t.tolist())
    # The default plans in the log-SNR, mirrored here, and meets times to keep all the same.
    r = fastsde.encode(model, x=torch.full((2, 3), 0.3), trajectory=[0.9, 0.25])
    assert [path.t.tolist() for path in r.trajectory] == [[0.25, 0.9]] * 2
    with pytest.raises(ValueError, match=r"stops must lie within .*; got \[7.0\]"):
        fastsde.sample(model, n=2, controller=fastsde.Adaptive(0.01, 0.001, stops=(7.0,)))


def test_the_ode_evaluates_a_module_as_sample_does():
    class Dropping(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = torch.nn.Dropout()

        def forward(self, x, t):
            return -self.drop(x)

    network = Dropping()
    ode = ProbabilityFlowODE(network, VPSDE())
    x = torch.ones(4, 3)
    assert torch.equal(ode(0.5, x), ode(0.5, x))
    assert network.training


@pytest.mark.long
def test_a_grid_longer_than_the_usual_limit_is_walked():
    model = gaussian(VPSDE())
    model.calls = 1000
    r = fastsde.sample(model, n=1, solver=DDIM(11), denoise=False)
    assert (r.success.all(), int(r.nfe[0])) == (True, 11_000)  # beyond the limit where no grid says what is needed
    model.calls = 1
    limited = fastsde.sample(model, n=1, solver=DDIM(50), max_nfe=20)
    assert limited.status.tolist() == [fastsde.Status.MAX_NFE]
