"""Whole pipelines: parity with their own loops, prompts to images, loading, and `FastSDEPipeline`."""

import importlib
import json

import diffusers
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fastsde
from fastsde import DDIM, Ancestral, DPMSolverPP, Grid, SamplingError, UniPC
from fastsde.diffusers import FastSDEPipeline, decode_latents, encode_images, from_diffusers, load
from fastsde.noise import StepNoise
from fastsde.score import Mask, Projection, Wrapper

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
    clean = {"clean_caption": False} if name == "pixart" else {}
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
    return fastsde.sample_pipeline(pipe, *prompt, **{"generator": 0, **arguments})


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


@pytest.mark.parametrize("clip", [False, True])
def test_ddpm_with_the_same_noise(clip, monkeypatch):
    pipe = tiny.ddpm()
    louder(pipe.unet)
    pipe.scheduler = diffusers.DDPMScheduler(clip_sample=clip)
    pipe.set_progress_bar_config(disable=True)
    noted, z = [], StepNoise.z.fget

    def noting(noise):
        noted.append(z(noise))
        return noted[-1]

    monkeypatch.setattr(StepNoise, "z", property(noting))
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
    arguments = {**prompts(name), **scale, "rtol": 0.3, "output_type": "pt", **QUIET}
    r = sample_pipeline(pipe, generator=5, **arguments)
    assert r.result.success.all()
    assert (r.result.nfe % calls == 0).all()
    side = 8 if name == "ddpm" else 16
    assert r.images.shape == (2, 3, side, side)
    assert float(r.images.min()) >= 0
    assert float(r.images.max()) <= 1
    # Adaptive, by seed: the second of them alone, in a batch of one, from the pipeline that was never saved.
    whole = tiny.PIPELINES[name]()
    one = {k: v[1:] if k in ("prompt", "class_labels") else v for k, v in arguments.items() if k != "n"}
    again = sample_pipeline(whole, generator=5, index=[1], **one)
    torch.testing.assert_close(again.images[0], r.images[1], rtol=0, atol=1e-3)
    assert again.result.nfe[0] == r.result.nfe[1]


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "pixart", "dit"])
def test_guidance_compares_with_the_negative_prompt(name):
    pipe = tiny.PIPELINES[name]()
    shared = {**prompts(name), "nfe": 10, "output_type": "latent", **QUIET}
    plain, guided, more = (sample_pipeline(pipe, guidance_scale=w, **shared) for w in (1.0, 3.0, [3.0, 6.0]))
    assert plain.result.nfe.tolist() == [10, 10]
    assert guided.result.nfe.tolist() == [10, 10]  # five evaluations of both halves
    assert torch.equal(guided.images[0], more.images[0])
    assert not torch.equal(guided.images[1], more.images[1])
    if name != "dit":
        other = sample_pipeline(pipe, guidance_scale=3.0, negative_prompt=["", "blue"], **shared)
        # With no negative prompt SDXL's pipeline compares with zeros, the others with the empty prompt.
        assert torch.equal(guided.images[0], other.images[0]) == (name != "sdxl")
        assert not torch.equal(guided.images[1], other.images[1])


def test_sdxl_without_a_negative_prompt_is_guided_against_zeros():
    pipe = tiny.sdxl()
    shared = {"nfe": 10, "output_type": "latent", "guidance_scale": 3.0, **QUIET}
    prompt, _, pooled, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    given = {"prompt_embeds": prompt, "pooled_prompt_embeds": pooled}
    zeros = {f"negative_{key}": torch.zeros_like(value) for key, value in given.items()}
    assert torch.equal(
        sample_pipeline(pipe, PROMPTS, **shared).images, sample_pipeline(pipe, **given, **zeros, **shared).images
    )
    model, _ = from_diffusers(pipe, guidance_scale=3.0)
    assert not model.default_cond["negative_encoder_hidden_states"].any()
    assert model.default_cond["encoder_hidden_states"].any()


def test_without_a_seed_each_call_draws_another_and_says_which():
    pipe = tiny.ddpm()
    torch.manual_seed(1)
    first, second = (fastsde.sample_pipeline(pipe, nfe=3, output_type="latent", **QUIET) for _ in range(2))
    assert first.result.seed != second.result.seed
    assert not torch.equal(first.images, second.images)
    again = fastsde.sample_pipeline(pipe, nfe=3, generator=second.result.seed, output_type="latent", **QUIET)
    assert torch.equal(again.images, second.images)
    torch.manual_seed(1)
    assert fastsde.sample_pipeline(pipe, nfe=3, output_type="latent", **QUIET).result.seed == first.result.seed


