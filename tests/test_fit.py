"""Solvers fitted to a network: what they compute, that they are better, and whom they refuse."""

import functools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stubs import Recorder, never
from torch import nn

import fastsde
from fastsde import VPSDE, DiscreteVPSDE, ExponentialPC, FittedSolver, Grid, RectifiedFlow, ScoreModel
from fastsde.arguments import resolve_samples
from fastsde.fitting.pilots import Pilots
from fastsde.score import GaussianScore, MixtureScore
from fastsde.solvers.fitted import standard_weights

pytestmark = pytest.mark.long
VP = VPSDE()


@functools.cache
def images(sde=VP, d=64):
    """Standard deviations of an image's spectrum."""
    return GaussianScore(sde, torch.zeros(d), torch.logspace(-0.5, -2, d))


@functools.cache
def clusters(sde=VP, d=16):
    """Four narrow clusters, between which samples are decided."""
    generator = torch.Generator().manual_seed(0)
    means = 0.4 * torch.randn(4, d, generator=generator, dtype=torch.float64)
    covariances = torch.eye(d, dtype=torch.float64).expand(4, d, d) * 0.01
    return MixtureScore.from_covariances(sde, torch.full((4,), 0.25), means, covariances)


class Network(nn.Module):
    """The score of some Gaussian as a network with a weight, which counts rows and can be interrupted."""

    def __init__(self, scale=1.0, until=math.inf):
        super().__init__()
        self.scale, self.rows, self.until = nn.Parameter(torch.tensor(scale)), 0, until
        self.law = images()

    def forward(self, x, t):
        self.rows += len(x)
        if self.rows > self.until:
            raise KeyboardInterrupt
        return self.scale * self.law.exact_score(x, t)


def counted(scale=1.0):
    return ScoreModel(Network(scale), VP, event_shape=(64,))


def error(model, n=200, **options):
    """Mean over samples of the distance to the end of the probability flow, over the spread of the samples.

    Not the root of the mean square, which is that of the few samples that end in another cluster.
    """
    z, fine = accurate(model, n)
    x = fastsde.sample(model, x_init=z, batch_size=n, **options).samples
    return float((x - fine).square().mean(1).sqrt().mean() / fine.std())


@functools.cache
def accurate(model, n):
    """Start states, and the ends of their flow."""
    z = torch.randn(n, *model.event_shape, generator=torch.Generator().manual_seed(4)) * model.sde.prior_std
    return z, fastsde.sample(model, x_init=z, batch_size=n, controller=Grid.log_snr(model.sde, 200)).samples


def as_fitted(sde, times, eta=0.0, **options):
    log_snr = sde.log_snr(torch.as_tensor(times, dtype=torch.float64)).tolist()
    return FittedSolver(eta=eta, times=tuple(times), log_snr=tuple(log_snr), **options)


# ---- what it computes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sde", [VP, RectifiedFlow()], ids=["VP", "flow"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("levels", [2, 3, 9])
def test_standard_weights_do_what_the_predictor_corrector_does(sde, eta, levels):
    model, grid = images(sde), Grid.log_snr(sde, levels - 1)
    weights = standard_weights(sde, grid.times.tolist(), eta)
    fitted = as_fitted(sde, grid.times.tolist(), eta, weights=weights)
    options = {"n": 5, "seed": 3, "dtype": torch.float64}
    # The norm of a Gaussian's D grows on the way, so the rule for a first value changes nothing.
    theirs = fastsde.sample(model, solver=ExponentialPC(eta=eta), controller=grid, **options)
    ours = fastsde.sample(model, solver=fitted, **options)
    # The sums are the same, in another order and with plans in float64.
    torch.testing.assert_close(ours.samples, theirs.samples, rtol=0, atol=1e-9)
    assert ours.nfe.tolist() == [levels] * 5


