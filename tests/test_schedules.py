"""Configurations of schedulers, read as processes."""

import math
import pickle

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import vector

from fastsde import EDM, VESDE, DiscreteVPSDE, RectifiedFlow
from fastsde.diffusers import alphas_cumprod, read_schedule
from fastsde.diffusers.adapter import scheduler_config
from fastsde.diffusers.schedules import filled

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")


def refused(match, **config):
    with pytest.raises(ValueError, match=match):
        read_schedule(config)


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_tables_are_those_of_diffusers(schedule, zero_snr):
    scheduler = diffusers.DDPMScheduler(
        beta_schedule=schedule, rescale_betas_zero_snr=zero_snr, prediction_type="v_prediction"
    )
    # Their products of 1000 factors are in float32: 4.7e-7 off at worst, and 1.3e-5 after the subtraction of zero SNR,
    # which loses digits near the end.
    ours, theirs = alphas_cumprod(scheduler.config), scheduler.alphas_cumprod.double()
    torch.testing.assert_close(ours[:-1], theirs[:-1], rtol=3e-5 if zero_snr else 1e-6, atol=0)
    if zero_snr:
        assert theirs[-1] < 1e-12
        # In place of the zero, as much below the last but one as the table falls there: half, in sqrt(alpha_bar).
        assert float(ours[-1] / ours[-2]) == pytest.approx(0.25, rel=1e-12)
    else:
        # Of the cosine's last factor, 1 - 0.999, float32 has four digits.
        torch.testing.assert_close(ours[-1], theirs[-1], rtol=2e-5, atol=0)


def test_trained_betas_win_over_the_named_schedule():
    betas = [0.01, 0.02, 0.03]
    scheduler = diffusers.DDPMScheduler(3, trained_betas=betas, beta_schedule="linear")
    expected = torch.tensor([0.99, 0.99 * 0.98, 0.99 * 0.98 * 0.97], dtype=torch.float64)
    torch.testing.assert_close(alphas_cumprod(scheduler.config), expected, rtol=1e-15, atol=0)


def test_level_k_is_the_timestep_k():
    reading = read_schedule(diffusers.DDPMScheduler().config)
    k = torch.arange(1000, dtype=torch.float64)
    torch.testing.assert_close(reading.timestep((k + 1) / 1000), k, rtol=0, atol=1e-12)
    bars = diffusers.DDPMScheduler().alphas_cumprod.double()
    # Their float32 table.
    torch.testing.assert_close(reading.sde.alpha(reading.time(k)) ** 2, bars, rtol=1e-6, atol=0)


CONFIGS = {
    "table": diffusers.DDPMScheduler().config,
    "zero_snr": diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="sample").config,
    "ve": diffusers.ScoreSdeVeScheduler().config,
    "edm": diffusers.EDMEulerScheduler().config,
    "continuous": diffusers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction").config,
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config,
}


@pytest.mark.parametrize("kind", CONFIGS)
@given(share=st.floats(0, 1))
def test_time_and_timestep_are_inverse(kind, share):
    reading = read_schedule(CONFIGS[kind])
    t = vector(reading.sde.t_min + share * (reading.sde.t_max - reading.sde.t_min))
    # Roundings of logarithms and of N t - 1 near level 0.
    torch.testing.assert_close(reading.time(reading.timestep(t)), t, rtol=1e-12, atol=1e-14)


def test_variance_exploding():
    reading = read_schedule(diffusers.ScoreSdeVeScheduler(sigma_max=380.0, sampling_eps=1e-4).config)
    assert isinstance(reading.sde, VESDE)
    assert (reading.sde.sigma_min, reading.sde.sigma_max, reading.sde.t_min) == (0.01, 380.0, 1e-4)
    t = vector(0.3)
    assert reading.prediction == "score"
    assert torch.equal(reading.timestep(t), reading.sde.sigma(t))


