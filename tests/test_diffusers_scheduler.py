"""Our solver as a scheduler of diffusers: its contract, and the same numbers as from our own loop."""

import copy
import inspect
import pickle

import diffusers
import numpy as np
import pytest
import tiny
import torch
from oracles import noted_noise, vector
from test_diffusers_networks import DRESSES, Dressed
from tiny_pipelines import PIPELINES, drop_in

import fastsde
from fastsde import ExponentialPC, Grid
from fastsde.diffusers import FastSDEScheduler, from_diffusers, read_schedule, sample_pipeline

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
START = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).double()


def scheduler_of(name="linear epsilon", **options):
    return FastSDEScheduler.from_config({**DRESSES[name], "clip_sample": False}, **options)


def loop(scheduler, network, x, steps, generator=None, **options):
    """As pipelines go through a scheduler."""
    scheduler.set_timesteps(steps, **options)
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), t.double().expand(len(x)))
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    return x


@pytest.mark.long
@pytest.mark.parametrize(("name", "order"), [*((name, 3) for name in DRESSES), ("linear epsilon", 1), ("flow", 1)])
def test_the_loop_of_a_pipeline_gives_our_samples(name, order):
    network = Dressed(read_schedule(DRESSES[name]), fourier=name == "ve")
    model, _ = from_diffusers(network, DRESSES[name])
    scheduler = scheduler_of(name, exponential_order=order)
    x = START * scheduler.init_noise_sigma
    theirs = loop(scheduler, network, x, 9)
    start = x
    if "flow" in name:  # their loop starts from the noise itself, the state at t = 1
        level = model.sde.level(vector(model.sde.t_max).expand(3))
        start = level.alpha[:, None] * model(x, vector(model.sde.t_max).expand(3)).x_0 + level.sigma[:, None] * x
    ours = fastsde.sample(model, x_init=start, nfe=9, solver=ExponentialPC(order=order)).samples
    # Their timesteps are float32: 6e-8 of 1000 levels, where sigma / alpha changes by up to a hundredth a level. With
    # sigma itself for a time, of up to 80 times the data, more. A flow's first D comes from a state 1e-3 beside ours.
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-3 if "flow" in name else 2e-4)


def test_noise_is_drawn_once_a_step(monkeypatch):
    noted = noted_noise(monkeypatch)
    network = Dressed(read_schedule(DRESSES["linear epsilon"]), fourier=False)
    model, _ = from_diffusers(network, DRESSES["linear epsilon"])
    ours = fastsde.sample(model, x_init=START, nfe=8, solver=ExponentialPC(eta=1.0)).samples
    draws = iter(noted[1:])  # the first turn has no length
    monkeypatch.setattr("fastsde.diffusers.scheduler.randn_tensor", lambda *a, **k: next(draws))
    theirs = loop(scheduler_of(exponential_eta=1.0), network, START, 8)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)  # float32 timesteps
    assert next(draws, None) is None


def test_generators_decide_the_noise():
    network = Dressed(read_schedule(DRESSES["linear epsilon"]), fourier=False)

    def draw(seeds, x=START):
        return loop(scheduler_of(exponential_eta=1.0), network, x, 6, [torch.Generator().manual_seed(k) for k in seeds])

    a, b = draw([1, 2, 3]), draw([1, 5, 3])
    assert torch.equal(a[[0, 2]], b[[0, 2]])
    assert not torch.equal(a[1], b[1])


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_pipelines_run_with_it(name, tmp_path):
    from test_diffusers_pipelines import prompts

    pipe = tiny.PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    original = pipe.scheduler
    pipe.scheduler = FastSDEScheduler.from_config(original.config)
    pipe.save_pretrained(tmp_path)
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(again.scheduler, FastSDEScheduler)
    again.set_progress_bar_config(disable=True)
    arguments = prompts(name)
    if name == "ddpm":
        arguments = {"batch_size": 2}
    if name == "pixart":
        arguments["use_resolution_binning"] = False  # bins are known for sizes of its checkpoints
    images = [
        p(num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="np", **arguments).images
        for p in (pipe, again)
    ]
    assert len(images[0]) == 2
    # The same operations on the same weights.
    np.testing.assert_allclose(*images, rtol=0, atol=1e-6)