def test_without_weights_it_is_the_predictor_corrector():
    grid = Grid.tapered(VP, 7)
    plain = fastsde.sample(clusters(), n=4, controller=grid).samples
    assert torch.equal(fastsde.sample(clusters(), n=4, solver=as_fitted(VP, grid.times.tolist())).samples, plain)


def test_the_sample_is_the_sum_that_the_weights_say():
    """By hand, for one step: y_1 = a y_0 + w D_0 and x = v_0 D_1 + v_1 D_0."""
    model, times = clusters(), [1.0, 0.3]
    fitted = as_fitted(VP, times, weights=((0.02, 0.7),), output=(1.25, -0.25))
    x = torch.randn(3, 16, dtype=torch.float64)
    t, s = (torch.full((3,), v, dtype=torch.float64) for v in times)
    first = model(x, t).x_0
    y = 0.02 * x / VP.alpha(t)[:, None] + 0.7 * first
    last = model(VP.alpha(s)[:, None] * y, s).x_0
    found = fastsde.sample(model, x_init=x, solver=fitted).samples
    torch.testing.assert_close(found, 1.25 * last - 0.25 * first, rtol=1e-9, atol=1e-9)


def test_a_guess_takes_the_place_of_the_first_prediction():
    """The same by hand, with a number for D_0 and no call there."""
    times, guess = [1.0, 0.3], tuple(torch.linspace(-1, 1, 16).tolist())
    fitted = as_fitted(VP, times, weights=((0.02, 0.7),), output=(1.25, -0.25), guess=guess)
    network = Recorder(clusters().exact_score)
    model = ScoreModel(network, VP, event_shape=(16,))
    x, s = torch.randn(3, 16, dtype=torch.float64), torch.full((3,), 0.3, dtype=torch.float64)
    first = torch.tensor(guess).double()
    y = 0.02 * x / VP.alpha(torch.ones(3, dtype=torch.float64))[:, None] + 0.7 * first
    last = model(VP.alpha(s)[:, None] * y, s).x_0
    network.calls.clear()
    r = fastsde.sample(model, x_init=x, solver=fitted, batch_size=2)
    torch.testing.assert_close(r.samples, 1.25 * last - 0.25 * first, rtol=1e-9, atol=1e-9)
    assert (r.nfe == 1).all()
    assert sum(len(call[1]) for call in network.calls) == 3
    with pytest.raises(ValueError, match="was fitted to samples of 16 elements"):
        fastsde.sample(lambda x, t: -x, VP, shape=(2, 4), solver=fitted)


def test_the_guess_is_the_mean_of_the_data():
    mean = torch.linspace(-0.5, 0.5, 8)
    for sde in (VP, RectifiedFlow()):
        fitted = fastsde.fit(GaussianScore(sde, mean, torch.full((8,), 0.2)), nfe=3, pilots=8)
        # D at t_max is the mean, but for alpha std^2 / sigma^2 of the noise, averaged over 8 pilots.
        torch.testing.assert_close(torch.tensor(fitted.guess), mean, rtol=0, atol=1e-2)
    assert fastsde.fit(images(), nfe=3, pilots=8, guess=False).guess == ()


def test_a_network_without_a_common_prediction_gets_no_guess():
    """Two classes far apart: pure noise is predicted as the mean of the sample's own class."""

    def network(x, t, label):
        alpha, sigma = VP.alpha(t.double())[:, None], VP.sigma(t.double())[:, None]
        mean = (2.0 * label.double() - 1)[:, None]
        return ((alpha * mean - x) / (alpha**2 * 0.01 + sigma**2)).to(x.dtype)

    model = ScoreModel(network, VP, event_shape=(4,))
    fitted = fastsde.fit(model, nfe=3, cond={"label": torch.arange(12) % 2})
    assert fitted.guess == ()


