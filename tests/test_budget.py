"""Budgets in calls, and the grid that they are spent on."""

import pytest
import torch
from stubs import never

import fastsde
from fastsde import (
    DDIM,
    VPSDE,
    EulerMaruyama,
    ExponentialPC,
    Grid,
    Heun,
    PredictorCorrector,
    ProbabilityFlow,
    ScoreModel,
    UniPC,
)
from fastsde.score import GaussianScore
from fastsde.steps import own_grid

VP = VPSDE()


def gaussian(d=200):
    """Standard deviations of an image's spectrum, on which the shape of the grid matters at few calls."""
    return GaussianScore(VP, torch.zeros(d), torch.logspace(-0.5, -2, d))


# ---- nfe= -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("denoise", [True, False])
@pytest.mark.parametrize(
    "solver",
    [ExponentialPC(), ExponentialPC(eta=1.0), UniPC(), DDIM(), EulerMaruyama(), Heun(), ProbabilityFlow()],
    ids=lambda solver: type(solver).__name__,
)
def test_no_sample_exceeds_its_budget_and_one_step_more_would(solver, denoise):
    for nfe in (14, 15):
        r = fastsde.sample(gaussian(8), n=3, nfe=nfe, solver=solver, denoise=denoise)
        assert r.success.all()
        assert nfe - solver.calls_per_step < r.nfe.max() <= nfe


def test_a_call_that_counts_twice_is_paid_twice():
    model = gaussian(8)
    model.calls = 2
    assert fastsde.sample(model, n=2, nfe=21).nfe.tolist() == [20, 20]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nfe": 1}, "nfe must be at least 2 for one step of ExponentialPC; got 1"),
        ({"nfe": 0}, "nfe must be an integer of at least 1; got 0"),
        ({"nfe": 12, "rtol": 0.1}, "give either nfe= or rtol, not both"),
        ({"nfe": 12, "solver": DDIM(steps=5)}, "give either nfe= or solver.steps, not both"),
        ({"nfe": 12, "controller": Grid([1.0, 0.1])}, "give either controller= or nfe, not both"),
        ({"nfe": 2, "solver": PredictorCorrector()}, "nfe must be at least"),
    ],
)
def test_budget_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        fastsde.sample(ScoreModel(never, VP, event_shape=(2,)), n=2, **options)


def test_the_tapered_grid():
    times = Grid.tapered(VP, 8).times
    lengths = VP.log_snr(times).diff()
    torch.testing.assert_close(lengths / lengths[1], torch.tensor([2, 1, 1, 1, 1, 1, 0.85, 0.7]).double())
    lengths = VP.log_snr(Grid.tapered(VP, 8, first=1.0).times).diff()
    torch.testing.assert_close(lengths / lengths[1], torch.tensor([1, 1, 1, 1, 1, 1, 0.85, 0.7]).double())
    assert times[0] == VP.t_max
    assert times[-1] == VP.t_min
    # Too few steps to taper.
    for steps in (1, 3, 6):
        equal = Grid.tapered(VP, steps, first=1.0)
        torch.testing.assert_close(equal.times, Grid.log_snr(VP, steps).times, rtol=1e-12, atol=0)
        lengths = VP.log_snr(Grid.tapered(VP, steps).times).diff()[1:]
        torch.testing.assert_close(lengths, lengths.flip(0), rtol=1e-9, atol=0)


def test_the_first_step_is_longer_only_in_pure_noise():
    # With 4 steps two would end below sigma / alpha = 10: the first ends there instead, and the others are equal.
    log_snr = VP.log_snr(Grid.tapered(VP, 4).times)
    torch.testing.assert_close((-log_snr[1] / 2).exp(), torch.tensor(10.0).double(), rtol=1e-9, atol=0)
    torch.testing.assert_close(log_snr[1:].diff(), log_snr[1:].diff().mean().expand(3), rtol=1e-9, atol=0)
    # A process that starts near the data, as that of latents does, has no such step, and nor has one step alone.
    near = fastsde.VPSDE(t_max=0.5)
    torch.testing.assert_close(Grid.tapered(near, 4).times, Grid.log_snr(near, 4).times, rtol=1e-12, atol=0)
    assert Grid.tapered(VP, 1).times.tolist() == [VP.t_max, VP.t_min]


FLOW = fastsde.RectifiedFlow()
TABLE = fastsde.DiscreteVPSDE(torch.linspace(1e-3, 0.2, 100, dtype=torch.float64))
LONG = fastsde.DiscreteVPSDE(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))


@pytest.mark.parametrize("steps", [1, 3, 7, 30])
def test_the_central_grid_of_a_flow_has_equal_steps_in_its_time(steps):
    expected = FLOW.t_max * (1 - torch.arange(steps + 1).double() / (steps + 1))
    torch.testing.assert_close(Grid.central(FLOW, steps).times, expected, rtol=1e-12, atol=0)
    # From the middle of the process too, and no further than its end.
    times = Grid.central(fastsde.RectifiedFlow(t_min=0.1, t_max=0.5), steps).times
    torch.testing.assert_close(times, torch.linspace(0.5, max(0.1, 0.5 / (steps + 1)), steps + 1).double())
    assert times[0] == 0.5