def test_edm():
    reading = read_schedule(diffusers.EDMDPMSolverMultistepScheduler(sigma_max=60.0, sigma_data=0.7).config)
    assert isinstance(reading.sde, EDM)
    assert (reading.sde.t_min, reading.sde.t_max, reading.sigma_data) == (0.002, 60.0, 0.7)
    assert float(reading.timestep(vector(2.0))) == pytest.approx(math.log(2.0) / 4, rel=1e-15)


@pytest.mark.parametrize("given_range", [False, True])
def test_continuous_v_is_edm_with_sigma_data_1(given_range):
    limits = {"sigma_min": 0.002, "sigma_max": 700.0} if given_range else {}
    scheduler = diffusers.EulerDiscreteScheduler(
        timestep_type="continuous", prediction_type="v_prediction", use_karras_sigmas=given_range, **limits
    )
    reading = read_schedule(scheduler.config)
    scheduler.set_timesteps(10)
    assert reading.sigma_data == 1.0
    # Their range, in float32.
    assert reading.sde.t_max == pytest.approx(float(scheduler.sigmas[0]), rel=1e-5)
    if given_range:
        assert (reading.sde.t_min, reading.sde.t_max) == (0.002, 700.0)


@pytest.mark.parametrize(
    ("config", "shift"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config, 3.0),
        (diffusers.FlowMatchEulerDiscreteScheduler().config, 1.0),
        (diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0).config, math.exp(0.5)),
        (
            diffusers.UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
            ).config,
            5.0,
        ),
    ],
)
def test_flow_matching(config, shift):
    reading = read_schedule(config)
    assert isinstance(reading.sde, RectifiedFlow)
    assert reading.prediction == "flow_prediction"
    assert reading.sde.t_min == pytest.approx(shift / (1000 + shift - 1), rel=1e-12)
    assert (reading.sde.t_max, float(reading.timestep(vector(0.5)))) == (0.999, 500.0)
    assert reading.unshifted == (shift == 1.0)


@pytest.mark.parametrize("zero_snr", [{"rescale_betas_zero_snr": True}, {"beta_schedule": "squaredcos_cap_v2"}])
def test_tables_that_go_on_to_more_noise_start_where_it_is_160_times_the_signal(zero_snr):
    reading = read_schedule(diffusers.DDIMScheduler(prediction_type="v_prediction", **zero_snr).config)
    t = vector(reading.sde.t_max)
    assert float(reading.sde.log_snr(t)) == pytest.approx(-2 * math.log(160), rel=1e-9)


def test_epsilon_with_zero_terminal_snr_is_refused():
    refused("predicting it says nothing", beta_schedule="linear", rescale_betas_zero_snr=True)


SCHEDULERS = sorted(name for name in dir(diffusers) if name.endswith("Scheduler"))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_of_diffusers_is_read_right_or_refused(name):
    """From the object and from its bare configuration, which in memory carries no name of a class."""
    try:
        scheduler = getattr(diffusers, name)()
    except (TypeError, ImportError):  # needs arguments, or another package
        pytest.skip("cannot be made without arguments")
    for config in (scheduler_config(scheduler), scheduler.config):
        try:
            reading = read_schedule(config)
        except ValueError:
            continue
        if isinstance(reading.sde, DiscreteVPSDE):
            k = torch.arange(reading.levels, dtype=torch.float64)
            theirs = scheduler.alphas_cumprod.double()  # products in float32
            # DDIM's inverse and some others move the last level of a table with zero terminal SNR.
            torch.testing.assert_close(reading.sde.alpha(reading.time(k)) ** 2, theirs, rtol=3e-5, atol=0)
        elif isinstance(reading.sde, RectifiedFlow):
            times = scheduler.timesteps.double()
            torch.testing.assert_close(reading.time(times), times / 1000, rtol=1e-12, atol=0)
        else:
            assert (reading.sde.t_max, reading.sigma_data) in [(80.0, 0.5), (1.0, None)]  # EDM, variance exploding


def test_the_snr_of_cogvideox_is_shifted():
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    plain, shifted = (alphas_cumprod({**config, "snr_shift_scale": c}) for c in (1.0, 3.0))
    difference = (plain / (1 - plain)).log() - (shifted / (1 - shifted)).log()
    torch.testing.assert_close(difference, torch.full_like(difference, math.log(3)), rtol=1e-10, atol=0)


