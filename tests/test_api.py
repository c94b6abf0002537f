"""`sample`: independent rows, the right law, refusals before the first network call, and what networks may do wrong."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from stubs import Recorder, never, same
from torch import nn

import fastsde
from fastsde import (
    EDM,
    VESDE,
    VPSDE,
    Adaptive,
    Controller,
    DiscreteVPSDE,
    EulerMaruyama,
    ExponentialPC,
    ExtrapolatedEM,
    Grid,
    RectifiedFlow,
    ScoreModel,
    Solver,
    SubVPSDE,
)
from fastsde.batching import expand_like
from fastsde.control import Decision, Verdict
from fastsde.score.analytic import GaussianScore, MixtureScore
from fastsde.solvers import Step

VP = VPSDE()
SDES = {
    "ve": VESDE(0.01, 10.0),
    "vp": VP,
    "sub-vp": SubVPSDE(),
    "discrete": DiscreteVPSDE(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)),
    "edm": EDM(t_max=10.0),
    "flow": RectifiedFlow(),
}
EVERY = [
    ExtrapolatedEM(),
    ExponentialPC(eta=1.0),
    fastsde.DDIM(12, eta=0.7),
    fastsde.DPMSolverPP(6, eta=1.0, order=3),
    fastsde.UniPC(6, order=3),
    fastsde.DEIS(6),
    fastsde.SASolver(6),
    fastsde.ProbabilityFlow(),
    fastsde.Heun(6, churn=0.2),
    EulerMaruyama(20),
    fastsde.ReverseDiffusion(12),
    fastsde.Ancestral(12),
    fastsde.PredictorCorrector(fastsde.Ancestral(10), fastsde.Langevin(0.2), 2),
    fastsde.PredictorCorrector(fastsde.Ancestral(10), fastsde.Langevin(0.2), 2, corrector_first=True),
    fastsde.AnnealedLangevin(6, n_sigma=2, eta=0.3),
    fastsde.ConsistentAnnealed(6),
    fastsde.Resampling(fastsde.Ancestral(6), 3),
]
"""Each class in `fastsde.SOLVERS`, with noise and memory where it has any."""


def each(cases):
    return {"argvalues": cases.values(), "ids": cases.keys()}


def mixture(sde):
    """Two tilted clusters, of standard deviation 0.14 to 0.2 and 1.1 apart; all in float64."""
    covariances = torch.tensor([[[0.04, 0.01], [0.01, 0.02]], [[0.0225, 0.0], [0.0, 0.0225]]], dtype=torch.float64)
    means = torch.tensor([[0.6, -0.3], [-0.2, 0.5]], dtype=torch.float64)
    return MixtureScore.from_covariances(sde, torch.tensor([0.3, 0.7], dtype=torch.float64), means, covariances)


def loose(solver):
    return {"solver": solver} | ({"rtol": 0.5, "atol": 0.2} if solver.steps is None else {})


# Independence -------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("solver", EVERY, ids=lambda solver: type(solver).__name__)
def test_a_sample_depends_on_seed_and_index_alone(solver):
    def draw(**options):
        return fastsde.sample(mixture(VP), dtype=torch.float64, seed=3, **loose(solver), **options)

    def assert_equal(result, rows):
        # The formula of the score is a matrix product, which may sum in another order in another batch: an error of
        # 1e-16, which the 6 to 60 steps of a contracting process do not magnify beyond 1e-10. Counts are equal.
        torch.testing.assert_close(result.samples, whole.samples[rows], rtol=0, atol=1e-10)
        assert torch.equal(result.nfe, whole.nfe[rows])
        assert torch.equal(result.rejected, whole.rejected[rows])

    whole = draw(n=20, batch_size=20)
    assert len(whole.samples.unique(dim=0)) == 20
    assert_equal(draw(n=3, batch_size=1), torch.arange(3))
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert_equal(draw(index=shuffled, batch_size=7), shuffled)
    assert_equal(draw(index=[12, 7, 12], batch_size=2), torch.tensor([12, 7, 12]))


def test_every_solver_is_among_those_above():
    assert {type(solver) for solver in EVERY} == set(fastsde.SOLVERS)


def test_seeds_differ_in_every_bit_of_64():
    first = [fastsde.sample(mixture(VP), n=1, seed=s, solver=EulerMaruyama(steps=2)).samples[0, 0] for s in (0, 1)]
    high = [fastsde.sample(mixture(VP), n=1, seed=s, solver=EulerMaruyama(steps=2)).samples[0, 0] for s in (1 << 63,)]
    assert len({float(x) for x in first + high}) == 3


@pytest.mark.long
def test_another_tolerance_gives_a_nearby_sample_for_the_same_seed():
    model = GaussianScore(VP, torch.zeros(16), torch.linspace(0.2, 1, 16))

    def draw(solver, rtol, seed=0):
        # At this atol, rtol decides: it is the smaller bound only for elements below 0.1.
        return fastsde.sample(model, n=10, rtol=rtol, atol=0.001, seed=seed, solver=solver).samples

    def distance(a, b):
        return float((a - b).square().mean().sqrt())

    first = draw(ExtrapolatedEM(), 0.05)
    near = distance(first, draw(ExtrapolatedEM(), 0.02))
    between_seeds = distance(first, draw(ExtrapolatedEM(), 0.05, seed=1))
    fresh = ExtrapolatedEM(keep_path=False)
    redrawn = distance(draw(fresh, 0.05), draw(fresh, 0.02))
    # On one path the samples differ by the strong error of the solver, a few percent of a standard deviation at these
    # tolerances; without it they are as far apart as samples of two seeds, but for the start state that they share.
    assert near < 0.1 * between_seeds, (near, between_seeds)
    assert redrawn > 0.7 * between_seeds, (redrawn, between_seeds)


# The law ------------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("sde", **each(SDES))
def test_samples_have_the_law_of_the_data(sde):
    n, model = 2000, mixture(sde)
    mean, covariance = model.moments()
    result = fastsde.sample(model, n=n, batch_size=n, solver=ExtrapolatedEM(), rtol=0.05, atol=0.02)
    assert result.success.all(), result
    # Standard errors of a mean and of a second moment over n draws, the latter from exact draws of the data.
    exact = model.draw(50_000, torch.Generator().manual_seed(0)) - mean
    products = torch.einsum("ni,nj->nij", exact, exact)
    centred = result.samples.double() - mean
    z_mean = centred.mean(0) / (covariance.diagonal() / n).sqrt()
    z_covariance = ((centred.T @ centred) / n - covariance) / (products.std(0) / math.sqrt(n))
    # Five numbers in six runs: 4 standard errors are passed by chance in 0.2 % of seeds, and leave room for the bias
    # of the discretization, below 1 standard error (measured for four of the processes with 10,000 samples).
    assert z_mean.abs().max() < 4, z_mean
    assert z_covariance.abs().max() < 4, z_covariance


@pytest.mark.parametrize("sde", **each(SDES))
def test_the_last_call_returns_the_expected_denoised_sample(sde):
    model = mixture(sde)
    options = {"n": 20, "dtype": torch.float64, "solver": EulerMaruyama(steps=20)}
    raw, denoised = (fastsde.sample(model, **options, denoise=denoise) for denoise in (False, True))
    t = torch.full((20,), sde.t_min, dtype=torch.float64)
    alpha, sigma = expand_like(sde.alpha(t), raw.samples), expand_like(sde.sigma(t), raw.samples)
    expected = (raw.samples + sigma**2 * model.exact_score(raw.samples, t)) / alpha
    # The same formula in another order of operations: a few units in the last place of float64.
    torch.testing.assert_close(denoised.samples, expected, rtol=1e-13, atol=1e-13)
    assert (raw.samples - denoised.samples).abs().max() > 1e-8
    assert torch.equal(denoised.nfe, raw.nfe + 1)


@dataclasses.dataclass
class Walk(Solver):
    """Brownian motion, whose increment is also the "error": x_s = x_t + dW."""

    order, calls_per_step, adaptive, use = "exact", 1, True, "tests"
    keep_path: bool = True

    def step(self, model, sde, x_t, t, s, noise, carry):
        return Step(x_t + noise.dw + 0 * model(x_t, t).score, {}, noise.dw, noise.dw)


class RefuseLarge(Controller):
    """Sixteen steps of 1/2; a first attempt whose noise is larger than usual is rejected and halved."""

    adaptive = True

    def check(self, t_min, t_max):
        pass

    def init(self, t, t_end):
        return {"h": torch.full_like(t, 0.5), "retry": torch.zeros_like(t, dtype=torch.bool)}

    def target(self, t, t_end, carry):
        return (t - carry["h"]).clamp(min=t_end)

    def update(self, t, s, t_end, error, scale, carry):
        size = error.double().square().mean(1) / (t - s).clamp(min=1e-9)
        accept = carry["retry"] | (size < 1.1)
        h = torch.where(accept, 0.5, 0.25).double()
        return Decision(torch.where(accept, Verdict.ACCEPT, Verdict.REJECT), {"h": h, "retry": ~accept})


@pytest.mark.long
@pytest.mark.parametrize("keep_path", [True, False])
def test_rejection_leaves_the_law_alone_only_if_the_path_is_kept(keep_path):
    n, d, sde = 2500, 32, EDM(t_min=1.0, t_max=9.0)
    result = fastsde.sample(
        lambda x, t: torch.zeros_like(x),
        sde,
        x_init=torch.zeros(n, d),
        batch_size=n,
        solver=Walk(keep_path=keep_path),
        controller=RefuseLarge(),
    )
    share = result.rejected.sum() / (result.rejected + result.accepted).sum()
    assert 0.15 < share < 0.4
    ratio = float(result.samples.double().square().mean()) / (sde.t_max - sde.t_min)
    if keep_path:
        assert abs(ratio - 1) < 0.02  # 4 standard errors, sqrt(2 / (n d)) = 0.5 % each
    else:
        # Of a mean of 32 squares, the part below its 70 % quantile has mean 0.88; at most half of the time is walked
        # by such steps, so several percent of the variance are missing.
        assert ratio < 0.96


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_states_have_roughly_the_right_law(dtype):
    mean, std = torch.tensor([0.5, -0.5]), torch.tensor([0.5, 0.25])
    result = fastsde.sample(GaussianScore(VP, mean, std), n=1000, batch_size=1000, rtol=0.1, atol=0.05, dtype=dtype)
    assert result.samples.dtype == dtype
    assert result.success.all()
    # 4 standard errors of 1000 samples are 0.06 std for the mean and 9 % for the standard deviation; bfloat16 rounds
    # each of about 50 steps by 0.4 %.
    x = result.samples.double()
    assert ((x.mean(0) - mean).abs() < 0.1 * std).all()
    assert ((x.std(0) / std - 1).abs() < 0.1).all()


# Refusals -----------------------------------------------------------------------------------------------------------


def model(**options):
    """A model of two numbers under VP whose network must not be called."""
    return ScoreModel(never, VP, **{"event_shape": (2,)} | options)


REFUSED = {
    "no shape": (never, {"sde": VP}, r"give shape=\(n, \*event\)"),
    "n without event shape": (never, {"sde": VP, "n": 3}, r"give shape=\(n, \*event\)"),
    "no n": (model(), {}, r"give n= or shape=\(n, \*event\)"),
    "empty shape": (model(), {"shape": ()}, r"shape must be .* positive integers; got \(\)"),
    "event of another size": (model(), {"shape": (3, 4)}, r"shape \(2,\); got \(4,\) in shape=\(3, 4\)"),
    "n is 0": (model(), {"n": 0}, "n must be an integer of at least 1; got 0"),
    "n is no integer": (model(), {"n": 2.5}, "n must be an integer of at least 1; got 2.5"),
    "n and shape": (model(), {"n": 3, "shape": (4, 2)}, "disagrees: n says 3, shape says 4"),
    "n and index": (model(), {"n": 3, "index": [1]}, "disagrees: n says 3, .*index says 1"),
    "n and x_init": (model(), {"n": 4, "x_init": torch.zeros(3, 2)}, "disagrees: n says 4, shape says 3"),
    "complex": (model(), {"n": 3, "dtype": torch.complex64}, "dtype must be real floating .*; got torch.complex64"),
    "dtype in words": (model(), {"n": 3, "dtype": "float32"}, "dtype must be real floating point .*; got 'float32'"),
    "x_init integer": (model(), {"x_init": torch.zeros(3, 2).long()}, "x_init must be real floating .*torch.int64"),
    "x_init NaN": (model(), {"x_init": torch.full((3, 2), torch.nan)}, "x_init holds NaN or infinity"),
    "x_init shape": (model(), {"shape": (3, 2), "x_init": torch.zeros(2, 3)}, r"disagrees|x_init must have shape"),
    "x_init event": (model(), {"x_init": torch.zeros(3, 3)}, r"have shape \(2,\); got \(3,\)"),
    "x_init and shape": (
        model(event_shape=None),
        {"shape": (3, 2), "x_init": torch.zeros(3, 3)},
        r"x_init must have shape \(3, 2\); got \(3, 3\)",
    ),
    "two starts": (model(), {"x_init": torch.zeros(3, 2), "x_data": torch.zeros(3, 2)}, "either x_init or x_data"),
    "a network alone": (never, {"shape": (3, 2)}, "does not say how it was trained: give fastsde.ScoreModel"),
    "a pipeline": (SimpleNamespace(scheduler=None), {"n": 3}, r"is a pipeline: use fastsde\.sample_pipeline"),
    "a name in place of a model": ("fashion-mnist", {"n": 3}, r"Open it first: sample\(fastsde.pretrained"),
    "sde in words": (never, {"sde": "vp", "shape": (3, 2)}, "sde must be an SDE .*; got 'vp'"),
    "sde as a class": (never, {"sde": VPSDE, "shape": (3, 2)}, "sde must be an SDE .*; got <class"),
    "sde in words beside a model": (model(), {"sde": "vp", "n": 3}, "sde must be an SDE .*; got 'vp'"),
    "another sde": (model(), {"sde": EDM(), "n": 3}, r"sde is EDM\(.*built for VPSDE\(.*leave sde out"),
    "no network": (3, {"sde": VP, "shape": (3, 2)}, r"network must be callable as network\(x, t\); got int"),
    "solver as a class": (model(), {"n": 3, "solver": EulerMaruyama}, "solver must be an object .*; got <class"),
    "controller as a class": (model(), {"n": 3, "controller": Grid}, "controller must be .*; got <class"),
    "euler without steps": (model(), {"n": 3, "solver": EulerMaruyama()}, "EulerMaruyama needs its number of steps"),
    "euler adaptive": (
        model(),
        {"n": 3, "solver": EulerMaruyama(), "controller": Adaptive(0.1, 0.1)},
        "EulerMaruyama has no error estimate.*use Grid or ExponentialPC",
    ),
    "euler with rtol": (model(), {"n": 3, "solver": EulerMaruyama(steps=3), "rtol": 0.1}, "EulerMaruyama.* no rtol"),
    "steps and controller": (
        model(),
        {"n": 3, "solver": EulerMaruyama(steps=3), "controller": Grid.uniform(VP, 3)},
        "either controller= or solver.steps, not both",
    ),
    "rtol and controller": (
        model(),
        {"n": 3, "rtol": 0.1, "controller": Adaptive(0.1, 0.1)},
        "either controller= or rtol, not both",
    ),
    "batch_size 0": (model(), {"n": 3, "batch_size": 0}, "batch_size must be an integer of at least 1; got 0"),
    "seed negative": (model(), {"n": 3, "seed": -1}, "seed must be an integer of at least 0; got -1"),
    "seed too large": (model(), {"n": 3, "seed": 1 << 64}, r"seed must be in \[0, 2\^64\); got 18446744073709551616"),
    "max_nfe": (model(), {"n": 3, "max_nfe": 1}, "max_nfe must be an integer of at least 2; got 1"),
    "cond rows": (
        model(),
        {"n": 3, "cond": {"y": torch.zeros(4)}},
        r"cond\['y'\] must be a tensor with leading axis n=3; got \(4,\)",
    ),
    "cond number": (model(), {"n": 3, "cond": {"y": 1}}, r"cond\['y'\] must be .* n=3; got int"),
    "index negative": (model(), {"index": [3, -1]}, r"index must be in \[0, 2\^32\); got -1 \.\. 3"),
    "index too large": (model(), {"index": [1 << 32]}, r"index must be in \[0, 2\^32\); got 4294967296"),
    "index float": (model(), {"index": torch.tensor([0.5])}, r"index must be .*; got \(1,\) of torch.float32"),
    "index matrix": (model(), {"index": torch.tensor([[1]])}, r"index must be .*; got \(1, 1\) of torch.int64"),
}
REFUSED |= {
    f"{name}={value}": (model(), {"n": 3, name: value}, f"{name} must be .*finite.*; got {value}")
    for name, values in {"rtol": (0.0, -0.1, math.nan, math.inf), "atol": (-0.1, math.nan, math.inf)}.items()
    for value in values
}
REFUSED |= {
    f"grid {first} .. {last}": (
        model(),
        {"n": 3, "solver": EulerMaruyama(), "controller": Grid([first, 0.3, last])},
        f"grid must lie within t_min=0.001 .. t_max=1.0; it goes from {first} to {last}",
    )
    for first, last in ((1.5, 0.001), (1.0, 0.0))
}


@pytest.mark.parametrize(("score_fn", "options", "message"), **each(REFUSED))
def test_bad_input_is_refused_before_the_first_network_call(score_fn, options, message, without_type_checks):
    with pytest.raises((ValueError, TypeError), match=message):
        fastsde.sample(score_fn, **options)


def test_the_model_s_own_sde_may_be_said_again():
    score = mixture(VP)
    assert same(
        fastsde.sample(score, n=2, solver=EulerMaruyama(steps=2)),
        fastsde.sample(score, VPSDE(), n=2, solver=EulerMaruyama(steps=2)),
    )


# What networks do wrong, and what they are given --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "error", "message"),
    [
        (lambda x, t: x[:, :1], ValueError, r"shape \(3, 2\) and must return the same shape; it returned \(3, 1\)"),
        (lambda x, t: 1 / 0, ZeroDivisionError, "division by zero"),
    ],
)
def test_a_wrong_network_is_found_at_its_first_call(network, error, message):
    recorder = Recorder(network)
    with pytest.raises(error, match=message):
        fastsde.sample(recorder, VP, shape=(3, 2))
    assert len(recorder.calls) == 1


class Moody(nn.Module):
    """Two submodules, one of them frozen in evaluation mode, that note the modes in which they are called."""

    def __init__(self, fails=False):
        super().__init__()
        self.live, self.frozen, self.fails, self.seen = nn.Dropout(0.9), nn.Dropout(0.9), fails, set()
        self.frozen.eval()

    def forward(self, x, t):
        if self.fails:
            raise ZeroDivisionError("boom")
        self.seen |= {module.training for module in self.modules()}
        return -self.frozen(self.live(x))


@pytest.mark.parametrize("fails", [False, True])
def test_a_module_runs_in_evaluation_mode_and_gets_its_modes_back(fails):
    network = Moody(fails)
    if fails:
        with pytest.raises(ZeroDivisionError):
            fastsde.sample(network, VP, shape=(2, 2), solver=EulerMaruyama(steps=3))
    else:
        fastsde.sample(network, VP, shape=(2, 2), solver=EulerMaruyama(steps=3))
        assert network.seen == {False}
    assert [network.training, network.live.training, network.frozen.training] == [True, True, False]


def test_no_gradients_are_recorded():
    network = nn.Linear(2, 2)
    result = fastsde.sample(lambda x, t: network(x), VP, shape=(2, 2), solver=EulerMaruyama(steps=2))
    assert not result.samples.requires_grad
    assert torch.is_grad_enabled()


def test_default_conditioning_is_used_and_overridden():
    default = {"label": torch.tensor(9), "scale": torch.tensor([0.5, 2.0])}
    network = Recorder()
    score = ScoreModel(network, VP, event_shape=(2,), default_cond=default)
    options = {"solver": EulerMaruyama(steps=2), "n": 3, "batch_size": 2}
    fastsde.sample(score, **options)
    for x, _, cond in network.calls:
        assert torch.equal(cond["label"], torch.full((len(x),), 9))
        assert torch.equal(cond["scale"], default["scale"].expand(len(x), 2))
    network.calls.clear()
    fastsde.sample(score, cond={"label": torch.arange(3)}, **options)
    assert {v for _, _, cond in network.calls for v in cond["label"].tolist()} == {0, 1, 2}
    assert all(torch.equal(cond["scale"], default["scale"].expand(len(x), 2)) for x, _, cond in network.calls)


def test_defaults_are_what_the_documentation_says():
    """Our solver along the ODE, rtol 0.05 and one 8-bit level of the data range; 64 rows at a time; float32."""
    network = Recorder(lambda x, t: -x)
    score = ScoreModel(network, VP, event_shape=(2,), data_range=(0.0, 32.0))
    said = fastsde.sample(score, n=70)
    assert max(len(t) for _, t, _ in network.calls) == 64
    parts = {
        "solver": ExponentialPC(eta=0.0, order=3),
        "rtol": 0.05,
        "atol": 32 / 256,
        "batch_size": 64,
        "dtype": torch.float32,
    }
    assert same(said, fastsde.sample(score, shape=(70, 2), seed=0, **parts))
    assert said.samples.dtype == torch.float32


def test_x_init_sets_start_dtype_and_shape():
    start = torch.tensor([[3.0, -2.0], [0.5, 0.25], [1.0, 1.0]], dtype=torch.float64)
    network = Recorder()
    result = fastsde.sample(network, VP, x_init=start, solver=EulerMaruyama(steps=1), batch_size=3)
    assert torch.equal(network.calls[0][0], start)
    assert network.calls[0][1].tolist() == [VP.t_max] * 3
    assert result.samples.dtype == torch.float64