def test_a_sample_does_not_depend_on_its_batch():
    fitted = fastsde.fit(images(), nfe=4, pilots=8, calls=2000)
    every = fastsde.sample(images(), n=7, solver=fitted, batch_size=7)
    few = fastsde.sample(images(), index=[5, 2], solver=fitted, batch_size=1)
    torch.testing.assert_close(few.samples, every.samples[[5, 2]], rtol=1e-5, atol=1e-6)


@given(
    levels=st.integers(2, 6),
    eta=st.floats(0, 5),
    numbers=st.lists(st.floats(-1e3, 1e3), min_size=40, max_size=40),
)
@settings(max_examples=30, deadline=None)
def test_json_gives_the_same_solver_back(levels, eta, numbers):
    times = torch.linspace(0.9, 0.1, levels, dtype=torch.float64).tolist()
    weights = tuple(tuple(numbers[5 * k : 5 * k + min(k + 2, 5)]) for k in range(levels - 1))
    fitted = as_fitted(VP, times, eta, weights=weights, output=tuple(numbers[-2:]), record={"seed": 1})
    again = FittedSolver.from_json(json.loads(json.dumps(fitted.as_json())))
    assert (again, dict(again.record), repr(again)) == (fitted, dict(fitted.record), repr(fitted))


# ---- the fit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sde", [VP, RectifiedFlow(), fastsde.VESDE(), fastsde.EDM()], ids=["VP", "flow", "VE", "EDM"])
def test_where_the_flow_is_linear_the_fit_is_exact(sde):
    """For isotropic Gaussian data the end is a multiple of the start, which three calls can give."""
    model = GaussianScore(sde, torch.zeros(8), torch.full((8,), 0.5))
    fitted = fastsde.fit(model, nfe=3, pilots=12)
    default = error(model, nfe=3)
    # What is left is the error of the accurate solution.
    assert error(model, solver=fitted) < max(2e-3, 0.05 * default)


@pytest.mark.parametrize(("nfe", "least"), [(4, 0.6), (6, 0.8)])
@pytest.mark.parametrize("sde", [VP, RectifiedFlow()], ids=["VP", "flow"])
@pytest.mark.parametrize("make", [images, clusters])
def test_a_fit_is_better_than_the_default(make, sde, nfe, least):
    model = make(sde)
    fitted = fastsde.fit(model, nfe=nfe, pilots=40)
    assert fitted.record["ratio"] < 1
    # Measured 0.05 to 0.41 with 4 calls and 0.1 to 0.6 with 6.
    assert error(model, solver=fitted) < least * error(model, nfe=nfe)


def test_levels_alone_weights_alone_and_both():
    model, times = images(), Grid.tapered(VP, 4).times.tolist()
    weights_alone = fastsde.fit(model, times=times, pilots=24)
    levels_alone = fastsde.fit(model, nfe=5, history=0, pilots=24)
    both = fastsde.fit(model, nfe=5, pilots=24)
    assert weights_alone.times == tuple(times)
    assert levels_alone.weights == standard_weights(VP, levels_alone.times)
    assert levels_alone.output == (1.0,)
    errors = [error(model, solver=fitted) for fitted in (both, weights_alone, levels_alone)]
    # Measured 0.014, 0.07 and 0.09 beside 0.13 of the default.
    assert errors[0] < min(errors[1:])
    assert max(errors) < error(model, nfe=5)


def test_three_pilots_agree():
    errors = [error(images(), solver=fastsde.fit(images(), nfe=5, pilots=24, seed=seed)) for seed in range(3)]
    # Measured 0.05 at most, below a 25th of the samples' size, from where on a fit sees no difference.
    assert max(errors) < 0.1 * error(images(), nfe=5)


def far_and_tight():
    """A smooth Gaussian, and one sample in ten in a tight cluster far away."""
    d = 32
    means = torch.stack([torch.zeros(d), 0.6 * torch.randn(d, generator=torch.Generator().manual_seed(0))]).double()
    covariances = torch.stack([torch.logspace(-0.6, -2.6, d).diag(), 1e-4 * torch.eye(d)]).double()
    return MixtureScore.from_covariances(VP, torch.tensor([0.9, 0.1]), means, covariances)