def test_a_text_pipeline_gives_the_image_of_sample_pipeline():
    pipe = tiny.stable_diffusion()
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = sample_pipeline(pipe, ["a", "b"], nfe=16, latents=latents, output_type="latent", progress=False).images
    pipe.scheduler = FastSDEScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(["a", "b"], num_inference_steps=8, latents=latents, output_type="latent").images
    # Float32, over values up to 140.
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5 * float(ours.abs().max()))


@pytest.mark.parametrize("name", ["DDPM", "DDIM", "PNDM", "EulerDiscrete", "DPMSolverMultistep", "EDMEuler"])
def test_configurations_of_other_schedulers_are_taken_over(name):
    other = getattr(diffusers, f"{name}Scheduler")()
    ours, expected = FastSDEScheduler.from_config(other.config), read_schedule(other.config)
    t = torch.linspace(expected.sde.t_min, expected.sde.t_max, 5, dtype=torch.float64)
    assert torch.equal(ours.sde.log_snr(t), expected.sde.log_snr(t))
    # What the other class has by default holds, whatever ours has.
    assert (ours.reading.limit, ours.reading.sigma_data) == (expected.limit, expected.sigma_data)
    assert ours.solver == ExponentialPC()  # not the other's solver_order


def test_saving_and_loading_keeps_everything(tmp_path):
    for name in ("squaredcos_cap_v2 sample zero-snr", "shifted flow", "ve", "edm v", "continuous"):
        scheduler = scheduler_of(name, exponential_eta=0.5, exponential_order=2)
        scheduler.save_pretrained(tmp_path)
        again = FastSDEScheduler.from_pretrained(tmp_path)
        assert repr(again.sde) == repr(scheduler.sde)
        assert again.solver == ExponentialPC(eta=0.5, order=2)
        assert again.reading.prediction == scheduler.reading.prediction


def test_the_contract():
    scheduler = FastSDEScheduler()
    assert (len(scheduler), scheduler.order, scheduler.init_noise_sigma) == (1000, 1, pytest.approx(1.0))
    scheduler.set_timesteps(7)
    assert scheduler.timesteps.shape == (7,)
    assert (scheduler.timesteps.diff() < 0).all()
    assert (float(scheduler.timesteps[0]), float(scheduler.timesteps[-1])) == (999.0, 0.0)
    torch.testing.assert_close(
        (scheduler.timesteps.double() + 1) / 1000, Grid.tapered(scheduler.sde, 6).times, rtol=1e-6, atol=1e-7
    )
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(scheduler.scale_model_input(x, 3), x)
    noise = torch.randn(2, 3, 4, 4)
    theirs = diffusers.DDPMScheduler().add_noise(x, noise, torch.tensor([10, 900]))
    # Their table is in float32.
    torch.testing.assert_close(scheduler.add_noise(x, noise, torch.tensor([10, 900])), theirs, rtol=0, atol=1e-5)
    output, generator = torch.randn(2, 3, 4, 4), torch.Generator()
    a = scheduler.step(output, scheduler.timesteps[0], x, generator=generator).prev_sample
    scheduler.set_timesteps(7)
    b = scheduler.step(output, scheduler.timesteps[0], x, return_dict=False)[0]
    assert torch.equal(a, b)
    assert scheduler.step_index == 1
    half = scheduler.step(output.half(), scheduler.timesteps[1], a.half()).prev_sample
    assert half.dtype == torch.float16
    assert {"generator", "return_dict"} <= set(inspect.signature(scheduler.step).parameters)


