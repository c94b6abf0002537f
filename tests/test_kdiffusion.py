"""Samplers in k-diffusion's signature: exact data in both conventions, and hosts that call as ComfyUI and Forge do."""

import dataclasses
import importlib.util
import math
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from oracles import fitted_order, vector

import fastsde
from fastsde.batching import expand_like
from fastsde.kdiffusion import sample_adaptive, sample_exponential_pc
from fastsde.score.analytic import MixtureScore

MEAN, STD = 0.3, 0.5
BOTH = pytest.mark.parametrize("flow", [False, True], ids=["exploding", "flow"])
SAMPLERS = pytest.mark.parametrize("sampler", [sample_exponential_pc, sample_adaptive])


class Host:
    """A host's model for independent N(MEAN, STD^2) elements, which records how it is called."""

    def __init__(self, flow=False):
        self.flow, self.calls = flow, []

    def __call__(self, x, sigma, **extra):
        self.calls.append((x.clone(), sigma.clone(), extra))
        alpha, s = expand_like(1 - sigma if self.flow else torch.ones_like(sigma), x), expand_like(sigma, x)
        return MEAN + alpha * STD**2 / (alpha**2 * STD**2 + s**2) * (x - alpha * MEAN)

    @property
    def levels(self):
        return [float(sigma[0]) for _, sigma, _ in self.calls]

    def carried(self, x, start, end):
        """The probability flow's state at one level from that at another: as many standard deviations from the mean."""
        (a, v), (b, w) = ((1 - s if self.flow else 1.0, s) for s in (start, end))
        return b * MEAN + math.sqrt((b * STD) ** 2 + w**2) / math.sqrt((a * STD) ** 2 + v**2) * (x - a * MEAN)


def karras(n, low=0.02, high=20.0):
    """n levels of Karras et al., eq. 5, and 0."""
    return torch.cat([torch.linspace(high ** (1 / 7), low ** (1 / 7), n, dtype=torch.float64) ** 7, vector(0.0)])


def levels(flow, n):
    return torch.linspace(1, 0, n + 1, dtype=torch.float64) if flow else karras(n)


def start(sigmas, n=4, event=(3,)):
    generator = torch.Generator().manual_seed(1)
    return sigmas[0] * torch.randn(n, *event, dtype=torch.float64, generator=generator)


def nothing(x, sigma):
    """The model of data that are all 0: what comes out is noise alone."""
    return torch.zeros_like(x)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_what_sample_gives_from_the_same_start_and_levels(eta):
    """On a mixture, where nothing is linear; noise by the same path, of the range that all runs here have."""
    sde = fastsde.EDM(t_min=1e-4, t_max=1e6)
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    covariances = (0.1 * torch.eye(4, dtype=torch.float64)).expand(3, 4, 4)
    exact = MixtureScore.from_covariances(sde, vector(0.2, 0.3, 0.5), means, covariances, data_range=(-5.0, 5.0))
    sigmas = karras(12)
    x = start(sigmas, 5, (4,))
    ours = sample_exponential_pc(lambda x, sigma: exact(x, sigma).x_0, x, sigmas, eta=eta, seed=7)
    solver = fastsde.ExponentialPC(eta=eta)
    theirs = fastsde.sample(exact, solver=solver, controller=fastsde.Grid(sigmas[:-1]), x_init=x, seed=7).samples
    assert torch.allclose(ours, theirs, rtol=1e-10)  # the roundings of score and back


@BOTH
def test_order_of_convergence_to_the_denoised_sample(flow):
    """On the host's own levels, sigma = 1 of a flow included. The last level stays where it is as steps are added."""
    host, steps, errors = Host(flow), [24, 48, 96], []
    for n in steps:
        sigmas = torch.cat([torch.linspace(1, 0.04, n, dtype=torch.float64), vector(0)]) if flow else karras(n)
        x = start(sigmas)
        end = host.carried(x, float(sigmas[0]), float(sigmas[-2]))
        exact = host(end, sigmas[-2].repeat(len(x)))
        errors.append((sample_exponential_pc(host, x, sigmas, flow=flow) - exact).abs().max())
    assert fitted_order(steps, errors) > 2.5  # order 3, which starts with a step of lower order


@BOTH
def test_the_state_where_sigmas_end_above_0(flow):
    host, sigmas = Host(flow), levels(flow, 60)[:31]
    x = start(sigmas)
    ours = sample_exponential_pc(host, x, sigmas, flow=flow)
    exact = host.carried(x, float(sigmas[0]), float(sigmas[-1]))
    assert torch.allclose(ours, exact, atol=1e-3)  # of states as large as 1: 30 steps
    assert host.levels == pytest.approx(sigmas.tolist())


