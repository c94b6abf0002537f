"""Whole pipelines: parity with their own samplers, and loading."""

import importlib
import json

import diffusers
import numpy as np
import pytest
import tiny
import torch
from oracles import noted_noise
from safetensors.torch import load_file, save_file

import fastsde
from fastsde import DDIM, Ancestral, DPMSolverPP, Grid, UniPC
from fastsde.diffusers import decode_latents, encode_images, from_diffusers, load

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
PROMPTS = ["a red cat", "dog"]
START = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
QUIET = {"progress": False}


def close(a, b):
    """Equal up to float32 in batches of other sizes, whose sums run in another order.

    The noise is then off by a few units of 1e-7, and the denoised sample at the start by 1 / alpha = 157 times that.
    """
    torch.testing.assert_close(a, b, rtol=0, atol=3e-4 * float(b.abs().max()))


def prompts(name):
    """What the pipeline of that name is asked for: two images."""
    if name == "ddpm":
        return {"n": 2}
    if name == "dit":
        return {"class_labels": [1, 2]}
    short = {"max_sequence_length": 16} if name in ("sd3", "flux", "pixart") else {}
    clean = {"clean_caption": False, "use_resolution_binning": False} if name == "pixart" else {}
    size = {"height": 16, "width": 16} if name == "flux" else {}
    return {"prompt": PROMPTS, **short, **clean, **size}


def louder(network):
    """The last layer ten times as strong, so that predictions of an untrained network count."""
    with torch.no_grad():
        for parameter in network.conv_out.parameters():
            parameter *= 10
    return network


def grid_of(scheduler):
    """Their timesteps as ours; the last is where the sample is denoised."""
    return Grid((scheduler.timesteps.unique().flip(0).double() + 1) / 1000)


COMMON = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def sample_pipeline(pipe, *prompt, **arguments):
    """With a seed, so that two calls can be compared."""
    return fastsde.sample_pipeline(pipe, *prompt, **{"seed": 0, **arguments})


PEERS = {
    # Their step goes to t - 1000 // steps, which is the next timestep only with leading spacing.
    "DDIM": (
        lambda: diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, timestep_spacing="leading", **COMMON),
        DDIM(),
    ),
    "DDIM v": (
        lambda: diffusers.DDIMScheduler(
            clip_sample=False, timestep_spacing="leading", prediction_type="v_prediction", **COMMON
        ),
        DDIM(),
    ),
    "2M": (
        lambda: diffusers.DPMSolverMultistepScheduler(timestep_spacing="trailing", lower_order_final=False, **COMMON),
        DPMSolverPP(order=2),
    ),
    "UniPC": (
        lambda: diffusers.UniPCMultistepScheduler(solver_order=2, timestep_spacing="linspace", **COMMON),
        UniPC(order=2),
    ),
}


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_a_pipelines_own_result(name, guidance):
    build, solver = PEERS[name]
    pipe = tiny.stable_diffusion(build())
    louder(pipe.unet)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"latents": START, "guidance_scale": guidance, "output_type": "latent"}
    theirs = pipe(PROMPTS, num_inference_steps=10, negative_prompt=["blue"] * 2, **arguments).images
    ours = sample_pipeline(
        pipe, PROMPTS, negative_prompt="blue", solver=solver, controller=grid_of(pipe.scheduler), **arguments, **QUIET
    )
    assert ours.result.nfe.tolist() == [10 * (2 if guidance > 1 else 1)] * 2
    # Both in float32, with tables in float32 on their side; measured 2e-5 of the largest value.
    scale = float(theirs.abs().max())
    torch.testing.assert_close(ours.images, theirs, rtol=0, atol=1e-4 * scale)
    plain = sample_pipeline(
        pipe, PROMPTS[::-1], solver=solver, controller=grid_of(pipe.scheduler), **arguments, **QUIET
    )
    assert (plain.images - theirs).abs().max() > 1e-3 * scale


