"""What goes wrong on networks of other people: seen before the first call, or told afterwards; never silent."""

import functools
import io
import pickle
import threading
import warnings
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

import fastsde
from fastsde import EDM, VESDE, VPSDE, DiscreteVPSDE, Grid, RectifiedFlow, ScoreModel
from fastsde.score import DPS, MMPS, ClassifierFreeGuidance, Clipped, GaussianScore, Mask, PiGDM

VP = VPSDE()
TABLE = DiscreteVPSDE(torch.linspace(1e-4, 0.02, 1000))


def gaussian(x, t, std=0.5, sde=VP):
    """The score of N(0, std^2)."""
    alpha, sigma = (c(t.double()).to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) for c in (sde.alpha, sde.sigma))
    return -x / ((alpha * std) ** 2 + sigma**2)


def never(x, t, **cond):
    raise AssertionError("called")


# Samples outside the data range


def test_samples_that_leave_a_known_range_are_counted_and_warned_of():
    model = ScoreModel(lambda x, t: torch.where(torch.arange(len(x)) < 2, 5.0, 0.3)[:, None].expand_as(x), VP, "sample",
                       event_shape=(3,), data_range=(0.0, 1.0))  # fmt: skip
    with pytest.warns(fastsde.DataRangeWarning, match=r"2 of 6 samples .*beyond -0.5 .. 1.5.*fastsde.diagnose"):
        r = fastsde.sample(model, n=6, nfe=3, seed=0)
    assert r.outside.tolist() == [True, True, False, False, False, False]
    assert "2 outside of the data range" in repr(r)


def test_a_wrong_sign_is_warned_of_and_data_of_variance_1_are_not():
    with pytest.warns(fastsde.DataRangeWarning):
        fastsde.sample(lambda x, t: x, VP, shape=(64, 2), seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastsde.sample(lambda x, t: gaussian(x, t, 1.0), VP, shape=(64, 50), seed=0)
        fastsde.sample(Clipped(ScoreModel(lambda x, t: x, VP, data_range=(0.0, 1.0))), shape=(64, 2), seed=0)


# Time


def test_a_table_without_timestep_is_warned_of():
    with pytest.warns(UserWarning, match=r"needs ScoreModel\(..., timestep=lambda t: 1000 \* t - 1\)"):
        fastsde.sample(
            ScoreModel(lambda x, t: x, TABLE, "epsilon", data_range=(-9.0, 9.0)), shape=(2, 3), nfe=2, seed=0
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (
            ScoreModel(lambda x, t: x, TABLE, "epsilon", timestep=lambda t: 1000 * t - 1),
            Clipped(ScoreModel(lambda x, t: x, TABLE, "epsilon", timestep=lambda t: t)),
            GaussianScore(TABLE, torch.zeros(3), torch.ones(3)),
        ):
            fastsde.sample(model, shape=(2, 3), nfe=2, seed=0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16, torch.float64])
def test_the_network_gets_its_time_in_the_dtype_that_timestep_returns(dtype):
    seen = []
    model = ScoreModel(lambda x, t: (seen.append(t), 0 * x)[1], TABLE, "epsilon",
                       timestep=lambda t: (1000 * t - 1).round().to(dtype))  # fmt: skip
    fastsde.sample(model, shape=(2, 3), nfe=3, seed=0)
    # Float64 is what every time is in, and no wish.
    assert {t.dtype for t in seen} == {torch.float32 if dtype == torch.float64 else dtype}
    assert [float(t[0]) for t in seen[:1]] == [1000 if dtype == torch.bfloat16 else 999]


def test_the_start_of_a_table_of_more_noise_is_no_worse_than_ddim():
    """A cosine table, an exact epsilon with an error of 0.02, 10 calls: no step from sigma / alpha = 20,000 down."""
    scheduler = diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    bars = scheduler.alphas_cumprod.double()
    means = torch.tensor([[-0.6, 0.3], [0.5, 0.5], [0.1, -0.7]], dtype=torch.float64)

    def network(x, timestep):
        k = torch.as_tensor(timestep).double().expand(len(x)).clamp(0, 999)
        i = k.long().clamp(max=998)
        bar = torch.lerp(bars[i], bars[i + 1], k - i)[:, None]
        alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
        apart, variance = x.double()[:, None] - alpha[:, :, None] * means, (0.1 * alpha) ** 2 + sigma**2
        weights = (-apart.square().sum(2) / (2 * variance)).softmax(1)[..., None]
        x_0 = (weights * (means + (0.01 * alpha / variance)[:, :, None] * apart)).sum(1)
        return ((x - alpha * x_0) / sigma + 0.02 * torch.sin(7 * x + k[:, None])).float()

    def spread(x):
        """Relative error of the variance about the nearest mean."""
        return abs(float((x.double()[:, None] - means).square().sum(2).min(1).values.mean()) / (2 * 0.01) - 1)

    x = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    ours = fastsde.sample(from_diffusers(network, scheduler), x_init=x, nfe=10, batch_size=4000).samples
    scheduler.set_timesteps(10)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x).prev_sample
    assert spread(ours) < spread(x)