@BOTH
def test_each_level_is_called_once_with_the_whole_batch_and_what_the_host_gave(flow):
    host, sigmas, extra = Host(flow), levels(flow, 8), {"cond": object(), "seed": 3}
    sample_exponential_pc(host, start(sigmas), sigmas, extra, flow=flow)
    assert host.levels == sigmas[:-1].tolist()  # exactly: hosts look them up
    for x, sigma, given in host.calls:
        assert len(x) == len(sigma) == 4
        assert (sigma == sigma[0]).all()
        assert given == extra


def test_a_single_level_is_one_call():
    host, x = Host(), start(vector(20.0))
    assert torch.equal(sample_exponential_pc(host, x, vector(20.0, 0.0)), host(x, vector(20.0).repeat(4)))
    assert torch.equal(sample_adaptive(host, x, vector(20.0, 0.0)), host(x, vector(20.0).repeat(4)))
    assert len(host.calls) == 4


@SAMPLERS
def test_fewer_than_two_levels_change_nothing(sampler):
    x = start(vector(1.0))
    for sigmas in (vector(), vector(0.5), vector(0.5, 0.5)):
        assert sampler(Host(), x, sigmas) is x


def test_equal_neighbours_count_once():
    """Tables of 1000 levels are asked for more steps than they have."""
    sigmas = karras(8)
    doubled = torch.cat([sigmas[:3], sigmas[2:]])
    x = start(sigmas)
    assert torch.equal(sample_exponential_pc(Host(), x, doubled), sample_exponential_pc(Host(), x, sigmas))


@BOTH
@SAMPLERS
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_an_item_is_the_same_alone_and_in_a_batch(flow, sampler, eta):
    sigmas = levels(flow, 8)
    x = start(sigmas, 5)
    whole = sampler(Host(flow), x, sigmas, eta=eta, flow=flow, seed=11)
    alone = sampler(Host(flow), x[3:4], sigmas, eta=eta, flow=flow, seed=11, index=[3])
    assert torch.equal(whole[3:4], alone)
    moved = sampler(Host(flow), x[[4, 1]], sigmas, eta=eta, flow=flow, seed=11, index=torch.tensor([4, 1]))
    assert torch.equal(whole[[4, 1]], moved)


@BOTH
@SAMPLERS
def test_the_law_with_noise(flow, sampler):
    sigmas = levels(flow, 24)
    x = start(sigmas, 100, (40,))
    out = sampler(Host(flow), x, sigmas, eta=1.0, flow=flow, seed=0)
    # 4000 elements: the mean is known to STD / 63, the deviation to STD / 89; and 24 steps leave some error.
    assert abs(float(out.mean()) - MEAN) < 4 * STD / 63
    assert abs(float(out.std()) - STD) < 0.06 * STD


@BOTH
def test_two_runs_that_split_a_range_see_the_noise_of_one(flow):
    """Without data a step adds its own noise only, so states show whether noise belongs to levels or to runs."""
    sigmas = levels(flow, 12)[:-2]
    x = start(sigmas)
    whole = sample_exponential_pc(nothing, x, sigmas, eta=1.0, flow=flow, seed=5)
    half = sample_exponential_pc(nothing, x, sigmas[:6], eta=1.0, flow=flow, seed=5)
    again = sample_exponential_pc(nothing, half, sigmas[5:], eta=1.0, flow=flow, seed=5)
    assert torch.allclose(whole, again, atol=1e-6)  # noise is made in single precision


def test_seeds():
    sigmas = karras(6)
    x, options = start(sigmas), {"eta": 1.0}
    by_host = sample_exponential_pc(lambda x, s, seed: nothing(x, s), x, sigmas[:-1], {"seed": 9}, **options)
    assert torch.equal(by_host, sample_exponential_pc(nothing, x, sigmas[:-1], seed=9, **options))
    assert not torch.equal(by_host, sample_exponential_pc(nothing, x, sigmas[:-1], seed=10, **options))
    torch.manual_seed(0)
    first, second = (sample_exponential_pc(nothing, x, sigmas[:-1], **options) for _ in range(2))
    torch.manual_seed(0)
    assert not torch.equal(first, second)
    assert torch.equal(first, sample_exponential_pc(nothing, x, sigmas[:-1], **options))
    torch.manual_seed(0)
    before = torch.rand(1)
    torch.manual_seed(0)
    sample_exponential_pc(nothing, x, sigmas)  # without noise torch's generator is left alone
    assert torch.equal(before, torch.rand(1))