def sixteen_scales():
    """Sixteen clusters from tight to wide."""
    k, d = 16, 64
    means = 0.3 * torch.randn(k, d, generator=torch.Generator().manual_seed(0)).double()
    covariances = torch.eye(d).double() * torch.logspace(-2, -0.6, k).double()[:, None, None] ** 2
    return MixtureScore.from_covariances(VP, torch.full((k,), 1 / k), means, covariances)


def errors_of_four_fits(model, n):
    """Root mean square errors of n samples by fits of 20 pilots each, with shape (4, n)."""
    z, fine = accurate(model, n)
    fits = [fastsde.fit(model, nfe=4, pilots=20, calls=6000, seed=seed) for seed in range(4, 8)]
    found = [fastsde.sample(model, x_init=z, batch_size=n, solver=fitted).samples for fitted in fits]
    return torch.stack([(x - fine).square().mean(1).sqrt() for x in found])


def test_pilots_that_end_in_another_mode_do_not_rule_the_others():
    """With 20 pilots about two are in the cluster. Too few calls cannot meet it: the others must be met even so."""
    errors = errors_of_four_fits(far_and_tight(), 200)
    # Measured 0.0016 at most; 0.024 where all pilots count alike.
    assert errors.median(1).values.max() < 0.004


def test_samples_that_are_no_pilots_end_in_the_right_mode():
    """Twenty pilots do not show how often samples change their mode. States near the accurate path change it less."""
    errors = errors_of_four_fits(sixteen_scales(), 400)
    # Measured 0.06 on average; 0.10 where the states are free, 0.12 where outliers count in full, too; default 0.7.
    assert (errors > 0.1).double().mean() < 0.08