@pytest.mark.parametrize("config", [{"shift": 3.0}, {"snr": 0.15, "sigma_min": 0.01, "sigma_max": 50.0}])
def test_noise_is_added_at_the_networks_time(config):
    scheduler = FastSDEScheduler.from_config(config)
    x, noise, t = START, START.flip(0), vector(0.2, 0.5, 0.9)
    expected = scheduler.sde.marginal(x, t, noise)
    torch.testing.assert_close(scheduler.add_noise(x, noise, scheduler.reading.timestep(t)), expected)
    torch.testing.assert_close(scheduler.scale_noise(x, scheduler.reading.timestep(t), noise), expected)


def test_starting_from_an_image_at_given_levels():
    network = Dressed(read_schedule(DRESSES["linear epsilon"]), fourier=False)
    model, _ = from_diffusers(network, DRESSES["linear epsilon"])
    scheduler = scheduler_of()
    scheduler.set_timesteps(timesteps=torch.linspace(950, 5, 10))
    scheduler.set_begin_index(4)
    x = scheduler.add_noise(START, START.flip(1), scheduler.timesteps[4:5])
    start = x
    for t in scheduler.timesteps[4:]:
        x = scheduler.step(network(x, t.double().expand(3)), t, x).prev_sample
    ours = fastsde.sample(model, x_init=start, controller=Grid(scheduler.times[4:])).samples
    torch.testing.assert_close(x, ours, rtol=0, atol=1e-4)  # float32 timesteps


@pytest.mark.parametrize("says", [True, False])
def test_a_start_in_the_middle_of_our_own_grid_is_refused(says):
    """A share of its list is hardly any noise."""
    scheduler = scheduler_of()
    scheduler.set_timesteps(12)
    start = scheduler.set_begin_index if says else lambda k: scheduler.step(START, scheduler.timesteps[k], START)
    with pytest.raises(ValueError, match=r"starts from noise; .* step 6\. Call it as fastsde\.sample_pipeline"):
        start(6)


@pytest.mark.parametrize(
    "config",
    [
        {"shift": 3.0},  # pipelines say mu all the same
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"use_dynamic_shifting": True, "shift_terminal": 0.1},
        {"shift": 2.0, "shift_terminal": 0.2},
        {"num_train_timesteps": 1},
        {"invert_sigmas": True},
    ],
)
def test_given_sigmas_are_where_the_flows_own_scheduler_has_them(config):
    other = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    ours = FastSDEScheduler.from_config(other.config)
    for scheduler in (ours, other):
        scheduler.set_timesteps(sigmas=[1.0, 0.9, 0.5, 0.25], mu=0.7)
    # Theirs are in float32, and begin at the end of the flow, which has no log-SNR.
    torch.testing.assert_close(ours.sigmas[1:], other.sigmas[1:], rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.timesteps[1:], other.timesteps[1:], rtol=1e-6, atol=1e-6)
    first = float(other.sigmas[0] - ours.sigmas[0])
    assert abs(first) <= 1.1e-3


def test_timesteps_beside_sigmas_are_what_the_network_is_told():
    # CogView4 shifts the levels and not the times.
    other = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear")
    ours = FastSDEScheduler.from_config(other.config)
    for scheduler in (ours, other):
        scheduler.set_timesteps(timesteps=[1000.0, 700.0, 300.0], sigmas=[1.0, 0.7, 0.3], mu=2.5)
    assert ours.timesteps.tolist() == other.timesteps.tolist() == [1000.0, 700.0, 300.0]
    torch.testing.assert_close(ours.sigmas[1:], other.sigmas[1:], rtol=0, atol=1e-6)  # float32


def test_given_levels_stay_where_an_image_starts():
    scheduler = scheduler_of("flow")
    scheduler.set_timesteps(sigmas=[0.9, 0.6, 0.3])
    scheduler.set_begin_index(1)
    torch.testing.assert_close(scheduler.times, vector(0.9, 0.6, 0.3))