@BOTH
def test_the_hosts_noise(flow):
    """x <- (alpha_s / alpha_t) e^{-2 h} x + sigma_s sqrt(1 - e^{-2 h}) z for eta = 1 and no data, with the host's z."""
    sigmas, asked = levels(flow, 8)[1:-1], []
    x = start(sigmas)
    z = start(vector(1.0), 4)

    def draw(sigma, sigma_next):
        asked.append((float(sigma), float(sigma_next)))
        return z * len(asked)

    out = sample_exponential_pc(nothing, x, sigmas, eta=1.0, flow=flow, noise_sampler=draw)
    expected = x
    for k, (t, s) in enumerate(zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True), 1):
        a, b = (1 - t, 1 - s) if flow else (1.0, 1.0)
        shrink = (s / b * a / t) ** 2
        expected = b / a * shrink * expected + s * math.sqrt(1 - shrink) * k * z
    assert asked == list(zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True))
    assert torch.allclose(out, expected)


@SAMPLERS
def test_the_callback_sees_every_call(sampler):
    host, seen, sigmas = Host(), [], karras(7)
    out = sampler(host, start(sigmas), sigmas, None, seen.append)
    assert [info["i"] for info in seen] == list(range(len(host.calls)))
    for info, (x, sigma, _) in zip(seen, host.calls, strict=True):
        assert torch.equal(info["x"], x)
        assert info["sigma"] == info["sigma_hat"] == sigma[0]
        assert torch.equal(info["denoised"], host.__class__()(x, sigma))
    assert torch.equal(out, seen[-1]["denoised"])
    seen.clear()
    sample_exponential_pc(host, start(sigmas), sigmas[:5], None, seen.append)
    assert len(seen) == 4  # a host's bar has as many steps


def test_what_a_callback_raises_goes_through():
    """Hosts stop by an exception of their own, also after an item has failed."""

    class StopError(Exception):
        pass

    def model(x, sigma):
        out = Host()(x, sigma)
        out[0] = torch.nan
        return out

    def stop(info):
        if info["i"] == 4:
            raise StopError

    sigmas = karras(8)
    with pytest.raises(StopError):
        sample_exponential_pc(model, start(sigmas), sigmas, None, stop)


def test_an_item_that_fails_takes_no_other_along():
    """The model still gets the whole batch, at one level, and the others are what they would have been."""
    host, sigmas = Host(), karras(8)
    x = start(sigmas, 9)
    whole = sample_exponential_pc(host, x, sigmas, eta=1.0, seed=2)

    def model(x, sigma):
        out = host(x, sigma)
        if float(sigma[0]) < 5:
            out[:6] = torch.nan
        return out

    host.calls.clear()
    out = sample_exponential_pc(model, x, sigmas, eta=1.0, seed=2)
    assert torch.isnan(out[:6]).all()
    assert torch.equal(out[6:], whole[6:])
    assert host.levels == sigmas[:-1].tolist()
    for x_t, sigma, _ in host.calls:
        assert len(x_t) == 9
        assert torch.isfinite(x_t).all()
        assert (sigma == sigma[0]).all()


def test_the_model_computes_in_the_dtype_of_x():
    sigmas = karras(10).float()
    x = start(sigmas).half()

    def model(x, sigma):
        assert x.dtype == sigma.dtype == torch.float16
        return Host()(x, sigma)

    out = sample_exponential_pc(model, x, sigmas)
    assert out.dtype == torch.float16
    exact = sample_exponential_pc(Host(), x.double(), sigmas.double())
    assert torch.allclose(out.double(), exact, atol=5e-3)  # a few roundings of half precision


def test_steps_from_a_tolerance_are_those_of_sample():
    host, sigmas = Host(), karras(30)
    x = start(sigmas)
    sde = fastsde.EDM(t_min=0.02, t_max=20.0)
    for rtol in (0.2, 0.02):
        host.calls.clear()
        ours = sample_adaptive(host, x, sigmas, rtol=rtol)
        theirs = fastsde.sample(fastsde.ScoreModel(Host(), sde, "sample"), x_init=x, rtol=rtol)
        assert torch.allclose(ours, theirs.samples, rtol=1e-10)
        assert len(host.calls) == int(theirs.nfe[0])