def from_diffusers(network, scheduler):
    return fastsde.from_diffusers(network, scheduler, event_shape=(2,))


# Where sampling starts


def test_a_grid_below_the_start_needs_states():
    grid = Grid.log_snr(VPSDE(t_max=0.5), 20)
    with pytest.raises(ValueError, match=r"starts at t = 0.5, below t_max = 1.*x_data=.*x_init="):
        fastsde.sample(never, VP, shape=(4, 1), controller=grid)
    x = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0))
    r = fastsde.sample(gaussian, VP, x_data=0.5 * x, controller=grid, batch_size=2000)
    assert float(r.samples.std()) == pytest.approx(0.5, abs=0.03)  # error of a standard deviation of 2000


@pytest.mark.parametrize("sde", [VP, VESDE(sigma_max=5.0), RectifiedFlow(), TABLE], ids=lambda s: type(s).__name__)
def test_strength_starts_at_a_share_of_the_time(sde):
    times, x = [], torch.full((3, 2), 0.4)
    callback = lambda state: times.append(state.t.max())  # noqa: E731
    model = GaussianScore(sde, torch.zeros(2), 0.25 * torch.ones(2))
    by_share = fastsde.sample(model, x_data=x, strength=0.6, nfe=8, seed=1, callback=callback)
    t = sde.t_min + 0.6 * (sde.t_max - sde.t_min)
    assert float(max(times)) <= t
    assert torch.equal(by_share.samples, fastsde.sample(model, x_data=x, t_start=t, nfe=8, seed=1).samples)
    assert by_share.nfe.tolist() == [8] * 3
    close = fastsde.sample(model, x_data=x, strength=0.02, rtol=0.05, seed=1).samples
    assert (close - x).abs().max() < (by_share.samples - x).abs().max()
    whole = fastsde.sample(model, x_data=x, strength=1.0, nfe=8, seed=1).samples
    far = fastsde.sample(model, n=3, nfe=8, seed=1).samples
    alpha = float(sde.alpha(torch.tensor([sde.t_max], dtype=torch.float64)))
    assert (whole - far).abs().max() < 2 * alpha  # the start differs by alpha x alone


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"strength": 0.5}, "strength needs a start state: give x_data="),
        ({"strength": 0.5, "t_start": 0.5, "x_data": torch.zeros(2, 3)}, "only one of strength and t_start"),
        ({"strength": 0.0, "x_data": torch.zeros(2, 3)}, r"strength must be in \(0, 1\]"),
        ({"t_start": 1.5, "x_data": torch.zeros(2, 3)}, r"t_start must be in \(0.001, 1\]"),
        ({"t_start": "0.5", "x_data": torch.zeros(2, 3)}, "t_start must be in"),
        (
            {"strength": 0.5, "x_data": torch.zeros(2, 3), "controller": Grid([0.4, 0.1])},
            "only one of strength and controller",
        ),
        (
            {"sde": EDM(), "strength": 0.5, "x_data": torch.zeros(2, 3)},
            "not for EDM, whose time is the noise: give t_start=",
        ),
    ],
)
def test_starts_that_are_refused(options, match, without_type_checks):
    with pytest.raises(ValueError, match=match):
        fastsde.sample(never, **{"sde": VP, "shape": (2, 3), **options})