def test_edits_between_steps_carry_over():
    # A constant prediction: an edit must then move the rest of the path as the exact solution does.
    scheduler = scheduler_of("linear sample")
    scheduler.set_timesteps(6)
    x = START
    for k, t in enumerate(scheduler.timesteps[:-1]):
        x = scheduler.step(torch.ones_like(x), t, x).prev_sample
        if k == 2:
            x += 1.0  # in place, as a pipeline that writes into its latents
    t_0, t_3, t_5 = scheduler.times[[0, 3, 5]]
    sde = scheduler.sde

    def flow(x, t, s):
        ratio = sde.sigma(s[None]) / sde.sigma(t[None])
        return ratio * x + (sde.alpha(s[None]) - ratio * sde.alpha(t[None]))

    expected = flow(flow(START, t_0, t_3) + 1.0, t_3, t_5)
    torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-10)


def test_given_levels(without_type_checks):
    scheduler = scheduler_of("shifted flow")
    scheduler.set_timesteps(sigmas=[0.8, 0.4])
    assert float(scheduler.times[0]) == pytest.approx(3 * 0.8 / 2.6)
    scheduler = scheduler_of()
    scheduler.set_timesteps(timesteps=[900.0, 500.5, 3.0])
    assert scheduler.timesteps.tolist() == [900.0, 500.5, 3.0]
    scheduler.set_timesteps(sigmas=[10.0, 1.0])
    torch.testing.assert_close((-0.5 * scheduler.sde.log_snr(scheduler.times)).exp(), vector(10.0, 1.0))
    for wrong in ({}, {"num_inference_steps": 0}, {"num_inference_steps": "5"}, {"timesteps": [3.0], "sigmas": []}):
        with pytest.raises(ValueError, match="give num_inference_steps"):
            scheduler.set_timesteps(**wrong)
    for wrong in ([], [1.0, 5.0], [float("nan")]):
        with pytest.raises(ValueError, match="must be finite, and their noise must fall"):
            scheduler.set_timesteps(timesteps=wrong)
    with pytest.raises(ValueError, match="timesteps must be from"):
        scheduler.set_timesteps(timesteps=[5000.0, 10.0])


def test_wrong_steps_are_refused():
    scheduler = scheduler_of()
    scheduler.set_timesteps(2)
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="must have the shape of the state"):
        scheduler.step(torch.zeros(1, 3, 4, 4), scheduler.timesteps[0], x)
    scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="the next step is number 1, from timestep"):
        scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="must have the shape of the state"):
        scheduler.step(x[:1], scheduler.timesteps[1], x[:1])
    scheduler.step(torch.zeros(2, 6, 4, 4), scheduler.timesteps[1], x)  # a learned variance is dropped
    with pytest.raises(ValueError, match="all 2 steps are taken"):
        scheduler.step(x, scheduler.timesteps[1], x)


def test_distilled_schedules_are_refused():
    with pytest.raises(ValueError, match="distilled"):
        FastSDEScheduler.from_config(diffusers.LCMScheduler().config)


@pytest.mark.parametrize("name", DRESSES)
def test_a_pipeline_with_it_is_read_like_before(name):
    scheduler = scheduler_of(name)
    a, b = read_schedule(scheduler.config), read_schedule(DRESSES[name])
    assert (repr(a.sde), a.prediction, a.sigma_data) == (repr(b.sde), b.prediction, b.sigma_data)
    assert read_schedule(FastSDEScheduler().config).levels == 1000


def run(scheduler, network, x, begin=0):
    for t in scheduler.timesteps[begin:]:
        x = scheduler.step(network(x, t.double().expand(len(x))), t, x).prev_sample
    return x