@pytest.mark.parametrize("sde", [VP, FLOW, TABLE, fastsde.EDM(), fastsde.VESDE()], ids=lambda sde: type(sde).__name__)
def test_the_central_grid_is_one_in_every_dressing(sde):
    for width in (0.7, 1.0, 1.5, 3.0):
        times = Grid.central(sde, 9, width).times
        rho = (-sde.log_snr(times) / 2).exp()
        v = 1 / (1 + rho ** (1 / width))
        torch.testing.assert_close(v.diff(), v.diff().mean().expand(9), rtol=1e-6, atol=0)
        share = rho / (1 + rho)
        least = float((-sde.log_snr(torch.tensor([sde.t_min]).double()) / 2).exp())
        assert float(share[-1]) == pytest.approx(max(float(share[0]) / 10, least / (1 + least)), rel=1e-9)
    # With enough steps it goes to the end, exactly; and a large width is nearly equal steps in log-SNR.
    assert Grid.central(sde, 20_000).ends == (sde.t_max, sde.t_min)
    lengths = sde.log_snr(Grid.central(sde, 9, 1000.0).times).diff()
    torch.testing.assert_close(lengths, lengths.mean().expand(9), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("sde", "width"), [(FLOW, 1.2), (TABLE, 100.0), (LONG, None), (VP, None)])
def test_which_process_has_which_grid(sde, width):
    model = GaussianScore(sde, torch.zeros(2), torch.ones(2))
    expected = (
        Grid.tapered(sde, 9) if width is None else Grid.central(sde, 9, width, first=1.0 if sde is FLOW else None)
    )
    r = fastsde.sample(model, n=1, nfe=10, trajectory=True)
    assert torch.equal(r.trajectory[0].t, expected.times)
    # The state at t_min is asked for, and given.
    r = fastsde.sample(model, n=1, nfe=10, trajectory=True, denoise=False)
    assert torch.equal(r.trajectory[0].t, Grid.tapered(sde, 9).times)


@pytest.mark.parametrize("steps", [1, 2, 7, 24, 100])
@pytest.mark.parametrize("sde", [FLOW, TABLE], ids=["flow", "table"])
def test_the_central_grid_on_cells_of_the_whole_process(sde, steps):
    plain, grid = (own_grid(sde, ExponentialPC(eta=eta), steps) for eta in (0.0, 1.0))
    start, end = sde.log_snr(torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)).tolist()
    before, after = ((sde.log_snr(g.times) - start) / (end - start) for g in (plain, grid))
    cells = after * 2.0**20
    assert float((cells - cells.round()).abs().max()) < 1e-4
    # No step has moved by more than a quarter of the shortest at either end.
    assert float((after - before).abs().max()) <= 0.25 * float(before.diff().min())


def test_a_longer_first_step_of_the_central_grid_ends_in_pure_noise():
    for steps in (3, 9, 30):
        log_snr = TABLE.log_snr(Grid.central(TABLE, steps, 10.0, first=None).times)
        v = torch.sigmoid(log_snr / 20)
        ratio = float((v[1] - v[0]) / (v[2] - v[1]))
        assert ratio == pytest.approx(2.0) or float((-log_snr[1] / 2).exp()) == pytest.approx(10.0)
        assert float((-log_snr[1] / 2).exp()) >= 10 * (1 - 1e-9)
    # One that starts closer to the data has none.
    near = fastsde.RectifiedFlow(t_max=0.5)
    assert torch.equal(Grid.central(near, 9, first=None).times, Grid.central(near, 9).times)


@pytest.mark.parametrize("width", [0.0, -1.0, float("nan")])
def test_a_central_grid_of_no_width_is_refused(width):
    with pytest.raises(ValueError, match="width must be a positive"):
        Grid.central(VP, 8, width)


def test_grids_are_rounded_for_the_path_of_noise_alone():
    for eta in (0.0, 1.0):
        r = fastsde.sample(gaussian(2), n=1, nfe=25, solver=ExponentialPC(eta=eta), trajectory=True)
        log_snr = VP.log_snr(r.trajectory[0].t)
        cells = (log_snr - log_snr[0]) / (log_snr[-1] - log_snr[0]) * 512  # 16 for each of 24 steps, to a power of 2
        assert torch.equal(r.trajectory[0].t, Grid.tapered(VP, 24).times) == (eta == 0.0)
        assert bool(((cells - cells.round()).abs() < 1e-9).all()) == (eta == 1.0)


@pytest.mark.parametrize("first", [0.0, float("nan"), 11.0])
def test_a_first_step_of_no_length_is_refused(first):
    with pytest.raises(ValueError, match="first must be in"):
        Grid.tapered(VP, 8, first=first)