@BOTH
def test_a_smaller_tolerance_is_nearer(flow):
    """To the sample at the end of the range, which a host's last level above 0 is; from sigma = 1 of a flow on."""
    sigmas, errors = vector(1.0, 0.01, 0.0) if flow else vector(20.0, 0.02, 0.0), []
    x = start(sigmas)
    for rtol in (0.05, 0.0125):
        host = Host(flow)
        out = sample_adaptive(host, x, sigmas, rtol=rtol, flow=flow)
        errors.append(float((out - host.carried(x, float(sigmas[0]), 0.0)).norm()))
        assert host.levels[0] == sigmas[0]
    assert errors[0] > 2.5 * errors[1]  # a fourth of a tolerance is twice the steps, at order 2 or more


def fitted_to(sde, calls=6, eta=0.0):
    """A fitted solver with the standard's levels and weights, which no fit has to find."""
    times = fastsde.Grid.log_snr(sde, calls - 1).times
    weights = fastsde.solvers.fitted.standard_weights(sde, times.tolist(), eta)
    known = tuple(times.tolist()), tuple(sde.log_snr(times).tolist())
    return fastsde.FittedSolver(eta=eta, times=known[0], log_snr=known[1], weights=weights)


@pytest.mark.parametrize("guess", [(), (0.3, -0.2, 0.1)])
def test_a_fitted_solver_walks_its_own_levels(tmp_path, guess):
    sde = fastsde.EDM(t_min=0.02, t_max=20.0)
    solver, sigmas = dataclasses.replace(fitted_to(sde), guess=guess), karras(30)
    solver.save(tmp_path / "fit.json")
    x, host = start(sigmas), Host()
    ours = sample_exponential_pc(host, x, sigmas, fitted=str(tmp_path / "fit.json"))
    theirs = fastsde.sample(fastsde.ScoreModel(Host(), sde, "sample"), solver=solver, x_init=x).samples
    assert torch.allclose(ours, theirs, rtol=1e-10)
    assert host.levels == pytest.approx(list(solver.times)[len(guess) > 0 :])


def test_a_solver_fitted_to_the_same_network_in_another_process():
    """Its weights are of x / alpha and x_0, so in the host's process it is the same solver at the same log-SNR."""
    sde = fastsde.VPSDE()
    solver = fitted_to(sde)
    sigma = math.exp(-0.5 * solver.log_snr[0])
    x = start(vector(sigma))

    def preserving(x, t):
        alpha, s = (expand_like(v, x) for v in (sde.alpha(t), sde.sigma(t)))
        return Host()(x / alpha, (s / alpha).flatten())

    alpha = float(sde.alpha(vector(1.0)))
    theirs = fastsde.sample(fastsde.ScoreModel(preserving, sde, "sample"), solver=solver, x_init=alpha * x).samples
    assert torch.allclose(sample_exponential_pc(Host(), x, vector(sigma, 1.0, 0.0), fitted=solver), theirs)


def test_a_flow_that_a_solver_was_fitted_to_may_start_at_1():
    sde = fastsde.RectifiedFlow()
    solver = fitted_to(sde)
    x, host = start(vector(1.0)), Host(True)
    ours = sample_exponential_pc(host, x, vector(1.0, 0.5, 0.0), fitted=solver, flow=True)
    theirs = fastsde.sample(fastsde.ScoreModel(Host(True), sde, "sample"), solver=solver, x_init=0.999 * x).samples
    assert torch.allclose(ours, theirs, rtol=1e-10)


def comfy(flow, host):
    """A model as ComfyUI's KSAMPLER gives it: a function around a guider around the model."""
    kinds = {True: type("CONST", (), {}), False: type("EPS", (), {})}
    sampling = type("ModelSampling", (kinds[flow],), {})()
    patcher = types.SimpleNamespace(get_model_object=lambda name: {"model_sampling": sampling}[name])

    class Inpaint:
        inner_model = types.SimpleNamespace(model_patcher=patcher)

        def __call__(self, x, sigma, denoise_mask, model_options=None, seed=None):
            return host(x, sigma)

    return Inpaint()