@pytest.mark.parametrize("again", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
@pytest.mark.parametrize("name", ["linear epsilon", "flow"])
def test_copies_go_on_by_themselves(again, name):
    network = Dressed(read_schedule(DRESSES[name]), fourier=False)
    scheduler = scheduler_of(name)
    expected = loop(scheduler_of(name), network, START, 6)
    scheduler.set_timesteps(6)
    x = START
    for t in scheduler.timesteps[:3]:
        x = scheduler.step(network(x, t.double().expand(3)), t, x).prev_sample
    other = again(scheduler)
    run(scheduler, lambda x, t: x, x, 3)  # the original goes on with something else
    assert torch.equal(run(other, network, x, 3), expected)
    assert torch.equal(loop(other, network, START, 6), expected)


def test_a_run_after_one_that_started_from_an_image_is_a_whole_one():
    network = Dressed(read_schedule(DRESSES["linear epsilon"]), fourier=False)
    scheduler = scheduler_of()
    scheduler.set_timesteps(timesteps=torch.linspace(950, 5, 8))
    scheduler.set_begin_index(4)
    run(scheduler, network, START, 4)
    assert torch.equal(loop(scheduler, network, START, 6), loop(scheduler_of(), network, START, 6))


def test_what_pipelines_read():
    theirs, ours = diffusers.DDPMScheduler(), FastSDEScheduler.from_config(diffusers.DDPMScheduler().config)
    # Their tables are sums and products in float32.
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-4, atol=0)
    torch.testing.assert_close(ours.betas, theirs.betas, rtol=0, atol=1e-6)
    ours.set_timesteps(timesteps=[900.0, 10.0])
    bars = theirs.alphas_cumprod[[900, 10]]
    expected = torch.cat([((1 - bars) / bars).sqrt(), torch.zeros(1)])
    torch.testing.assert_close(ours.sigmas, expected, rtol=1e-4, atol=0)
    assert not hasattr(scheduler_of("flow"), "betas")


@pytest.mark.parametrize("config", [{}, {"invert_sigmas": True}, {"num_train_timesteps": 1}])
def test_a_flows_loop_starts_from_noise_of_variance_one(config):
    # Data N(0.3, 0.25), whose exact path from z at t = 1 ends at 0.3 + 0.5 z.
    n = config.get("num_train_timesteps", 1000)

    def network(x, time):
        t = (1 - time / n if "invert_sigmas" in config else time / n)[:, None]
        x_0 = 0.3 + 0.25 * (1 - t) / (0.25 * (1 - t) ** 2 + t**2) * (x - 0.3 * (1 - t))
        return (x_0 - x if "invert_sigmas" in config else x - x_0) / t

    scheduler = FastSDEScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler(**config).config)
    result = loop(scheduler, network, START * scheduler.init_noise_sigma, 200)
    # What is left is mostly the noise of the last level, sigma / alpha = 1 / 199, squared.
    # Taking z for the state at t_max is 1e-3 |z| off.
    torch.testing.assert_close(result, 0.3 + 0.5 * START, rtol=0, atol=3e-4)


def clipping_of(config):
    scheduler = FastSDEScheduler.from_config(config)
    return scheduler.reading.limit, scheduler.reading.ratio


def test_clipping_is_what_the_configurations_class_reads(tmp_path):
    clips = diffusers.DDIMScheduler(clip_sample=True, clip_sample_range=2.0)
    assert clipping_of(clips.config) == (2.0, None)
    for name in ("Euler", "DPMSolverMultistep", "PNDM", "UniPCMultistep"):
        kind = getattr(diffusers, f"{name}Scheduler", None) or diffusers.EulerDiscreteScheduler
        other = kind.from_config(clips.config)
        assert clipping_of(other.config) == (None, None)  # left over from DDIM
        other.save_pretrained(tmp_path)
        assert clipping_of(kind.from_pretrained(tmp_path).config) == (None, None)
    thresholds = diffusers.DPMSolverMultistepScheduler(thresholding=True)
    assert clipping_of(thresholds.config) == (1.0, 0.995)
    assert clipping_of(diffusers.EulerDiscreteScheduler.from_config(thresholds.config).config) == (None, None)
    assert clipping_of({**DRESSES["linear epsilon"], "clip_sample": True}) == (1.0, None)