@pytest.mark.parametrize("solver", [fastsde.DDIM(60), fastsde.DDIM(60, eta=1.0), fastsde.Ancestral(60)], ids=repr)
def test_solvers_with_equal_steps_walk_edm(solver):
    """Of N(0, 0.5^2); equal steps of its time, which is sigma, gave a standard deviation of 0.17."""
    model = GaussianScore(EDM(), torch.zeros(1), torch.tensor([0.5]))
    r = fastsde.sample(model, n=2000, solver=solver, seed=0, batch_size=2000)
    assert float(r.samples.std()) == pytest.approx(0.5, abs=0.06)  # an eighth for 60 steps of order 1


def test_a_float32_grid_may_be_a_rounding_outside():
    sigmas = torch.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 20) ** 7
    assert not 0.002 <= float(sigmas[-1].double()) <= 80
    r = fastsde.sample(lambda x, t: gaussian(x, t, sde=EDM()), EDM(), shape=(2, 2), controller=Grid(sigmas), seed=0)
    assert r.success.all()


# Seeds, threads, dtypes, Ctrl-C


def test_a_loop_without_a_seed_is_warned_of():
    model = GaussianScore(VP, torch.zeros(3), 0.1 * torch.ones(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastsde.sample(model, n=4, nfe=3)
        fastsde.sample(model, n=4, nfe=4)
        for seed in range(3):
            fastsde.sample(model, n=4, nfe=4, seed=seed)
    with pytest.warns(fastsde.RepeatedSeedWarning, match="Give seed="):
        fastsde.sample(model, n=4, nfe=4)


def test_threads_that_share_a_network_do_not_switch_its_mode():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.line, self.drop = nn.Linear(3, 3), nn.Dropout(0.5)

        def forward(self, x, t):
            barrier.wait(timeout=10) if first[0] else None
            first[0] = False
            ended.wait(timeout=10) if threading.current_thread().name == "long" and not ended.is_set() else None
            return 0.01 * self.drop(self.line(x))

    barrier, first, ended = threading.Barrier(1), [True], threading.Event()
    network = Network().train()
    ended.set()
    alone = fastsde.sample(network, VP, shape=(8, 3), nfe=20, seed=0).samples
    ended.clear()
    out = {}
    long = threading.Thread(
        target=lambda: out.update(long=fastsde.sample(network, VP, shape=(8, 3), nfe=20, seed=0).samples), name="long"
    )
    long.start()
    fastsde.sample(network, VP, shape=(8, 3), nfe=3, seed=0)  # ends while the other is in its first call
    ended.set()
    long.join()
    assert torch.equal(out["long"], alone)
    assert all(module.training for module in network.modules())


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_of_the_process_changes_nothing(dtype):
    solvers = (fastsde.ExponentialPC(), fastsde.ExponentialPC(eta=1.0), fastsde.ExtrapolatedEM(), fastsde.Heun(5))
    before = [fastsde.sample(gaussian, VP, shape=(4, 3), solver=s, seed=0) for s in solvers]
    try:
        torch.set_default_dtype(dtype)
        after = [fastsde.sample(gaussian, VP, shape=(4, 3), solver=s, seed=0) for s in solvers]
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a.samples, b.samples)
        assert a.nfe.tolist() == b.nfe.tolist()


def test_a_network_behind_a_method_or_a_partial_is_in_evaluation_mode():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x, t, y=None):
            return self.drop(gaussian(x, t))

    network = Network().train()
    expected = fastsde.sample(network, VP, shape=(4, 3), seed=0).samples

    @torch.no_grad()
    def decorated(x, t):
        return [network(one[None], when[None])[0] for one, when in zip(x, t, strict=True)]

    def stacked(x, t):
        return torch.stack(decorated(x, t))

    for function in (network.forward, functools.partial(network, y=None), lambda x, t: network(x, t), stacked):
        assert torch.equal(fastsde.sample(function, VP, shape=(4, 3), seed=0).samples, expected)
    assert network.drop.training