def forge(flow, host):
    class Denoiser(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner_model = torch.nn.Module()
            self.inner_model.predictor = types.SimpleNamespace(prediction_type="const" if flow else "epsilon")
            self.inner_model.sigma_max = vector(1.0)

        def forward(self, x, sigma, **extra):
            return host(x, sigma)

    return Denoiser()


@BOTH
@pytest.mark.parametrize("made", [comfy, forge])
@SAMPLERS
def test_a_host_tells_its_process(flow, made, sampler):
    """From a level that both may have, as image to image does."""
    sigmas = torch.linspace(0.8, 0, 30, dtype=torch.float64)
    x = start(sigmas)
    extra = {"denoise_mask": None, "model_options": {}, "seed": 1} if made is comfy else {}
    told = sampler(made(flow, Host(flow)), x, sigmas, extra)
    assert torch.equal(told, sampler(Host(flow), x, sigmas, flow=flow))
    assert torch.allclose(told, Host(flow).carried(x, 0.8, 0.0), atol=0.02)  # smoothed by the last level, 0.03
    with pytest.raises(ValueError, match=f"flow={not flow}, but the host's model says"):
        sampler(made(flow, Host(flow)), x, sigmas, extra, flow=not flow)


def test_wrappers_with_a_table_of_levels_are_no_flows():
    host, sigmas = Host(), karras(8, high=0.9)
    host.inner_model = types.SimpleNamespace(sigma_max=torch.tensor(14.6))
    x = start(sigmas)
    assert torch.equal(sample_exponential_pc(host, x, sigmas), sample_exponential_pc(Host(), x, sigmas, flow=False))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sigmas": vector(0.5, 1.0)}, "sigmas must fall"),
        ({"sigmas": torch.ones(2, 2)}, "sigmas must be a vector"),
        ({"sigmas": [1.0, 0.0]}, "sigmas must be a tensor"),
        ({"sigmas": vector(0.9, 0.0)}, "flow must be said for this model"),
        ({"sigmas": vector(3.0, 0.0), "flow": True}, "sigmas of a flow are at most 1"),
        ({"flow": "yes"}, "flow must be True, False or None"),
        ({"x": torch.ones(2, 3, dtype=torch.int64)}, "x must be real floating point"),
        ({"x": torch.full((2, 3), math.nan)}, "x holds NaN"),
        ({"model": None}, "model must be callable"),
        ({"callback": 3}, "callback must be callable"),
        ({"extra_args": [1]}, "extra_args must be a dict"),
        ({"eta": -0.1}, "eta must be in"),
        ({"eta": 1.0, "noise_sampler": 3}, "noise_sampler must be a function"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"eta": 1.0, "extra_args": {"seed": "a"}}, "seed must be an integer of at least 0"),
        ({"index": [0, 1, 2]}, "the number of samples disagrees"),
    ],
)
@SAMPLERS
def test_bad_arguments_are_refused_before_the_first_call(sampler, wrong, message, without_type_checks):
    host = Host()
    given = {"model": host, "x": torch.ones(2, 3), "sigmas": vector(20.0, 1.0, 0.0)} | wrong
    with pytest.raises((TypeError, ValueError), match=message):
        sampler(**given)
    assert not host.calls


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fitted": 3}, "fitted must be a fastsde.FittedSolver or the file of one"),
        ({"sigmas": vector(10.0, 1.0, 0.0)}, "fitted starts at sigma = 20 in the host's process, x is at sigmas"),
        ({"sigmas": vector(1.0, 0.5, 0.0), "flow": True}, "fitted starts at sigma = 0.952381 in the host's process"),
        ({"sigmas": vector(20.0, 1.0)}, "sigmas must end in 0"),
        ({"eta": 0.5}, "eta is fitted's own"),
    ],
)
def test_a_fitted_solver_that_does_not_fit_is_refused(wrong, message, without_type_checks):
    solver = fitted_to(fastsde.EDM(t_min=0.02, t_max=20.0))
    host = Host()
    given = {"model": host, "x": torch.ones(2, 3), "sigmas": vector(20.0, 1.0, 0.0), "fitted": solver} | wrong
    with pytest.raises((TypeError, ValueError), match=message):
        sample_exponential_pc(**given)
    assert not host.calls


@pytest.mark.parametrize("rtol", [0.0, -1.0, math.nan])
def test_a_tolerance_that_is_none_is_refused(rtol):
    with pytest.raises(ValueError, match="rtol must be a positive, finite number"):
        sample_adaptive(Host(), torch.ones(2, 3), vector(20.0, 1.0, 0.0), rtol=rtol)


def test_noise_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="noise_sampler must return normals with the shape of x"):
        sample_exponential_pc(Host(), torch.ones(2, 3), karras(4), eta=1.0, noise_sampler=lambda s, t: torch.ones(3))