@pytest.mark.long
@pytest.mark.parametrize("name", ["DDIM", "DDPM"])
def test_clipping_gives_the_limit_of_the_configurations_scheduler(name):
    # DDIM's clipping keeps the noise and moves the state; DDPM's keeps the state.
    network = Dressed(read_schedule(DRESSES["linear epsilon"]), fourier=False)
    other = getattr(diffusers, f"{name}Scheduler")(clip_sample=True, timestep_spacing="trailing")
    ours = loop(FastSDEScheduler.from_config(other.config), network, START, 300)
    options = {} if name == "DDIM" else {"use_clipped_model_output": True}  # DDPM's mean, without the noise it adds
    other = diffusers.DDIMScheduler(clip_sample=True, timestep_spacing="trailing")
    other.set_timesteps(1000)
    x = START
    for k in other.timesteps:
        x = other.step(network(x, k.double().expand(3)), k, x, **options).prev_sample
    # The mixture reaches to 2. Measured 0.009 and 0.0002, where the two limits are 0.2 apart.
    assert float((ours - x).abs().mean()) < 0.02


@pytest.mark.long
@pytest.mark.parametrize("name", ["linear epsilon", "flow", "edm"])
def test_a_fitted_solver_gives_our_samples_in_a_pipelines_loop(name, tmp_path):
    network = Dressed(read_schedule(DRESSES[name]), fourier=False)
    model, _ = from_diffusers(network, DRESSES[name])
    fitted = fastsde.fit(model, nfe=4, shape=(4,), pilots=8, calls=1000)
    fitted.save(tmp_path / "four.json")
    for given in (fitted, tmp_path / "four.json", fitted.as_json()):
        scheduler = scheduler_of(name, fitted=given)
        x = START * scheduler.init_noise_sigma
        theirs = loop(scheduler, network, x, 4)
        start = x
        if "flow" in name:
            level = model.sde.level(vector(model.sde.t_max).expand(3))
            start = level.alpha[:, None] * model(x, vector(model.sde.t_max).expand(3)).x_0 + level.sigma[:, None] * x
        ours = fastsde.sample(model, x_init=start, solver=fitted).samples
        torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-3)  # as above
    scheduler.save_pretrained(tmp_path / "saved")
    again = FastSDEScheduler.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(loop(again, network, x, 4), theirs)
    for work, message in (
        (lambda: again.set_timesteps(5), "fitted for 4 steps; got num_inference_steps=5"),
        (lambda: again.set_timesteps(timesteps=[900.0, 500.0, 100.0]), "has its own times"),
        (lambda: again.set_begin_index(2), "starts from noise"),
        (lambda: scheduler_of("squaredcos_cap_v2 epsilon", fitted=fitted), "another process"),
    ):
        with pytest.raises(ValueError, match=message):
            work()


# `benchmarks/pipelines.py` runs all of PIPELINES with more steps and writes docs/measured/pipelines.md.


@pytest.mark.parametrize(
    "name",
    [
        "FluxImg2ImgPipeline",  # says mu to a scheduler that does not shift by it
        "CogView4Pipeline",  # times and levels
        "MochiPipeline",  # time runs the other way
        "CogVideoXPipeline",  # the shifted SNR
    ],
)
def test_the_drop_in_leads_where_the_own_loop_leads(name):
    ours, own = drop_in(name, 12)
    # Own loops are of first order and as far from their limit as 12 steps are from 6; both may err, on either side. A
    # wrong sign, time or start is 0.2 or more.
    assert ours < 2.5 * own + 0.01


@pytest.mark.parametrize("name", ["CosmosTextToWorldPipeline", "StableAudioPipeline"])
def test_what_the_drop_in_cannot_do_is_refused(name):
    if name == "StableAudioPipeline":
        pytest.importorskip("torchsde")  # its scheduler cannot be made without it
    with pytest.raises(ValueError, match="with its own scheduler"):
        drop_in(name, 2)


def test_the_drop_in_keeps_a_pipelines_keys():
    pipe, _ = PIPELINES["CogVideoXPipeline"]()
    scheduler = FastSDEScheduler.from_config(pipe.scheduler.config)
    assert scheduler.config["snr_shift_scale"] == 3.0
    again = FastSDEScheduler.from_config(scheduler.config)
    assert repr(again.sde) == repr(scheduler.sde)
    assert (again.alphas_cumprod == scheduler.alphas_cumprod).all()