def test_a_function_computes_where_the_module_that_it_names_is():
    elsewhere = nn.Linear(3, 3, device="meta")
    assert ScoreModel(lambda x, t: elsewhere(x), VP).device.type == "meta"
    holder = SimpleNamespace(elsewhere=lambda x: x)
    assert ScoreModel(lambda x, t: holder.elsewhere(x), VP).device.type == "cpu"  # an attribute, not that module


def test_half_precision_start_states_are_walked_in_single_precision():
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float16, torch.bfloat16):
        r = fastsde.sample(gaussian, VP, x_init=x.to(dtype), nfe=8)
        assert torch.equal(r.samples, fastsde.sample(gaussian, VP, x_init=x.to(dtype).float(), nfe=8).samples)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_thresholding_in_any_precision(dtype):
    model = Clipped(ScoreModel(lambda x, t: x, VP, "sample"), 1.5, ratio=0.995)
    x = torch.linspace(-3, 3, 400, dtype=dtype).reshape(2, 200)
    found = model(x, torch.tensor([0.1, 0.1], dtype=torch.float64)).x_0
    assert found.dtype == dtype
    assert float(found.abs().max()) == 1.0


def test_ctrl_c_ends_the_callers_loop_too():
    model = GaussianScore(VP, torch.zeros(2), 0.1 * torch.ones(2))
    calls = [0]

    class Stopping(GaussianScore):
        def output(self, x_t, t, cond=None):
            calls[0] += 1
            if calls[0] > 8:
                raise KeyboardInterrupt
            return super().output(x_t, t, cond)

    stopping = Stopping(VP, torch.zeros(2), 0.1 * torch.ones(2))
    x = torch.zeros(4, 2, dtype=torch.float64)

    def slope(x, t):
        calls[0] += 1
        if calls[0] > 8:
            raise KeyboardInterrupt
        return -x

    allowed = {"log_likelihood": 16}  # seven calls a sample
    runs = {
        "sample": lambda: fastsde.sample(stopping, n=4, nfe=5, batch_size=1, seed=0),
        "encode": lambda: fastsde.encode(stopping, x=x, solver=fastsde.DDIM(steps=5), batch_size=1),
        "integrate": lambda: fastsde.integrate(slope, None, x, 0.0, 1.0, steps=3, batch_size=1),
        "log_likelihood": lambda: fastsde.log_likelihood(
            stopping, x=x, controller=Grid.log_snr(VP, 1), batch_size=1, progress=False
        ),
    }
    for name, run in runs.items():
        calls[0] = 8 - allowed.get(name, 8)
        with pytest.raises(KeyboardInterrupt) as stopped:
            run()
        result = stopped.value.result
        assert isinstance(result, fastsde.Likelihood if name == "log_likelihood" else fastsde.SampleResult)
        assert 0 < int((result.status == fastsde.Status.SUCCESS).sum()) < 4
        assert int((result.status == fastsde.Status.PENDING).sum()) > 0
    assert fastsde.sample(model, n=2, nfe=3, seed=0).success.all()


# Ranges of clipping, measurements


def test_clipping_is_to_the_range_of_the_data():
    x, t = torch.tensor([[-3.0, 0.2, 3.0]]), torch.tensor([0.5], dtype=torch.float64)
    for data_range in ((0.0, 1.0), (-0.5, 0.5), (0.0, 255.0)):
        low, high = data_range
        model = Clipped(ScoreModel(lambda x, t: 1000 * x, VP, "sample", data_range=data_range))
        assert model(x, t).x_0.tolist() == [[low, min(200.0, high), high]]
    assert Clipped(ScoreModel(lambda x, t: x, VP, "sample"), 2.0)(x, t).x_0.tolist() == [
        [-2.0, pytest.approx(0.2), 2.0]
    ]