def test_the_nodes_of_comfyui(monkeypatch):
    """With modules that have ComfyUI's names: its KSAMPLER calls a function with these arguments by these names."""

    class KSampler:
        SAMPLERS = ["euler"]  # noqa: RUF012

    class KSAMPLER:
        def __init__(self, function, extra_options):
            self.function, self.extra_options = function, extra_options

        def sample(self, model, noise, sigmas, extra_args, callback):
            return self.function(
                model, noise, sigmas, extra_args=extra_args, callback=callback, disable=True, **self.extra_options
            )

    samplers, sampling = types.ModuleType("comfy.samplers"), types.ModuleType("comfy.k_diffusion.sampling")
    samplers.KSampler, samplers.KSAMPLER, samplers.SAMPLER_NAMES = KSampler, KSAMPLER, KSampler.SAMPLERS
    packages = types.ModuleType("comfy"), types.ModuleType("comfy.k_diffusion")
    packages[0].samplers, packages[0].k_diffusion, packages[1].sampling = samplers, packages[1], sampling
    for module in (*packages, samplers, sampling):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    folder = Path(__file__).parent.parent / "integrations" / "comfyui"
    spec = importlib.util.spec_from_file_location("fastsde_nodes", folder / "__init__.py")
    nodes = importlib.util.module_from_spec(spec)
    for _ in range(2):  # ComfyUI may load a folder again
        spec.loader.exec_module(nodes)
    assert KSampler.SAMPLERS == ["euler", "fastsde", "fastsde_adaptive"]
    assert sampling.sample_fastsde is sample_exponential_pc
    assert set(nodes.NODE_CLASS_MAPPINGS) == set(nodes.NODE_DISPLAY_NAME_MAPPINGS)

    sigmas = torch.linspace(1, 0, 9, dtype=torch.float64)
    x, extra, seen = start(sigmas), {"denoise_mask": None, "model_options": {}, "seed": 4}, []
    for name, expected in (("ExponentialPC", sample_exponential_pc), ("Adaptive", sample_adaptive)):
        node = nodes.NODE_CLASS_MAPPINGS[f"FastSDE{name}"]
        inputs = node.INPUT_TYPES()
        values = {k: v[1]["default"] for part in inputs.values() for k, v in part.items()} | {"eta": 0.5}
        (sampler,) = getattr(node(), node.FUNCTION)(**values)
        out = sampler.sample(comfy(True, Host(True)), x, sigmas, extra, seen.append)
        assert torch.equal(out, expected(Host(True), x, sigmas, flow=True, eta=0.5, seed=4))
    assert seen


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_wrappers_of_k_diffusion(kind, monkeypatch):
    """Its own wrappers of networks of a table, where it is installed: the sample that its own solver goes to."""
    package, found = types.ModuleType("k_diffusion"), importlib.util.find_spec("k_diffusion")
    if found is None:
        pytest.skip("k-diffusion is not installed")
    package.__path__ = list(found.submodule_search_locations)
    # The package itself imports image libraries that no sampler needs.
    for name, module in (
        ("k_diffusion", package),
        ("torchvision", MagicMock()),
        ("torchvision.transforms", MagicMock()),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    external, sampling = (
        pytest.importorskip(f"k_diffusion.{name}", exc_type=ImportError) for name in ("external", "sampling")
    )
    alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)

    def network(x, t):
        at = torch.tensor([float(v) for v in wrapper.t_to_sigma(t)], dtype=torch.float64)
        y = x * expand_like((1 + at**2).sqrt(), x)
        s = expand_like(at, x)
        x_0 = Host()(y, at)
        eps = (y - x_0) / s
        alpha = 1 / (1 + s**2).sqrt()
        return eps if kind == "eps" else alpha * eps - s * alpha * x_0

    wrapper = getattr(external, {"eps": "DiscreteEpsDDPMDenoiser", "v": "DiscreteVDDPMDenoiser"}[kind])(
        network, alphas, quantize=False
    )
    sigmas, fine = wrapper.get_sigmas(40), wrapper.get_sigmas(400)
    x = start(sigmas)
    limit = sample_exponential_pc(wrapper, x, fine, disable=True)
    assert torch.allclose(limit, sampling.sample_dpmpp_2m(wrapper, x, fine, disable=True), atol=2e-3)
    ours, theirs = (f(wrapper, x, sigmas, disable=True) for f in (sample_exponential_pc, sampling.sample_dpmpp_2m))
    assert (ours - limit).norm() < (theirs - limit).norm()
    assert (sample_adaptive(wrapper, x, sigmas, disable=True) - limit).norm() < 0.05 * limit.norm()  # rtol