def test_a_solver_with_a_guess_in_a_pipelines_loop():
    pipe = tiny.stable_diffusion()
    louder(pipe.unet)
    pipe.set_progress_bar_config(disable=True)
    model = from_diffusers(pipe)
    times = Grid.log_snr(model.sde, 4).times
    solver = fastsde.FittedSolver(
        times=tuple(times.tolist()),
        log_snr=tuple(model.sde.log_snr(times).tolist()),
        weights=fastsde.solvers.fitted.standard_weights(model.sde, times.tolist()),
        guess=tuple(torch.linspace(-1, 1, START[0].numel()).tolist()),
    )
    arguments = {"latents": START, "guidance_scale": 1.0, "output_type": "latent"}
    theirs = sample_pipeline(pipe, PROMPTS, solver=solver, **arguments, **QUIET)
    text, _ = pipe.encode_prompt(PROMPTS, "cpu", 1, False)
    ours = fastsde.sample(model, x_init=START, cond={"encoder_hidden_states": text}, solver=solver)
    # A pipeline is known to start when it has called its network at its first timestep.
    assert (theirs.result.nfe.tolist(), ours.nfe.tolist()) == ([5, 5], [4, 4])
    close(theirs.images, ours.samples)


@pytest.mark.parametrize("clip", [False, True])
def test_ddpm_with_the_same_noise(clip, monkeypatch):
    pipe = tiny.ddpm()
    louder(pipe.unet)
    pipe.scheduler = diffusers.DDPMScheduler(clip_sample=clip)
    pipe.set_progress_bar_config(disable=True)
    noted = noted_noise(monkeypatch)
    start = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    pipe.scheduler.set_timesteps(12)
    model, sde = from_diffusers(pipe)
    solver = Ancestral(posterior=True)
    ours = fastsde.sample(model, sde, x_init=start, solver=solver, controller=grid_of(pipe.scheduler)).samples
    draws = iter([start, *noted])
    for module in ("pipelines.ddpm.pipeline_ddpm", "schedulers.scheduling_ddpm"):
        monkeypatch.setattr(importlib.import_module(f"diffusers.{module}"), "randn_tensor", lambda *a, **k: next(draws))
    theirs = torch.as_tensor(pipe(2, num_inference_steps=12, output_type="np").images).permute(0, 3, 1, 2)
    # Float32 on both sides.
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), theirs, rtol=0, atol=1e-4)
    assert theirs.std() > 0.05


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_a_saved_pipeline_draws_images_again(name, tmp_path):
    tiny.PIPELINES[name]().save_pretrained(tmp_path)
    pipe, _ = load(tmp_path)
    scale = {} if name == "ddpm" else {"guidance_scale": 3.0}
    calls = 1 if name in ("ddpm", "flux") else 2
    arguments = {**prompts(name), **scale, "rtol": 0.3, "output_type": "np", **QUIET}
    r = sample_pipeline(pipe, seed=5, **arguments)
    assert r.result.success.all()
    assert (r.result.nfe % calls == 0).all()
    side = 8 if name == "ddpm" else 16
    assert r.images.shape == (2, side, side, 3)
    assert float(r.images.min()) >= 0
    assert float(r.images.max()) <= 1
    # Adaptive, by seed: the second of them alone, in a batch of one, from the pipeline that was never saved.
    whole = tiny.PIPELINES[name]()
    one = {k: v[1:] if k in ("prompt", "class_labels") else v for k, v in arguments.items() if k != "n"}
    again = sample_pipeline(whole, seed=5, index=[1], **one)
    np.testing.assert_allclose(again.images[0], r.images[1], rtol=0, atol=1e-3)
    assert again.result.nfe[0] == r.result.nfe[1]