@pytest.mark.parametrize("guide", [DPS, PiGDM, MMPS])
def test_clipped_measurements_stay_in_range_where_the_network_is_wrong(guide):
    """A network whose derivative is far from that of any posterior mean, as trained ones have at high noise."""
    network = ScoreModel(lambda x, t: 0.3 * torch.tanh(40 * x), VP, "sample", event_shape=(6,), data_range=(-1.0, 1.0))
    mask = torch.tensor([1.0, 1, 1, 0, 0, 0])
    model = Clipped(guide(network, Mask(mask), 0.05, 0.5 * torch.ones(6)))
    r = fastsde.sample(model, n=8, nfe=12, seed=0)
    assert r.success.all()
    assert not r.outside.any()


# Errors that name the argument


def refused(match, function, kind=(ValueError, TypeError)):
    with pytest.raises(kind, match=match):
        function()


def test_numbers_that_are_none_are_refused(without_type_checks):
    refused("rtol must be a positive, finite number", lambda: fastsde.sample(never, VP, shape=(2, 3), rtol=10**400))
    refused("rtol must be at least .* steps", lambda: fastsde.sample(never, VP, shape=(2, 3), rtol=1e-12))
    refused("at most 1,000,000 steps", lambda: fastsde.sample(never, VP, shape=(2, 3), nfe=10**8))
    refused("beta_min of VPSDE", lambda: VPSDE("0.1"))
    refused("t_max of EDM", lambda: EDM(t_max=None))
    refused("sigma_max of VESDE", lambda: VESDE(sigma_max="50"))
    refused("betas must be a vector of numbers", lambda: DiscreteVPSDE(["a"]))
    refused("times must be a vector", lambda: Grid("abc"))
    refused("times must be a vector", lambda: Grid([1.0, None]))
    refused("data_range must be", lambda: ScoreModel(never, VP, data_range=("0", "1")))
    refused("event_shape must be", lambda: ScoreModel(never, VP, event_shape="abc"))
    refused("timestep must be a function", lambda: ScoreModel(never, VP, timestep=1000))
    refused("timestep must map times", lambda: fastsde.sample(
        ScoreModel(never, VP, timestep=lambda t: 3.0), shape=(2, 3), nfe=2))  # fmt: skip
    refused("limit must be in", lambda: Clipped(ScoreModel(never, VP), "1"))
    refused(r"more numbers than this machine holds.*index=range", lambda: fastsde.sample(never, VP, shape=(10**12, 3)))


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (torch.empty(2, 3, device="meta"), "x_init must be an ordinary dense tensor; got one of kind meta"),
        (torch.zeros(2, 3).to_sparse(), "x_init must be an ordinary dense tensor"),
        (torch.full((2, 3), torch.nan).to(torch.float8_e4m3fn), "x_init holds NaN"),
        (torch.zeros(2, 3, requires_grad=True), "requires a gradient.*detach"),
        (np.zeros((2, 3)), "x_init must be a tensor; got ndarray"),
    ],
)
def test_states_that_are_refused(value, match, without_type_checks):
    refused(match, lambda: fastsde.sample(never, VP, x_init=value))