def test_an_interrupted_pipeline_hands_over_its_images():
    def stop(state):
        if state.finished:
            raise KeyboardInterrupt

    with pytest.raises(fastsde.Interrupted) as stopped:
        sample_pipeline(tiny.ddpm(), n=3, batch_size=1, nfe=3, callback=stop, **QUIET)
    r = stopped.value.result
    assert [image is None for image in r.images] == [False, True, True]
    assert r.result.counts() == {"SUCCESS": 1, "PENDING": 2}


def test_a_scale_up_to_1_is_no_guidance_whatever_the_neighbours(without_type_checks):
    pipe = tiny.stable_diffusion()
    shared = {"nfe": 16, "output_type": "latent", **QUIET}
    mixed, ones = (sample_pipeline(pipe, PROMPTS, guidance_scale=[w, 5.0], **shared).images for w in (0.5, 1.0))
    assert torch.equal(mixed, ones)
    for wrong in (float("nan"), -1.0, "x"):
        with pytest.raises(ValueError, match="guidance_scale must be a finite number"):
            from_diffusers(pipe, guidance_scale=wrong)


def test_flux_embeds_its_scale_at_one_call():
    pipe = tiny.flux_pipeline()
    shared = {**prompts("flux"), "nfe": 6, "output_type": "latent", **QUIET}
    a, b, default = (sample_pipeline(pipe, guidance_scale=w, **shared) for w in ([1.0, 3.5], [2.0, 3.5], None))
    assert a.result.nfe.tolist() == [6, 6]
    assert torch.equal(a.images[1], b.images[1])
    assert not torch.equal(a.images[0], b.images[0])
    assert torch.equal(default.images[1], a.images[1])