def test_a_flow_with_one_level_has_time_from_0_to_1():
    reading = read_schedule({"shift": 1.0, "num_train_timesteps": 1})
    assert float(reading.timestep(vector(0.3))) == 0.3
    assert (reading.sde.t_min, reading.sde.t_max) == (0.001, 0.999)


def test_readings_can_be_pickled():
    for config in (diffusers.DDPMScheduler().config, {"shift": 3.0}, diffusers.EDMEulerScheduler().config):
        reading = read_schedule(config)
        copy, t = pickle.loads(pickle.dumps(reading)), vector(0.4)
        assert torch.equal(copy.timestep(t), reading.timestep(t))
        assert torch.equal(copy.time(reading.timestep(t)), reading.time(reading.timestep(t)))


def test_clipping_is_read():
    assert read_schedule(scheduler_config(diffusers.CogVideoXDDIMScheduler())).limit is None
    assert read_schedule(diffusers.DDPMScheduler().config).limit == 1.0
    assert read_schedule(diffusers.DDPMScheduler(clip_sample=False).config).limit is None
    assert read_schedule(diffusers.DDPMScheduler(clip_sample_range=3.0).config).limit == 3.0
    reading = read_schedule(diffusers.DDIMScheduler(thresholding=True, sample_max_value=2.0).config)
    assert (reading.limit, reading.ratio) == (2.0, 0.995)


def test_defaults_of_the_class_are_filled_in():
    config = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
    reading = read_schedule(filled(config))
    assert reading.limit == 1.0
    assert reading.sde.levels == 1000
    torch.testing.assert_close(reading.sde.log_alpha(vector(1.0)).exp() ** 2, alphas_cumprod(config)[-1:])


@pytest.mark.parametrize("name", ["LCM", "TCD", "CMStochasticIterative"])
def test_distilled_schedules_are_refused(name):
    refused("distilled", **getattr(diffusers, f"{name}Scheduler")().config)


def test_what_cannot_be_read_is_refused():
    refused("no process that fastsde can read; its keys are", num_train_timesteps=1000)
    refused("prediction_type must be one of", beta_schedule="linear", prediction_type="noise")
    refused("beta_schedule must be one of linear", beta_schedule="cosine")
    refused("beta_start must be a finite number; got 'x'", beta_schedule="linear", beta_start="x")
    refused("num_train_timesteps must be an integer", beta_schedule="linear", num_train_timesteps=1)
    refused("numbers in", trained_betas=[0.1, 1.2])
    refused("runs the other way", shift=1.0, invert_sigmas=True)
    refused("shift must be a positive", shift=0.0)
    refused("predicts the velocity", use_flow_sigmas=True, prediction_type="epsilon", beta_schedule="linear")
    refused("EDM's preconditioning", sigma_data=0.5, sigma_min=0.1, sigma_max=1.0, prediction_type="sample")
    refused("not among", _class_name="CosineDPMSolverMultistepScheduler", sigma_data=1.0, sigma_min=0.3, sigma_max=500)
    refused("keys of CosineDPMSolverMultistep", sigma_data=1.0, sigma_min=0.3, sigma_max=500, solver_order=2)
    refused("has gamma_shift in its configuration, which", beta_schedule="linear", gamma_shift=2.0)
    refused("has noise_law in its configuration", shift=3.0, noise_law="uniform")
    refused("which of them is meant", beta_schedule="linear", shift=3.0)
    refused("clip_sample_range must be a positive", beta_schedule="linear", clip_sample=True, clip_sample_range=-1.0)
    refused("dynamic_thresholding_ratio", beta_schedule="linear", thresholding=True, dynamic_thresholding_ratio=5.0)
    refused("snr_shift_scale must be a positive", beta_schedule="linear", snr_shift_scale=0.0)
    refused("scale_factors, upscale_mode", shift=1.0, upscale_mode="bicubic")