def test_conditioning_that_is_refused(without_type_checks):
    def network(x, t, y):
        raise AssertionError("called")

    for key in ("x", "t", "z"):
        refused(f"{key}", lambda key=key: fastsde.sample(network, VP, shape=(2, 3), cond={key: torch.zeros(2)}))
    refused(
        "cond has the key 'self'",
        lambda: fastsde.sample(nn.Identity(), VP, shape=(2, 3), cond={"self": torch.zeros(2)}),
    )
    refused("cannot be called as network", lambda: fastsde.sample(network, VP, shape=(2, 3)))
    refused(
        "ordinary dense", lambda: fastsde.sample(network, VP, shape=(2, 3), cond={"y": torch.empty(2, device="meta")})
    )
    model = ScoreModel(lambda x, t, y=None, ctx=None: x, VP, event_shape=(3,), data_range=(-9.0, 9.0))
    refused("y, must be a tensor", lambda: ClassifierFreeGuidance(model, negative={"y": None}))
    guided = ClassifierFreeGuidance(model, 3.0, negative={"y": 10})
    assert fastsde.sample(guided, n=2, nfe=4, cond={"y": torch.tensor([1, 2])}, seed=0).nfe.tolist() == [4, 4]
    prompts = {"ctx": torch.zeros(2, 7, 4), "negative_ctx": torch.zeros(2, 5, 4)}
    refused("Pad the shorter prompt", lambda: fastsde.sample(ClassifierFreeGuidance(model), n=2, cond=prompts))
    refused("for all samples", lambda: fastsde.sample(
        DPS(model, Mask(torch.ones(2, 3)), 0.1, torch.zeros(3)), n=2, nfe=4))  # fmt: skip
    assert Mask(np.ones(3)).known.all()


def test_labels_of_the_packaged_model_are_checked():
    model, _ = fastsde.pretrained("fashion-mnist")
    for labels, match in (
        (torch.tensor([3, 11]), r"class_labels must be from 0 to 10; got 3 .. 11"),
        (torch.tensor([0.5, 1.0]), "class_labels must be integers"),
        (torch.eye(10, dtype=torch.int64)[:2], r"class_labels must be integers with shape \(n,\)"),
    ):
        refused(match, lambda labels=labels: fastsde.sample(model, n=2, cond={"class_labels": labels}))
    assert pickle.loads(pickle.dumps(model)).event_shape == (1, 28, 28)


def test_tensors_of_single_samples_belong_into_cond():
    shift = torch.linspace(-0.3, 0.3, 8)[:, None]
    refused(
        r"called on 3 rows. Give tensors with one row for each sample in cond=",
        lambda: fastsde.sample(lambda x, t: gaussian(x - shift, t), VP, shape=(8, 3), batch_size=3, nfe=3),
        RuntimeError,
    )
    refused(
        "row for each sample in cond=",
        lambda: fastsde.sample(lambda x, t: gaussian(x - shift, t), VP, shape=(8, 3), batch_size=1, nfe=3),
    )


def test_a_lambda_made_anew_is_another_model():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for std in (0.1, 0.2, 0.3):
            fastsde.sample(lambda x, t, std=std: gaussian(x, t, std), VP, shape=(4, 3), nfe=4)
        x = torch.zeros(4, 3)
        for strength in (0.2, 0.4):
            fastsde.sample(gaussian, VP, x_data=x, strength=strength, nfe=4)


def test_what_a_network_complains_of_is_explained():
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.levels, self.line = nn.Embedding(10, 3), nn.Linear(3, 3).bfloat16()

        def forward(self, x, t):
            return x + self.levels(t)

    integer = ScoreModel(Embedded(), VP, timestep=lambda t: (1000 * t).long())
    refused(
        "the times that timestep= returns, are out of", lambda: fastsde.sample(integer, shape=(2, 3), nfe=2), IndexError
    )
    fractional = ScoreModel(Embedded(), VP)
    refused(
        r"time in torch.float32\. What timestep= returns",
        lambda: fastsde.sample(fractional, shape=(2, 3), nfe=2),
        RuntimeError,
    )


def test_a_saved_result_opens_without_pickles():
    r = fastsde.sample(gaussian, VP, shape=(2, 3), nfe=3, seed=0, trajectory=True)
    file = io.BytesIO()
    torch.save(r, file)
    file.seek(0)
    again = torch.load(file, weights_only=True)
    assert torch.equal(again.samples, r.samples)
    assert torch.equal(again.trajectory[1].x, r.trajectory[1].x)