def test_images_of_each_prompt_follow_each_other():
    pipe = tiny.stable_diffusion()
    shared = {"nfe": 8, "output_type": "latent", **QUIET}
    r = sample_pipeline(pipe, PROMPTS, num_images_per_prompt=2, batch_size=3, **shared).images
    for k in range(4):
        alone = sample_pipeline(pipe, PROMPTS[k // 2], index=[k], **shared).images
        close(alone[0], r[k])
    again = sample_pipeline(pipe, "dog", index=[5, 9], **shared).images
    close(again, sample_pipeline(pipe, "dog", n=10, **shared).images[[5, 9]])
    close(sample_pipeline(pipe, "dog", n=2, **shared).images[:1], sample_pipeline(pipe, "dog", **shared).images)


def test_embeddings_in_the_place_of_prompts():
    pipe = tiny.stable_diffusion()
    shared = {"nfe": 8, "output_type": "latent", **QUIET}
    prompt, negative = pipe.encode_prompt(PROMPTS, "cpu", 1, True, negative_prompt=["", ""])
    r = sample_pipeline(pipe, prompt_embeds=prompt, negative_prompt_embeds=negative, **shared)
    assert torch.equal(r.images, sample_pipeline(pipe, PROMPTS, **shared).images)


def test_generators(without_type_checks):
    pipe = tiny.ddpm()

    def draw(generator, n=3, **options):
        return sample_pipeline(pipe, n=n, nfe=3, generator=generator, output_type="latent", **options, **QUIET).images

    def seeded(seed):
        return torch.Generator().manual_seed(seed)

    assert torch.equal(draw(7), fastsde.sample(*from_diffusers(pipe), n=3, nfe=3, seed=7).samples)
    assert torch.equal(draw(seeded(7)), draw(seeded(7)))
    assert not torch.equal(draw(seeded(7)), draw(seeded(8)))
    used = seeded(7)
    assert not torch.equal(draw(used), draw(used))  # a generator moves on, as in diffusers
    each = draw([seeded(k) for k in (1, 2, 3)])
    # Its own generator decides, alone.
    close(draw([seeded(2)], n=1)[0], each[1])
    for wrong, kind in (([seeded(1)], ValueError), ("7", TypeError), ([1, 2, 3], TypeError)):
        with pytest.raises(kind, match="generator must be"):
            draw(wrong)


def test_output_types():
    pipe = tiny.stable_diffusion()
    shared = {"prompt": PROMPTS, "nfe": 8, **QUIET}
    latent, pt, array, pil = (
        sample_pipeline(pipe, output_type=k, **shared).images for k in ("latent", "pt", "np", "pil")
    )
    with torch.no_grad():
        decoded = pipe.vae.decode(latent / pipe.vae.config.scaling_factor).sample
    torch.testing.assert_close(pt, (decoded / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-6)
    assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert all(isinstance(image, Image.Image) for image in pil)
    assert np.array_equal(np.stack(pil), (array * 255).round().astype(np.uint8))


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


def test_nothing_is_lost_when_the_autoencoder_fails(monkeypatch):
    pipe = tiny.stable_diffusion()

    def fail(*args, **kwargs):
        raise MemoryError("too large")

    monkeypatch.setattr(pipe.vae, "decode", fail)
    with pytest.raises(SamplingError, match="decoding failed \\(MemoryError: too large\\)") as caught:
        sample_pipeline(pipe, PROMPTS, nfe=4, **QUIET)
    kept = sample_pipeline(pipe, PROMPTS, nfe=4, output_type="latent", **QUIET).images
    assert torch.equal(caught.value.result.samples, kept)


class Broken(Wrapper):
    """Gives NaN for the second label."""

    def output(self, x_t, t, cond=None):
        out = self.model.output(x_t, t, cond)
        return torch.where(cond["class_labels"][:, None, None, None] == 2, torch.nan, out)


def test_a_failed_sample_has_no_image():
    pipe = tiny.dit_pipeline()
    shared = {"class_labels": [1, 2, 3], "guidance_scale": 1.0, "nfe": 4, "wrap": Broken, **QUIET}
    r = sample_pipeline(pipe, **shared)
    assert r.result.counts() == {"SUCCESS": 2, "NON_FINITE": 1}
    assert [image is None for image in r.images] == [False, True, False]
    assert np.isnan(sample_pipeline(pipe, output_type="np", **shared).images[1]).all()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"prompt": None}, "prompt must be a string"),
        ({"prompt": [1]}, "prompt must be a string"),
        ({"prompt": []}, "prompt must be a string"),
        ({"prompt": 5}, "prompt must be a string"),
        ({"generator": True}, "generator must be"),
        ({"generator": []}, "generator must be"),
        ({"index": 5}, "index must be a list"),
        ({"index": []}, "index must have one entry for each"),
        ({"wrap": "x"}, "wrap must be a function"),
        ({"output_type": "jpg"}, "output_type must be one of"),
        ({"n": 3}, "n must be left out"),
        ({"prompt": "a", "n": 3, "num_images_per_prompt": 2}, "n must be left out"),
        ({"negative_prompt": ["a", "b", "c"]}, "negative_prompt must be one or 2"),
        ({"guidance_scale": [1.0, 2.0, 3.0]}, "guidance_scale must be one finite number"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be one finite number"),
        ({"height": 17}, "multiples of 2"),
        ({"height": 0}, "height must be an integer"),
        ({"height": "16"}, "height must be an integer"),
        ({"guidance_scale": "7"}, "guidance_scale must be one finite number"),
        ({"latents": START.numpy()}, "latents must be a tensor"),
        ({"prompt_embeds": torch.zeros(2, 7, 16)}, "either prompt or prompt_embeds"),
        ({"prompt": None, "prompt_embeds": torch.zeros(2, 7, 15)}, r"Pad the shorter prompt|shape \(n, tokens, 16\)"),
        ({"wrap": lambda model: 3}, "wrap must return a score model"),
        ({"index": [1]}, "index must have one entry"),
        ({"guidance_scale": [-1.0, 2.0]}, "not negative"),
        ({"latents": START[:1]}, "latents must have one entry"),
        ({"class_labels": [1, 2]}, "takes no class_labels"),
        ({"num_inference_steps": 20}, "takes no num_inference_steps"),
        ({"decode_batch_size": 0}, "decode_batch_size"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"rtol": -1.0}, "rtol"),
    ],
)
def test_wrong_requests_are_refused_before_the_first_call(arguments, match, without_type_checks):
    pipe = tiny.stable_diffusion()
    called = []
    pipe.unet.register_forward_pre_hook(lambda *args: called.append(args))
    with pytest.raises((ValueError, TypeError), match=match):
        sample_pipeline(pipe, **{"prompt": PROMPTS, **QUIET, **arguments})
    assert not called


def test_pipelines_that_do_not_fit_are_refused(without_type_checks):
    with pytest.raises(TypeError, match="takes no prompts"):
        sample_pipeline(tiny.ddpm(), "a cat")
    with pytest.raises(TypeError, match="pipe must be a pipeline"):
        sample_pipeline(tiny.vae())
    with pytest.raises(ValueError, match="one size"):
        sample_pipeline(tiny.dit_pipeline(), class_labels=1, height=32, width=32)
    for wrong in ([1.5], ["dog"], []):
        with pytest.raises((ValueError, TypeError), match="class_labels must be"):
            sample_pipeline(tiny.dit_pipeline(), class_labels=wrong)
    with pytest.raises(ValueError, match="distilled"):
        sample_pipeline(tiny.stable_diffusion(diffusers.LCMScheduler()), "a cat")
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**tiny.stable_diffusion().components, requires_safety_checker=False)
    with pytest.raises(TypeError, match="starts from an image"):
        sample_pipeline(pipe, "a cat")


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
    assert from_diffusers(tmp_path, diffusers.DDPMScheduler())[0].prediction == "sample"  # clipped
    half, _ = from_diffusers(tmp_path, torch_dtype=torch.bfloat16)
    assert half.parameter.dtype == torch.bfloat16