def test_latents_are_scaled_and_shifted_both_ways():
    vae = tiny.vae(shift_factor=0.3, scaling_factor=0.5)
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        raw = vae.encode(images).latent_dist.mode()
        decoded = vae.decode(raw).sample
    z = encode_images(vae, images, batch_size=2)
    torch.testing.assert_close(z, (raw - 0.3) * 0.5, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(decode_latents(vae, z, batch_size=2), decoded, rtol=1e-4, atol=1e-4)
    vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0], shift_factor=None)
    z = encode_images(vae, images)
    mean, std = (torch.tensor(v).reshape(4, 1, 1) for v in ([0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]))
    torch.testing.assert_close(z, (raw - mean) / std * 0.5, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(decode_latents(vae, z), decoded, rtol=1e-4, atol=1e-4)


def test_networks_load_from_folders_and_files(tmp_path):
    network = tiny.unet()
    network.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"scheduler_config\.json"):
        from_diffusers(tmp_path)
    diffusers.DDPMScheduler(clip_sample=False).save_pretrained(tmp_path)
    expected = fastsde.sample(*from_diffusers(network, diffusers.DDPMScheduler(clip_sample=False)), n=2, nfe=4).samples
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    for source in (tmp_path, str(tmp_path), weights):
        model, _ = from_diffusers(source)
        assert torch.equal(fastsde.sample(model, n=2, nfe=4).samples, expected)
        assert model.network.fastsde_source["ema"] is False
    kept = load_file(weights)
    kept.pop("conv_in.weight")
    (tmp_path / "part").mkdir()
    for name in ("config.json", "scheduler_config.json"):
        (tmp_path / "part" / name).write_text((tmp_path / name).read_text())
    save_file(kept, tmp_path / "part" / weights.name, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights of its network: conv_in\.weight"):
        from_diffusers(tmp_path / "part")
    assert from_diffusers(tmp_path, diffusers.DDPMScheduler()).prediction == "sample"  # clipped
    half, _ = from_diffusers(tmp_path, torch_dtype=torch.bfloat16)
    assert half.parameter.dtype == torch.bfloat16


def test_old_configurations_get_the_defaults_of_their_class(tmp_path):
    tiny.unet().save_pretrained(tmp_path)
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDPMScheduler"}))
    assert from_diffusers(tmp_path).prediction == "sample"  # DDPM clips by default


def test_averaged_weights_are_taken_where_there_are_any(tmp_path):
    pipe = tiny.ddpm()
    pipe.save_pretrained(tmp_path)
    other = louder(tiny.unet())
    other.save_pretrained(tmp_path / "ema_unet")
    for ema, expected in ((None, other), (True, other), (False, pipe.unet)):
        loaded, _ = load(tmp_path, ema=ema)
        assert torch.equal(loaded.unet.conv_out.weight, expected.conv_out.weight)
        assert loaded.unet.fastsde_source["ema"] is (ema is not False)
    network, config = load(tmp_path, subfolder="unet")
    assert torch.equal(network.conv_out.weight, pipe.unet.conv_out.weight)
    assert config["_class_name"] == "DDPMScheduler"


def test_what_cannot_be_loaded_is_refused(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"pickle")
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    cases = [
        ("model.ckpt", ValueError, "can run code"),
        ("model.safetensors", ValueError, "says nothing of its network"),
        ("none.safetensors", FileNotFoundError, "no file"),
        ("nothing", FileNotFoundError, "no folder"),
        (".", FileNotFoundError, "neither model_index"),
    ]
    for name, kind, match in cases:
        with pytest.raises(kind, match=match):
            from_diffusers(tmp_path / name)
    tiny.ddpm().save_pretrained(tmp_path / "pipe")
    index = tmp_path / "pipe" / "model_index.json"
    index.write_text(index.read_text().replace("DDPMPipeline", "NoSuchPipeline"))
    with pytest.raises(ValueError, match="no attribute NoSuchPipeline"):
        load(tmp_path / "pipe")
    tiny.unet().save_pretrained(tmp_path, safe_serialization=False)
    diffusers.DDPMScheduler().save_pretrained(tmp_path)
    with pytest.raises(OSError, match="safetensors"):
        from_diffusers(tmp_path)
    with pytest.raises(ValueError, match="ema=True"):
        from_diffusers(tmp_path, ema=True)
    with pytest.raises(TypeError, match="no option flavour"):
        load(tmp_path, flavour="vanilla")