def test_where_nothing_can_be_mended_the_default_stays():
    """Data at one point: D is constant, and every step exact."""

    def network(x, t):
        alpha, sigma = VP.alpha(t.double())[:, None], VP.sigma(t.double())[:, None]
        return ((alpha * 0.5 - x) / sigma**2).to(x.dtype)

    model = ScoreModel(network, VP, event_shape=(4,))
    fitted = fastsde.fit(model, nfe=4, pilots=8)
    assert fitted.weights == ()
    assert fitted.record["error"] <= fitted.record["default_error"] + 1e-6
    torch.testing.assert_close(
        fastsde.sample(model, n=3, solver=fitted).samples, torch.full((3, 4), 0.5), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_with_noise_the_end_of_the_same_path_is_met(eta):
    model = images(d=32)
    fitted = fastsde.fit(model, nfe=6, eta=eta, pilots=32, calls=10_000)
    index, solver = list(range(60)), ExponentialPC(eta=eta)
    fine = fastsde.sample(model, index=index, solver=solver, nfe=100).samples
    ours = fastsde.sample(model, index=index, solver=fitted).samples
    theirs = fastsde.sample(model, index=index, solver=solver, nfe=6).samples
    # Measured 0.5 and 0.6.
    assert (ours - fine).square().mean() < 0.8 * (theirs - fine).square().mean()


def test_rtol_decides_the_number_of_calls_and_is_met():
    fits = [fastsde.fit(images(), rtol=rtol, pilots=16) for rtol in (0.3, 0.001)]
    assert fits[0].nfe < fits[1].nfe
    for fitted, rtol in zip(fits, (0.3, 0.001), strict=True):
        assert fitted.record["error"] <= rtol
        # The pilots' median, beside the root mean square over other samples.
        assert error(images(), solver=fitted) < 2 * rtol


def test_the_price_is_what_the_network_saw_and_about_what_was_said():
    for calls in (2000, 8000):
        model = counted()
        fitted = fastsde.fit(model, nfe=5, calls=calls)
        assert fitted.record["cost"] == model.network.rows
        assert model.network.rows < 1.25 * calls  # the last step may end beyond


def test_guidance_is_paid_twice():
    class Doubled(GaussianScore):
        calls = 2

    model = Doubled(VP, torch.zeros(3), torch.ones(3))
    fitted = fastsde.fit(model, nfe=8, pilots=8)
    assert fitted.nfe == 4
    assert fastsde.sample(model, n=2, solver=fitted).nfe.tolist() == [8, 8]


def test_conditioning_belongs_to_the_fit():
    """Half of the pilots have wide data and half narrow: a fit for one alone would not serve the other."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x, t, std):
            alpha, sigma = VP.alpha(t.double())[:, None], VP.sigma(t.double())[:, None]
            return (-self.weight * x / (alpha**2 * std[:, None] ** 2 + sigma**2)).to(x.dtype)

    model = ScoreModel(Scaled(), VP, event_shape=(8,))
    std = torch.tensor([1.0, 0.1] * 8)
    fitted = fastsde.fit(model, nfe=4, cond={"std": std})
    assert fitted.record["pilots"] == 16
    found = fastsde.sample(model, n=64, cond={"std": std.repeat(4)}, solver=fitted).samples.std(1)
    plain = fastsde.sample(model, n=64, cond={"std": std.repeat(4)}, nfe=4).samples.std(1)
    assert (found.log() - std.repeat(4).log()).abs().mean() < (plain.log() - std.repeat(4).log()).abs().mean()


def test_conditioning_may_be_a_function_of_the_number_of_pilots():
    """Whoever cannot know how many pilots a price pays for gets the same fit as with so many rows."""
    model = ScoreModel(lambda x, t, std: -x / std[:, None] ** 2, VP, event_shape=(2,))

    def cond(n):
        return {"std": torch.linspace(0.5, 1.0, n)}

    fitted = fastsde.fit(model, nfe=3, calls=1500, cond=cond)
    given = fastsde.fit(model, nfe=3, calls=1500, cond=cond(fitted.record["pilots"]))
    assert fitted.weights == given.weights
    with pytest.raises(TypeError, match="what cond returns must be a dict of tensors; got Tensor"):
        fastsde.fit(ScoreModel(never, VP, event_shape=(2,)), nfe=3, cond=torch.zeros)


def test_one_pilot_in_another_mode_does_not_decide():
    """27 errors, of which one is a hundred times as large, or four: the former says little of how often that is."""
    model, count = images(), 27
    samples = resolve_samples(model, shape=(count, 64), index=torch.arange(count), seed=0)
    pilots = Pilots(model, VP, samples, 0.0, 64, None, 4, 32)
    with torch.no_grad():
        pilots.solve(None)
    errors = {}
    for modes in (0, 1, 4):
        x = pilots.target + 0.1
        x[:modes] += 10.0
        errors[modes] = pilots.error(x)
    assert errors[1] < 3 * errors[0]  # by the formula 1.9; the plain mean is 4.7 times as large
    assert errors[4] > 20 * errors[0]  # by the formula 28


@pytest.mark.parametrize("seed", range(3))
def test_with_noise_a_fit_must_be_better_by_more_than_chance(seed):
    record = fastsde.fit(clusters(), nfe=10, eta=1.0, pilots=16, calls=8000, seed=seed).record
    assert record["ratio"] == 1.0 or record["ratio_interval"][1] < 1.0


def test_integer_levels_stay_in_their_table():
    """Data far below the lowest level, where the mean of the data is looked for: no level lies below the table."""
    betas = torch.linspace(1e-3, 0.2, 100)
    sde = DiscreteVPSDE(betas)
    table = torch.arange(100.0)
    law = GaussianScore(sde, torch.zeros(4), torch.full((4,), 0.003))

    def network(x, levels):
        t = (table[levels].double() + 1) / 100  # an IndexError beyond the last, the wrong end below the first
        assert int(levels.min()) >= 0
        return law.exact_score(x, t)

    model = ScoreModel(network, sde, event_shape=(4,), timestep=lambda t: (100 * t - 1).floor().long())
    assert fastsde.fit(model, nfe=4, pilots=8).nfe == 4


def test_pilot_samples_are_none_of_the_users():
    network = Recorder(lambda x, t: -x)
    fastsde.fit(ScoreModel(network, VP, event_shape=(2,)), nfe=3, pilots=8)
    start = network.calls[0][0]
    drawn = fastsde.sample(ScoreModel(Recorder(lambda x, t: -x), VP, event_shape=(2,)), n=64, nfe=8, trajectory=True)
    mine = torch.stack([path.x[0] for path in drawn.trajectory])
    assert not (start[:, None] == mine[None]).all(-1).any()


def test_a_network_is_in_evaluation_mode_and_goes_back():
    model = counted()
    model.network.train()
    seen = []
    model.network.register_forward_hook(lambda module, *_: seen.append(module.training))
    fastsde.fit(model, nfe=3, pilots=8)
    assert not any(seen)
    assert model.network.training


# ---- files ------------------------------------------------------------------------------------------------------


def test_the_cache_knows_weights_and_settings(tmp_path):
    model, file = counted(), tmp_path / "cache.json"
    first = fastsde.fit(model, nfe=3, pilots=8, cache=file)
    model.network.rows = 0
    assert fastsde.fit(model, nfe=3, pilots=8, cache=file) == first
    assert model.network.rows == 0
    for other, nfe in ((counted(0.9), 3), (model, 4)):
        other.network.rows = 0
        fastsde.fit(other, nfe=nfe, pilots=8, cache=file)
        assert other.network.rows > 0


@pytest.mark.parametrize(
    "asked",
    [{"nfe": 4}, {"rtol": 0.002}, {"nfe": 4, "eta": 0.5}, {"nfe": 4, "history": 0}, {"times": (1.0, 0.6, 0.3, 0.1)}],
    ids=str,
)
def test_an_interrupted_fit_goes_on_to_the_same_solver(tmp_path, asked):
    model, file, asked = counted(), tmp_path / "fit.json", {**asked, "pilots": 12}
    whole = fastsde.fit(model, **asked)
    price = whole.record["cost"]
    for share in (0.4, 0.3):  # the second run has the accurate solution already
        model.network.rows, model.network.until = 0, share * price
        with pytest.raises(KeyboardInterrupt):
            fastsde.fit(model, **asked, cache=file)
        assert not file.exists()
    model.network.rows, model.network.until = 0, math.inf
    fitted = fastsde.fit(model, **asked, cache=file)
    assert model.network.rows < price
    assert (fitted.times, fitted.weights, fitted.output) == (whole.times, whole.weights, whole.output)
    assert fitted.record["cost"] == price
    assert [path.name for path in tmp_path.iterdir()] == ["fit.json"]


def test_a_damaged_file_is_named(tmp_path):
    for text in ("[]", "{}", "no json", '{"times": [1.0, 0.5]}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=r"bad\.json"):
            FittedSolver.load(tmp_path / "bad.json")
    fastsde.fit(counted(), nfe=3, pilots=8, cache=tmp_path / "good.json")
    content = json.loads((tmp_path / "good.json").read_text())
    for key, value in (("times", [0.1, 0.5, 1.0]), ("weights", [[1.0, 0.0]]), ("output", []), ("eta", -1.0)):
        (tmp_path / "bad.json").write_text(json.dumps(content | {key: value}))
        with pytest.raises(ValueError, match=r"bad\.json is no fitted solver"):
            FittedSolver.load(tmp_path / "bad.json")


def test_printed_and_drawn(tmp_path):
    fitted = fastsde.fit(images(), nfe=4, pilots=12)
    text = str(fitted)
    assert all(word in text for word in ("4 calls a sample", "the fit took", "held-out", "default"))
    fitted.plot(tmp_path / "fit.png")
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")


# ---- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of nfe=, rtol= and times="),
        ({"nfe": 8, "rtol": 0.1}, "give one of nfe=, rtol= and times="),
        ({"times": [0.5, 0.1]}, "times must start at t_max=1.0; got 0.5"),
        ({"times": [1.0, 0.1], "history": 0}, "history must be from 0 to 8, and at least 1 if times are given"),
        ({"nfe": 8, "history": 9}, "history must be from 0 to 8"),
        ({"nfe": 1}, "nfe must be an integer of at least 2; got 1"),
        ({"rtol": 1.5}, r"rtol must be in \(0, 1\); got 1.5"),
        ({"nfe": 8, "pilots": 7}, "pilots must be an integer of at least 8; got 7"),
        ({"nfe": 8, "calls": 10}, "calls must be an integer of at least 500; got 10"),
        (
            {"nfe": 20, "calls": 500},
            "calls must be at least .* for 20 evaluations a sample and 16 pilot",
        ),
        ({"nfe": 4, "shape": (0,)}, "shape must be the shape of one sample"),
        ({"nfe": 8, "eta": 6.0}, "eta must be in"),
        ({"nfe": 8, "cache": "x.json"}, "cache= needs a torch module"),
        ({"nfe": 8, "cond": {"label": torch.zeros(3)}}, r"cond has too few rows \(3\)"),
    ],
)
def test_fit_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        fastsde.fit(ScoreModel(never, VP, event_shape=(2,)), **options)


def test_an_rtol_that_no_fit_meets_is_told():
    with pytest.warns(UserWarning, match="was not met"):
        fitted = fastsde.fit(clusters(), rtol=4e-3, pilots=8, calls=1400)
    assert fitted.record["error"] > 4e-3


def test_a_shape_is_needed():
    with pytest.raises(ValueError, match="the shape of a sample is missing"):
        fastsde.fit(ScoreModel(never, VP), nfe=8)


def test_pilots_out_of_range_are_told():
    """As `sample` does: the sign of a network that is read in a wrong way."""
    model = ScoreModel(lambda x, t: 3 * x, VP, event_shape=(4,), data_range=(-1, 1))
    with pytest.warns(fastsde.DataRangeWarning, match="of 8 samples left the range"):
        fastsde.fit(model, nfe=4, pilots=8)


def test_a_failing_pilot_says_so():
    with pytest.raises(RuntimeError, match="pilot samples failed"):
        fastsde.fit(ScoreModel(lambda x, t: x * torch.nan, VP, event_shape=(2,)), nfe=8)


def test_a_fitted_solver_refuses_what_it_was_not_made_for():
    model = counted()
    fitted = fastsde.fit(model, nfe=3, pilots=8)
    asked = {"n": 2, "solver": fitted}
    one, other = model.network, counted(0.9).network
    by_name = ScoreModel(lambda x, t: one(x, t), VP, event_shape=(64,))
    assert fastsde.sample(by_name, **asked).success.all()
    for wrong, message in (
        (counted(0.9), "fitted to a network with weights"),
        (ScoreModel(lambda x, t: other(x, t), VP, event_shape=(64,)), "fitted to a network with weights"),
        (ScoreModel(never, VP, event_shape=(64,)), "this one has no weights"),
        (fastsde.score.Clipped(model), "model with another process"),
        (ScoreModel(model.network, VP, "epsilon", event_shape=(64,)), "model with another process"),
        (ScoreModel(model.network, VP, event_shape=(64,), timestep=lambda t: 0.5 * t), "model with another process"),
        (ScoreModel(model.network, VPSDE(beta_max=10.0), event_shape=(64,)), "model with another process"),
    ):
        with pytest.raises(ValueError, match=message):
            fastsde.sample(wrong, **asked)
    for options in ({"nfe": 3}, {"rtol": 0.1}, {"controller": Grid([1.0, 0.1])}):
        with pytest.raises(ValueError, match="has its own times and takes no"):
            fastsde.sample(model, **asked, **options)
    with pytest.raises(ValueError, match="goes from noise to data only"):
        fastsde.encode(model, x=torch.zeros(2, 64), solver=fitted)
    with pytest.raises(ValueError, match="within t_min"):
        fastsde.sample(model, solver=fitted, x_data=torch.zeros(2, 64), strength=0.5)
    with pytest.raises(ValueError, match="another process"):
        fastsde.sample(
            ScoreModel(never, VPSDE(beta_max=10.0), event_shape=(64,)), n=2, solver=as_fitted(VP, [1.0, 0.1])
        )
    assert fastsde.sample(counted(0.9), n=2, solver=fitted.for_any_model()).success.all()
    with torch.no_grad():
        model.network.scale.data.mul_(0.9)  # as averages of weights are copied: no version counts it
    with pytest.raises(ValueError, match="fitted to a network with weights"):
        fastsde.sample(model, **asked)


def test_guidance_scales_are_told_apart_and_functions_known_again():
    def network(x, t, y):
        return -x + 0 * y[:, None]

    def guided(scale):
        base = ScoreModel(network, VP, event_shape=(4,), default_cond={"y": 1.0})
        return fastsde.score.ClassifierFreeGuidance(base, scale, negative={"y": 0.0})

    fitted = fastsde.fit(guided(2.0), nfe=6, pilots=8)
    assert fastsde.sample(guided(2.0), n=2, solver=fitted).success.all()
    with pytest.raises(ValueError, match="model with another process"):
        fastsde.sample(guided(3.0), n=2, solver=fitted)


def test_conditioning_in_order_is_as_good_as_mixed():
    """Held-out pilots are of all kinds, whatever the order."""

    def network(x, t, std):
        alpha, sigma = VP.alpha(t.double())[:, None], VP.sigma(t.double())[:, None]
        return (-x / (alpha**2 * std[:, None] ** 2 + sigma**2)).to(x.dtype)

    model, std = ScoreModel(network, VP, event_shape=(8,)), torch.tensor([1.0, 0.5, 0.2, 0.1])
    for order in (std.repeat(6), std.repeat_interleave(6)):
        assert fastsde.fit(model, nfe=4, cond={"std": order}).record["ratio"] < 0.7


def test_a_network_that_fails_at_other_levels_says_so():
    grid = set(Grid.tapered(VP, 31).times.float().tolist())

    def network(x, t):
        known = torch.tensor([float(v) in grid for v in t])[:, None]
        return torch.where(known, -x, torch.nan)

    with pytest.raises(RuntimeError, match="the network returned NaN"):
        fastsde.fit(ScoreModel(network, VP, event_shape=(2,)), nfe=4, pilots=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"times": (1.0,), "log_snr": (0.0,)}, "times must be at least 2"),
        ({"times": (0.1, 1.0), "log_snr": (0.0, 1.0)}, "falling"),
        ({"times": (1.0, 0.1), "log_snr": (0.0,)}, "with a log_snr each"),
        ({"weights": ((1.0, 0.5), (1.0, 0.5))}, "a row for each of the 1 steps; got 2"),
        ({"weights": ((1.0,),)}, "step 1 has 2 to 2 weights"),
        ({"output": ()}, "output must have 1 to 2 weights"),
        ({"output": (math.inf,)}, "must be finite"),
        ({"steps": 3}, "has its own steps"),
    ],
)
def test_numbers_that_do_not_fit_each_other(options, message):
    with pytest.raises(ValueError, match=message):
        FittedSolver(**{"times": (1.0, 0.1), "log_snr": (-5.0, 1.0), **options})