def test_old_configurations_get_the_defaults_of_their_class(tmp_path):
    tiny.unet().save_pretrained(tmp_path)
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDPMScheduler"}))
    assert from_diffusers(tmp_path)[0].prediction == "sample"  # DDPM clips by default


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


def test_fastsde_pipeline_is_saved_and_loaded(tmp_path):
    pipe = FastSDEPipeline(tiny.stable_diffusion(), rtol=0.3, guidance_scale=2.0)
    pipe.save_pretrained(tmp_path)
    again = FastSDEPipeline.from_pretrained(tmp_path)
    assert again.settings == {"rtol": 0.3, "guidance_scale": 2.0}
    again.set_progress_bar_config(disable=True)
    images = again(PROMPTS, generator=3, output_type="pt").images
    expected = sample_pipeline(
        tiny.stable_diffusion(), PROMPTS, rtol=0.3, guidance_scale=2.0, generator=3, output_type="pt", **QUIET
    )
    torch.testing.assert_close(images, expected.images, rtol=0, atol=1e-5)
    # What diffusers itself loads from there is the pipeline.
    assert isinstance(diffusers.DiffusionPipeline.from_pretrained(tmp_path), diffusers.StableDiffusionPipeline)
    tuple_form = again(PROMPTS, generator=3, output_type="pt", return_dict=False)
    assert torch.equal(tuple_form[0], images)
    assert FastSDEPipeline.from_pretrained(tmp_path, rtol=0.1).settings == {"rtol": 0.1, "guidance_scale": 2.0}
    with pytest.raises(TypeError, match="takes no steps"):
        FastSDEPipeline(tiny.ddpm(), steps=3)
    for text, words in (('{"steps": 3}', "does not take: steps"), ("{", "is not JSON"), ("[]", "a JSON object")):
        (tmp_path / "fastsde.json").write_text(text)
        with pytest.raises(ValueError, match=rf"fastsde.json .*{words}"):
            FastSDEPipeline.from_pretrained(tmp_path)


def test_callbacks_see_times_of_their_own_and_can_stop():
    pipe = FastSDEPipeline(tiny.stable_diffusion(), rtol=0.3, progress=False)
    seen = []

    def watch(inner, i, t, tensors):
        seen.append((i, t, tensors["latents"], tensors["index"]))
        inner._interrupt = i == 3
        return tensors

    r = pipe(
        PROMPTS, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["latents", "index"], output_type="pt"
    )
    assert [i for i, *_ in seen] == [0, 1, 2, 3]
    assert all(t.shape == (2,) and x.shape == START.shape for _, t, x, _ in seen)
    assert r.result.counts() == {"PENDING": 2}
    assert torch.isnan(r.images).all()

    def change(inner, i, t, tensors):
        return {"latents": tensors["latents"] * 2}

    def change_in_place(inner, i, t, tensors):
        tensors["latents"].mul_(2)

    with torch.inference_mode():  # whose tensors count no edits
        pipe(PROMPTS, callback_on_step_end=lambda inner, i, t, tensors: tensors)
    for callback in (change, change_in_place):
        with pytest.raises(ValueError, match="cannot be replaced"):
            pipe(PROMPTS, callback_on_step_end=callback)
    with pytest.raises(ValueError, match="may name latents"):
        pipe(PROMPTS, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_known_latents_stay_in_a_guided_pipeline():
    pipe = tiny.stable_diffusion()
    mask = torch.zeros(1, 8, 8)
    mask[:, :4] = 1
    known = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(3))
    r = sample_pipeline(
        pipe, PROMPTS, nfe=16, output_type="latent", wrap=lambda m: Projection(m, Mask(mask), known), **QUIET
    )
    assert r.result.nfe.tolist() == [16, 16]
    # What is returned is the last prediction, where the known part is put in as it is.
    torch.testing.assert_close(r.images[:, :, :4], known[None, :, :4].expand(2, 4, 4, 8), rtol=0, atol=1e-5)
    free = sample_pipeline(pipe, PROMPTS, nfe=16, output_type="latent", **QUIET)
    assert (r.images - free.images)[:, :, 4:].abs().max() > 1e-3
