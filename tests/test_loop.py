"""Pipelines in their own loop: where they lead, what they cost, and what of them is refused.

`benchmarks/pipelines.py` does what `loop_checks.py` does for all of `tiny_pipelines.PIPELINES` and writes
docs/measured/pipelines.md.
"""

import inspect
import math

import diffusers
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_checks import PROMPTS, agreement, built, first_array, mixed, recorded, restarted
from tiny_parts import IMAGE
from tiny_pipelines import PIPELINES, distance, last_state
from torch import nn

import fastsde
from fastsde import ExponentialPC, Interrupted, SamplingError
from fastsde.diffusers import FastSDEScheduler
from fastsde.diffusers.joining import Call, CannotJoinError, joined, parted

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]
QUIET = {"progress": False, "seed": 0}


@pytest.fixture(autouse=True)
def modes():
    """Whatever becomes of a run, the modes of torch are as before it."""
    yield
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


LATENT = {"output_type": "latent"}


def sample(pipe, **arguments):
    return fastsde.sample_pipeline(pipe, **{**QUIET, **arguments})


CLASSES = [
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",  # edits of latents, by the time of the next step
    "StableDiffusionControlNetPipeline",  # a second network, and lists by the step's number
    "StableDiffusionPAGPipeline",  # changes its network while it runs
    "StableDiffusionXLPipeline",  # states of Karras et al.'s schedulers
    "StableDiffusionLatentUpscalePipeline",  # levels in its own formulas
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "FluxImg2ImgPipeline",
    "Flux2Pipeline",
    "QwenImagePipeline",  # two calls for guidance
    "Lumina2Pipeline",  # another time and another sign
    "AuraFlowPipeline",
    "ZImagePipeline",  # lists of tensors
    "CogView4Pipeline",
    "DiTPipeline",  # a doubled state
    "HiDreamImagePipeline",  # its first joint call fails, and is made again in parts
    "WanPipeline",
    "WanPipeline, two experts",
    "LTXImageToVideoPipeline",  # steps on a part of the latents
    "LTXConditionPipeline",  # a time for every token, and the other sign
    "HunyuanVideoPipeline",
    "MochiPipeline",  # time the other way
    "CogVideoXPipeline",
    "CosmosTextToWorldPipeline",  # each step twice
    "Cosmos2TextToImagePipeline",  # levels in the place of times
    "AudioLDM2Pipeline",
    "AceStepPipeline",
    "MotifVideoPipeline",  # a guider that remembers steps
]
APART = ("StableDiffusionPAGPipeline", "HiDreamImagePipeline", "AceStepPipeline")
"""Those whose calls are not, or not all, joined."""
RESTARTED = (
    "StableDiffusionPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionPAGPipeline",
    "StableDiffusionXLPipeline",
    "FluxImg2ImgPipeline",
    "HiDreamImagePipeline",
    "WanPipeline, two experts",
    "LTXImageToVideoPipeline",
    "CogVideoXPipeline",
    "CosmosTextToWorldPipeline",
)
"""Those whose loops keep something from step to step, look things up by its number, or edit the state."""


@pytest.mark.parametrize("name", CLASSES)
def test_a_pipeline_leads_where_its_own_loop_leads(name):
    ours, own = agreement(name, 10)
    # Own loops are of first order and as far from their limit as 10 steps are from 5; both may err, on either side. A
    # wrong sign, time or start is 0.2 or more.
    assert ours < 2.5 * own + 0.02


@pytest.mark.parametrize("name", CLASSES)
def test_a_sample_is_the_same_alone_and_among_others_at_other_times(name):
    difference, r, made = mixed(name)
    # Rounding in float32, over dozens of calls; another prompt, time or scale is 0.01 or more.
    assert difference < 1e-4
    assert r.result.success.all()
    if name != "HiDreamImagePipeline":
        assert made == int(r.result.nfe.sum())
    if name not in APART:
        assert r.separate is None
        assert r.forwards < made or "ControlNet" in name


@pytest.mark.parametrize("name", RESTARTED)
def test_a_restart_forgets_the_coarser_grid(name):
    difference, again = restarted(name)
    assert again.rejected.tolist() == [1]
    assert difference < 1e-6  # the same steps from the same start


MEANS, SHARE, WIDTH = (-1.0, 1.0), 0.3, 0.2


def exact(x, alpha, sigma):
    """The denoised value of a mixture of two normals, element by element: law of the data in the tests below."""
    variance = alpha**2 * WIDTH**2 + sigma**2
    logit = math.log(SHARE / (1 - SHARE)) + ((x - alpha * MEANS[0]) ** 2 - (x - alpha * MEANS[1]) ** 2) / (2 * variance)
    parts = [m + alpha * WIDTH**2 / variance * (x - alpha * m) for m in MEANS]
    return torch.lerp(parts[0], parts[1], torch.sigmoid(logit))


def flow(x, t):
    """The velocity noise - data of a flow at t in [0, 1]."""
    t = t.reshape(-1, *[1] * (x.ndim - 1)).to(x)
    return (x - exact(x, 1 - t, t)) / t


DRESSES = {
    "StableDiffusion3Pipeline": lambda hidden_states, timestep, **_: (flow(hidden_states, timestep / 1000),),
    "FluxPipeline": lambda hidden_states, timestep, **_: (flow(hidden_states, timestep),),
    "Lumina2Pipeline": lambda hidden_states, timestep, **_: (-flow(hidden_states, 1 - timestep),),
    "ZImagePipeline": lambda x, t, *_, **__: (
        [-flow(one[None], 1 - time[None])[0] for one, time in zip(x, t, strict=True)],
    ),
    "MochiPipeline": lambda hidden_states, timestep, **_: (-flow(hidden_states, 1 - timestep / 1000),),
    "WanPipeline": lambda hidden_states, timestep, **_: (flow(hidden_states, timestep / 1000),),
}


@pytest.mark.parametrize("name", DRESSES)
def test_the_law_of_an_exact_network_in_a_familys_dress(name):
    pipe, arguments = built(name)
    pipe.transformer.forward = DRESSES[name]
    x = sample(pipe, n=8, rtol=0.02, **arguments).result.samples.flatten()
    upper = x > 0
    # Thousands of independent elements: three standard deviations of a share, and the error of rtol.
    assert abs(float(upper.float().mean()) - SHARE) < 3 * math.sqrt(SHARE / len(x)) + 0.005
    for mode, mean in zip((~upper, upper), MEANS, strict=True):
        assert abs(float(x[mode].mean()) - mean) < 0.02
        assert abs(float(x[mode].std()) - WIDTH) < 0.02


def test_the_pipelines_own_start_and_its_generator():
    pipe, arguments = built("FluxPipeline")
    seen = []
    pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    pipe(**arguments, num_inference_steps=1, generator=torch.Generator().manual_seed(5))
    r = fastsde.sample_pipeline(pipe, nfe=4, generator=torch.Generator().manual_seed(5), progress=False, **arguments)
    for key in ("hidden_states", "timestep", "guidance", "encoder_hidden_states"):
        assert torch.equal(seen[0][key], seen[1][key])
    # A list: each sample's own decides alone.
    many = fastsde.sample_pipeline(
        pipe, nfe=4, generator=[torch.Generator().manual_seed(k) for k in (1, 5)], progress=False, **arguments
    )
    assert distance(many.result.samples[1], r.result.samples[0]) < 1e-5


def test_samples_are_functions_of_the_seed_and_their_number():
    pipe, arguments = built("StableDiffusion3ControlNetPipeline")  # draws from torch's own generator, too
    state = torch.get_rng_state()
    all_of_them = sample(pipe, n=4, nfe=8, batch_size=3, **arguments)
    assert torch.equal(torch.get_rng_state(), state)
    some = sample(pipe, index=[3, 1], nfe=8, **arguments)
    assert distance(some.result.samples, all_of_them.result.samples[[3, 1]]) < 1e-5
    assert (
        distance(sample(pipe, n=1, nfe=8, seed=1, **{**arguments}).result.samples, all_of_them.result.samples[:1]) > 0.1
    )
    torch.manual_seed(3)
    first, second = (fastsde.sample_pipeline(pipe, nfe=8, progress=False, **arguments) for _ in range(2))
    assert first.result.seed != second.result.seed
    assert torch.equal(sample(pipe, nfe=8, seed=second.result.seed, **arguments).result.samples, second.result.samples)


def test_a_pipeline_with_our_scheduler():
    pipe, arguments = built("FluxPipeline")
    expected = sample(pipe, nfe=8, **arguments)
    pipe.scheduler = FastSDEScheduler.from_config(pipe.scheduler.config)
    # Its list begins at the first level below t = 1, where the other pipeline's own loop begins.
    assert distance(sample(pipe, nfe=8, **arguments).result.samples, expected.result.samples) < 5e-3
    assert torch.isfinite(last_state(pipe, arguments, 3)).all()


def test_a_budget_is_kept_by_solvers_that_change_variables():
    pipe, arguments = built("FluxPipeline")
    seen = recorded(pipe)
    r = sample(pipe, nfe=12, solver=fastsde.ProbabilityFlow(), **arguments)
    assert r.result.nfe.tolist() == [seen["rows"]]
    assert seen["rows"] <= 12


def test_noise_of_a_sample_is_its_own():
    pipe, arguments = built("FluxPipeline")
    solver = ExponentialPC(eta=1.0)
    start = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(9))

    def drawn(*seeds):
        each = [torch.Generator().manual_seed(k) for k in seeds]
        run = {"nfe": 10, "solver": solver, "latents": start.expand(len(seeds), -1, -1), "progress": False}
        return fastsde.sample_pipeline(pipe, generator=each, **run, **arguments).result.samples

    assert distance(drawn(1, 2)[0], drawn(3)[0]) > 0.01
    assert distance(drawn(1, 2)[1], drawn(2)[0]) < 1e-4
    whole = sample(pipe, n=3, nfe=10, solver=solver, **arguments).result.samples
    alone = sample(pipe, index=[2], nfe=10, solver=solver, **arguments).result.samples
    assert distance(alone[0], whole[2]) < 1e-4
    assert distance(sample(pipe, index=[2], nfe=10, **arguments).result.samples, alone) > 0.01


def test_outputs_are_the_pipelines_own():
    pipe, arguments = built("StableDiffusionPipeline")
    r = sample(pipe, n=2, nfe=8, **{**arguments, "output_type": "pt"})
    with torch.no_grad():
        decoded = pipe.vae.decode(r.result.samples / pipe.vae.config.scaling_factor).sample
    torch.testing.assert_close(r.images, (decoded / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)
    assert type(r.outputs[0]) is type(pipe(**arguments, num_inference_steps=1))
    pil = sample(pipe, n=2, nfe=8, **{**arguments, "output_type": "pil"})
    assert [image.size for image in pil.images] == [(16, 16), (16, 16)]
    tuples = sample(pipe, n=2, nfe=8, return_dict=False, **{**arguments, "output_type": "pt"})
    assert torch.equal(tuples.images, r.images)
    with pytest.raises(AttributeError, match="has no frames"):
        pil.frames  # noqa: B018


def test_prompts_and_their_repeats():
    pipe, arguments = built("StableDiffusionPipeline")
    r = sample(pipe, nfe=8, num_images_per_prompt=2, **{**arguments, "prompt": PROMPTS[:2]})
    for k in range(4):
        alone = sample(pipe, nfe=8, index=[k], **{**arguments, "prompt": PROMPTS[k // 2]})
        assert distance(alone.result.samples[0], r.result.samples[k]) < 1e-4
    prompt, negative = pipe.encode_prompt(PROMPTS[:2], "cpu", 1, True, negative_prompt=["", ""])
    given = sample(pipe, nfe=8, prompt_embeds=prompt, negative_prompt_embeds=negative, **LATENT)
    expected = sample(pipe, nfe=8, negative_prompt="", **{**arguments, "prompt": PROMPTS[:2]})
    assert distance(given.result.samples, expected.result.samples) < 1e-5


def test_the_end_of_one_pipeline_is_the_start_of_another():
    base, arguments = PIPELINES["StableDiffusionXLPipeline"]()
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline(**base.components)
    for pipe in (base, refiner):
        pipe.set_progress_bar_config(disable=True)
    shared = {**arguments, **LATENT, "num_inference_steps": 40, "guidance_scale": 1.0}
    generator = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    x = base(**shared, denoising_end=0.6, generator=generator()).images
    theirs = refiner(**shared, image=x, denoising_start=0.6).images
    run = {"rtol": 0.01, "progress": False}
    half = fastsde.sample_pipeline(base, **run, **shared, denoising_end=0.6, generator=generator())
    whole = fastsde.sample_pipeline(refiner, **run, **shared, image=half.images, denoising_start=0.6)
    straight = fastsde.sample_pipeline(base, **run, **shared, generator=generator())
    assert half.process.t_min > straight.process.t_min
    assert distance(half.images, x) < 0.05  # 24 steps of first order
    assert distance(whole.images, theirs) < 0.1
    assert distance(whole.images, straight.images) < 0.05


def test_turns_are_numbered_as_in_the_own_loop_where_there_are_as_many():
    pipe, arguments = built("StableDiffusionPipeline")
    arguments["guidance_scale"] = 6.0
    cutoff = diffusers.callbacks.SDCFGCutoffCallback(cutoff_step_ratio=0.4)  # waits for one number
    seen = recorded(pipe)
    r = sample(pipe, num_inference_steps=20, callback_on_step_end=cutoff, **arguments)
    assert r.result.nfe.tolist() == [seen["rows"]] == [9 * 2 + 11]
    edit, arguments = built("StableDiffusionImg2ImgPipeline")  # half of the way
    seen = recorded(edit)
    assert sample(edit, num_inference_steps=20, **arguments).result.nfe.tolist() == [seen["rows"]] == [20]


def test_samples_share_nothing_that_pipelines_or_callbacks_write_into():
    pipe, arguments = built("FluxPipeline")
    scale = {"scale": 1.0, "more": {}}

    def note(inner, i, t, kwargs):
        inner._joint_attention_kwargs["more"]["last"] = i
        kwargs["prompt_embeds"].mul_(0.9)
        return kwargs

    run = {"nfe": 8, "callback_on_step_end": note, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    pipe.transformer.forward = without(pipe.transformer.forward, "joint_attention_kwargs")
    whole = sample(pipe, n=3, joint_attention_kwargs=scale, **run, **arguments)
    alone = sample(pipe, index=[2], joint_attention_kwargs=scale, **run, **arguments)
    assert distance(alone.result.samples[0], whole.result.samples[2]) < 1e-5
    assert scale == {"scale": 1.0, "more": {}}


def without(forward, name):
    """A network that takes no argument of that name."""

    def call(*args, **kwargs):
        kwargs.pop(name)
        return forward(*args, **kwargs)

    return call


def test_a_subclass_counts_as_its_base_does():
    class Own(diffusers.StableDiffusionControlNetPipeline):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

        __call__.__signature__ = inspect.signature(diffusers.StableDiffusionControlNetPipeline.__call__)

    pipe, arguments = built("StableDiffusionControlNetPipeline")
    mine = Own(**pipe.components, requires_safety_checker=False)
    window = {"control_guidance_end": 0.5, "num_inference_steps": 10, "nfe": 40}
    assert torch.equal(
        sample(mine, **window, **arguments).result.samples, sample(pipe, **window, **arguments).result.samples
    )
    space = inspect.unwrap(diffusers.StableDiffusionControlNetPipeline.__call__).__globals__
    assert "enumerate" not in space


def test_what_a_guider_hangs_on_its_network_is_taken_off():
    pipe, arguments = built("HunyuanImagePipeline")
    layers = diffusers.LayerSkipConfig([0], fqn="transformer_blocks")
    pipe.guider = diffusers.SkipLayerGuidance(
        3.0, skip_layer_guidance_start=0.0, skip_layer_guidance_stop=0.5, skip_layer_config=[layers]
    )
    r = sample(pipe, n=2, nfe=24, **arguments)
    assert "one after another" in r.separate
    alone = sample(pipe, index=[1], nfe=24, **arguments)
    assert distance(alone.result.samples[0], r.result.samples[1]) < 1e-5
    assert torch.isfinite(last_state(pipe, arguments, 2)).all()


def test_a_pipeline_that_changes_its_network_draws_its_first_sample_once():
    """Found out when the first samples have drawn their start already."""
    pipe, arguments = built("StableDiffusionPAGPipeline")
    several, one = (sample(pipe, n=2, nfe=8, batch_size=size, **arguments) for size in (8, 1))
    assert torch.equal(several.result.samples, one.result.samples)


def test_processors_that_look_across_the_batch():
    pipe, arguments = built("StableDiffusionPipeline")
    expected = sample(pipe, n=2, nfe=16, **arguments)

    class Mixing(type(next(iter(pipe.unet.attn_processors.values())))):
        def __call__(self, attn, hidden_states, *args, **kwargs):
            out = super().__call__(attn, hidden_states, *args, **kwargs)
            return out + out.mean(0, keepdim=True) * (len(out) > 2)

    pipe.unet.set_attn_processor(Mixing())
    r = sample(pipe, n=2, nfe=16, **arguments)
    assert distance(r.result.samples, expected.result.samples) < 1e-5
    assert r.separate is not None


@pytest.mark.parametrize("inside", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_a_loop_inside_of_a_mode_leaves_it(inside):
    class Inside(Echo):
        def __call__(self, num_inference_steps=10, generator=None):
            with inside():
                return super().__call__(num_inference_steps, generator)

    pipe = Inside(diffusers.DDIMScheduler(), tiny.unet())
    with pytest.raises(ValueError, match="put it around sample_pipeline"):
        sample(pipe, nfe=6)
    assert not torch.is_inference_mode_enabled()
    assert not torch.is_autocast_enabled("cpu")
    with inside():
        assert sample(echo_pipe(), nfe=6).result.success.all()


def echo_pipe():
    return Echo(diffusers.DDIMScheduler(), tiny.unet())


def test_edits_of_a_callback_stay_in_the_state():
    pipe, arguments = built("FluxPipeline")
    pull = lambda latents, dt: latents - 2.0 * dt * latents  # noqa: E731

    def callback(inner, i, t, kwargs, last={}):  # noqa: B006 - one walk each
        dt = max(0.0, last.get(id(inner), 1.0) - float(t) / 1000)
        last[id(inner)] = float(t) / 1000
        return {"latents": pull(kwargs["latents"], dt)}

    own = [last_state(pipe, {**arguments, "callback_on_step_end": callback}, k) for k in (60, 120)]

    def in_place(inner, i, t, kwargs):
        kwargs["latents"].copy_(callback(inner, i, t, kwargs)["latents"])
        return kwargs

    def ours(edit):
        generator = torch.Generator().manual_seed(0)
        shared = {"num_inference_steps": 60, "generator": generator, "progress": False}
        return fastsde.sample_pipeline(pipe, callback_on_step_end=edit, **shared, **arguments)

    r = ours(callback)
    for again in (ours(in_place), torch.inference_mode()(ours)(in_place)):
        assert distance(again.result.samples, r.result.samples) < 1e-6
    plain = last_state(pipe, arguments, 120)
    assert distance(plain, own[1]) > 0.5
    # Edits of first order in the step, at other times than those of the own loop.
    assert distance(first_array(r.outputs[0]), own[1]) < 0.1


class Echo(diffusers.DiffusionPipeline):
    """A loop that notes what it reads of its scheduler, with a network of no meaning."""

    def __init__(self, scheduler, unet):
        super().__init__()
        self.register_modules(scheduler=scheduler, unet=unet)

    def __call__(self, num_inference_steps=10, generator=None, how="plain"):
        self.notes = notes = []
        self.scheduler.set_timesteps(num_inference_steps)
        timesteps = self.scheduler.timesteps
        later = len(list(filter(lambda t: t < 500, timesteps)))
        x = torch.randn(1, 3, 8, 8, generator=generator)
        for i, t in enumerate(timesteps):
            level = self.scheduler.sigmas[i] if hasattr(self.scheduler, "sigmas") else None
            if how == "next first":
                timesteps[i + 1]
            if how == "interrupt" and i > 2:
                continue
            out = self.unet(self.scheduler.scale_model_input(x, t), t).sample
            for _ in range(2 if how == "twice" else 1):
                x = self.scheduler.step(out, t, x).prev_sample
            last = i == len(timesteps) - 1
            notes.append((i, float(t), None if last else float(timesteps[i + 1]), level, last))
        if how == "again":
            for t in timesteps:
                x = self.scheduler.step(self.unet(x, t).sample, t, x).prev_sample
        return {"images": x, "notes": notes, "later": later}


def echo(scheduler=None, **arguments):
    made = Echo(scheduler or diffusers.EulerDiscreteScheduler(timestep_spacing="trailing"), tiny.unet())
    return sample(made, **{"nfe": 6, **arguments})


def test_a_loop_reads_its_times_and_levels_where_it_is():
    r = echo(num_inference_steps=20)
    notes = r.outputs[0]["notes"]
    bars = diffusers.EulerDiscreteScheduler().alphas_cumprod.double()
    assert r.result.nfe.tolist() == [len(notes)] == [6]
    assert [n[4] for n in notes] == [False] * 5 + [True]
    assert [n[2] for n in notes[:-1]] == [n[1] for n in notes[1:]]
    for _, t, _, level, _ in notes:
        low = int(t)
        near = ((1 - bars) / bars).sqrt()[[low, min(low + 1, 999)]]
        assert float(near[0]) * 0.999 <= float(level) <= float(near[1]) * 1.001
    # Numbers say where in the loop's own list a time is: the last one not below it.
    own = torch.linspace(1000, 0, 21)[:-1] - 1
    assert [n[0] for n in notes] == [max(0, int((own >= n[1] * (1 - 1e-6)).sum()) - 1) for n in notes]
    assert r.outputs[0]["later"] == 10  # a loop that takes no steps sees the loop's own list


def test_loops_that_cannot_be_answered_are_refused():
    for how, match in (("next first", "reads the time of its next step"), ("twice", "several steps a turn")):
        with pytest.raises(ValueError, match=match):
            echo(how=how)
    with pytest.raises(SamplingError, match="takes a step"):
        echo(how="again")
    pipe, arguments = built("StableDiffusionPipeline")
    with pytest.raises(ValueError, match="own scheduler, which does not run here"):
        sample(pipe, eta=0.5, nfe=8, **arguments)
    model = fastsde.from_diffusers(pipe)
    times = fastsde.Grid.tapered(model.sde, 3).times
    fitted = fastsde.FittedSolver(times=tuple(times.tolist()), log_snr=tuple(model.sde.log_snr(times).tolist()))
    pipe.scheduler = FastSDEScheduler.from_config(pipe.scheduler.config, fitted=fitted)
    with pytest.raises(ValueError, match="call the pipeline, or give it a scheduler without fitted="):
        sample(pipe, **arguments)


def test_a_loop_that_its_callback_stops():
    r = echo(how="interrupt", num_inference_steps=6, nfe=12)
    assert r.result.counts() == {"STOPPED": 1}
    assert torch.isfinite(r.outputs[0]["images"]).all()
    pipe, arguments = built("StableDiffusionPipeline")

    def stop(inner, i, t, kwargs):
        inner._interrupt = float(t) < 500
        return kwargs

    def stop_outside(inner, i, t, kwargs):
        pipe._interrupt = float(t) < 500
        return kwargs

    r = sample(pipe, n=2, nfe=20, callback_on_step_end=stop_outside, **arguments)
    assert r.result.counts() == {"STOPPED": 2}
    r = sample(pipe, n=2, nfe=20, callback_on_step_end=stop, **{**arguments, "output_type": "pt"})
    assert r.result.counts() == {"STOPPED": 2}
    assert torch.isfinite(r.images).all()


@pytest.mark.parametrize(
    ("name", "arguments", "match"),
    [
        ("StableDiffusionPipeline", {"colour": "red"}, "takes no colour; its call takes prompt"),
        ("StableDiffusionPipeline", {"prompt": PROMPTS, "n": 2}, "number of samples disagrees: n says 2, prompts"),
        ("StableDiffusionPipeline", {"per_sample": {"prompt": PROMPTS}}, "both for all samples and in per_sample"),
        ("StableDiffusionPipeline", {"per_sample": {"guidance_scale": 3.0}}, "must be a list with one value"),
        ("StableDiffusionPipeline", {"solver": "DDIM"}, "solver must be an object"),
        ("StableDiffusionPipeline", {"guidance_scale": [3.0, 4.0]}, "one for each of 1 samples"),
        ("StableDiffusionPipeline", {"seed": None, "index": [3]}, "index= names samples of a seed"),
        ("StableDiffusionPipeline", {"prompt": []}, "got an empty list"),
        ("StableDiffusionPipeline", {"index": []}, "index must name at least one"),
        ("StableDiffusionPipeline", {"seed": None, "generator": []}, "generator must be"),
        (
            "StableDiffusionControlNetPipeline",
            {"n": 2, "controlnet_conditioning_scale": [0.0, 2.0]},
            "one for each, or",
        ),
        ("StableDiffusionPipeline", {"per_sample": {"guidance_scale": [1.0]}, "n": 2}, "number of samples disagrees"),
        ("StableDiffusionPipeline", {"rtol": -1.0}, "rtol must be"),
        ("StableDiffusionPipeline", {"nfe": 10, "rtol": 0.1}, "either nfe= or rtol"),
        ("StableDiffusionPipeline", {"generator": torch.Generator()}, "either seed= or generator="),
        ("StableDiffusionPipeline", {"index": [2**33]}, "index must be in"),
        ("StableDiffusionPipeline", {"batch_size": 0}, "batch_size must be"),
        ("StableDiffusionPipeline", {"nfe": 2}, "nfe must be at least"),
        ("StableDiffusionImg2ImgPipeline", {"image": [IMAGE, IMAGE], "n": 2}, "one for each, or all of them"),
        ("StableDiffusionImg2ImgPipeline", {"strength": 2.0}, "strength should in"),
        ("LTX2Pipeline", {}, "copies its scheduler"),
        ("KandinskyV22CombinedPipeline", {}, "runs other pipelines"),
        ("StableAudioPipeline", {}, "CosineDPMSolverMultistepScheduler"),
        ("AmusedPipeline", {}, "AmusedScheduler"),
        ("LatentConsistencyModelPipeline", {}, "distilled"),
    ],
)
def test_bad_input_is_refused_before_the_first_call(name, arguments, match):
    if name == "StableAudioPipeline":
        pytest.importorskip("torchsde")  # its scheduler cannot be made without it
    pipe, own = built(name)
    seen = recorded(pipe) if name != "KandinskyV22CombinedPipeline" else {"rows": 0}
    with pytest.raises((ValueError, TypeError), match=match):
        sample(pipe, **{**own, **arguments})
    if match != "nfe must be at least":  # which takes the cost of an evaluation
        assert seen["rows"] == 0


def test_what_is_no_pipeline_with_one_scheduler():
    with pytest.raises(TypeError, match="pipe must be a pipeline"):
        sample(tiny.vae())
    with pytest.raises(TypeError, match="must have one scheduler, named scheduler; it has none"):
        sample(Bare(tiny.unet()))
    pipe, arguments = built("StableDiffusionPipeline")
    pipe.unet.register_to_config(_name_or_path="some/sd-turbo")
    with pytest.raises(ValueError, match="distilled"):
        sample(pipe, nfe=8, **arguments)
    assert sample(pipe, nfe=8, allow_distilled=True, **arguments).result.success.all()


class Bare(diffusers.DiffusionPipeline):
    def __init__(self, unet):
        super().__init__()
        self.register_modules(unet=unet)

    def __call__(self):
        raise AssertionError


def test_samples_that_start_at_different_times_are_refused():
    pipe, arguments = built("StableDiffusionImg2ImgPipeline")
    arguments.pop("strength")
    with pytest.raises(ValueError, match="one shape and one start"):
        sample(pipe, nfe=8, per_sample={"strength": [0.5, 0.8]}, **arguments)


def test_nothing_finished_is_lost_when_a_callback_raises():
    pipe, arguments = built("FluxPipeline")
    calls = []

    def fail(inner, i, t, kwargs):
        calls.append(i)
        if len(calls) > 15:
            raise ArithmeticError("mine")
        return kwargs

    shared = {"n": 3, "nfe": 6, "batch_size": 1, "callback_on_step_end": fail, **arguments}
    with pytest.raises(SamplingError, match=r"after 2 of 3 samples \(ArithmeticError: mine\)") as caught:
        sample(pipe, **shared)
    r = caught.value.result
    assert r.result.counts() == {"SUCCESS": 2, "PENDING": 1}
    assert [out is None for out in r.outputs] == [False, False, True]
    with pytest.raises(ArithmeticError, match="mine"):  # nothing was finished
        sample(pipe, **shared)
    assert torch.is_grad_enabled()


def test_ctrl_c_hands_over_what_is_finished():
    pipe, arguments = built("FluxPipeline")
    calls = []

    def stop(inner, i, t, kwargs):
        calls.append(i)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return kwargs

    with pytest.raises(Interrupted) as caught:
        sample(pipe, n=3, nfe=6, batch_size=1, callback_on_step_end=stop, **arguments)
    r = caught.value.result
    assert r.result.counts() == {"SUCCESS": 1, "PENDING": 2}
    assert torch.isnan(r.images).any(2).any(1).tolist() == [False, True, True]
    assert torch.is_grad_enabled()
    assert sample(pipe, nfe=6, **arguments).result.success.all()  # the pipeline is as it was


def test_memory_that_suffices_for_fewer_samples():
    pipe, arguments = built("FluxPipeline")
    expected = sample(pipe, n=5, nfe=6, **arguments).result.samples
    own, rows = pipe.transformer.forward, []

    def little(hidden_states, **kwargs):
        if len(hidden_states) > 2:
            raise torch.OutOfMemoryError("too many")
        rows.append(len(hidden_states))
        return own(hidden_states=hidden_states, **kwargs)

    pipe.transformer.forward = little
    r = sample(pipe, n=5, nfe=6, **arguments)
    assert distance(r.result.samples, expected) < 1e-5
    assert r.result.nfe.tolist() == [6] * 5
    assert sum(rows) == 30

    def none_for_one(hidden_states, guidance, **kwargs):
        if float(guidance.max()) > 5 and float(kwargs["timestep"].min()) < 0.7:
            raise torch.OutOfMemoryError("too large")
        return own(hidden_states=hidden_states, guidance=guidance, **kwargs)

    pipe.transformer.forward = none_for_one
    r = sample(pipe, n=3, nfe=6, guidance_scale=[3.0, 6.0, 4.0], **arguments)
    assert r.result.counts() == {"SUCCESS": 2, "FAILED": 1}
    assert torch.isnan(r.images).any(2).any(1).tolist() == [False, True, False]
    assert isinstance(r.errors[1], torch.OutOfMemoryError)


def test_nothing_is_lost_when_the_decoder_fails(monkeypatch):
    pipe, arguments = built("StableDiffusionPipeline")
    kept = sample(pipe, n=2, nfe=8, **arguments).result.samples

    def fail(*args, **kwargs):
        raise MemoryError("too large")

    monkeypatch.setattr(pipe.vae, "decode", fail)
    with pytest.raises(SamplingError, match=r"after its loop for 2 of 2 samples, .* MemoryError: too large") as caught:
        sample(pipe, n=2, nfe=8, **{**arguments, "output_type": "pt"})
    assert torch.equal(caught.value.result.result.samples, kept)
    own, dog = pipe.unet.forward, pipe.encode_prompt("dog", "cpu", 1, False)[0]

    def none_for_dogs(x, t, **kwargs):
        if float(t.max()) < 700 and torch.equal(kwargs["encoder_hidden_states"][-1:], dog):
            raise torch.OutOfMemoryError("too large")
        return own(x, t, **kwargs)

    # Memory that did not suffice for one sample hides nothing of the others.
    pipe.unet.forward = none_for_dogs
    with pytest.raises(SamplingError, match="after its loop for 1 of 2 samples") as caught:
        sample(pipe, nfe=8, **{**arguments, "prompt": ["a", "dog"], "output_type": "pt"})
    assert caught.value.result.result.counts() == {"SUCCESS": 1, "FAILED": 1}


def test_a_sample_that_is_not_finite_harms_no_other():
    pipe, arguments = built("FluxPipeline")
    expected = sample(pipe, n=3, nfe=6, **arguments)
    own = pipe.transformer.forward

    def broken(hidden_states, guidance, **kwargs):
        out = own(hidden_states=hidden_states, guidance=guidance, **kwargs)
        bad = (guidance > 5) & (kwargs["timestep"] < 0.7)
        return (torch.where(bad[:, None, None], torch.nan, out[0]), *out[1:])

    pipe.transformer.forward = broken
    r = sample(pipe, n=3, nfe=6, guidance_scale=[3.5, 6.0, 3.5], **arguments)
    assert r.result.counts() == {"SUCCESS": 2, "NON_FINITE": 1}
    assert distance(r.result.samples[[0, 2]], expected.result.samples[[0, 2]]) < 1e-5
    assert [out is None for out in r.outputs] == [False, True, False]


CACHES = {
    "first block": lambda pipe: diffusers.FirstBlockCacheConfig(threshold=0.5),
    "taylor": lambda pipe: diffusers.TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=2, cache_identifiers=[r"blocks\.\d+"]
    ),
    "pyramid": lambda pipe: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 900),
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "faster": lambda pipe: diffusers.FasterCacheConfig(
        spatial_attention_timestep_skip_range=(100, 900),
        attention_weight_callback=lambda _: 0.3,
        current_timestep_callback=lambda: pipe.current_timestep,
        is_guidance_distilled=True,
    ),
}


@pytest.mark.parametrize("cache", CACHES)
def test_caches_remember_each_sample_alone(cache):
    pipe, arguments = built("WanPipeline")
    plain = sample(pipe, n=2, nfe=24, **arguments).result.samples
    pipe.transformer.enable_cache(CACHES[cache](pipe))
    r = sample(pipe, n=3, nfe=24, batch_size=2, **arguments)
    assert "cache hooks" in r.separate
    assert distance(r.result.samples[:2], plain) > 1e-6  # the cache is at work
    assert distance(r.result.samples[:2], plain) < 0.5
    for k in range(3):
        alone = sample(pipe, index=[k], nfe=24, **arguments).result.samples
        assert torch.equal(alone[0], r.result.samples[k])
    # And the pipeline's own loop finds nothing of ours.
    before = last_state(pipe, arguments, 4)
    sample(pipe, nfe=24, **arguments)
    assert torch.equal(last_state(pipe, arguments, 4), before)
    difference, again = restarted_with(pipe, arguments)
    assert again.rejected.tolist() == [1, 1]
    assert difference < 1e-6


def restarted_with(pipe, arguments):
    process = sample(pipe, nfe=8, **arguments).process
    coarse, fine = (fastsde.Grid.log_snr(process, k) for k in (4, 6))
    again = sample(pipe, n=2, controller=fastsde.AdaptiveGrid([coarse, fine], rtol=1e-9, atol=1e-12), **arguments)
    whole = sample(pipe, n=2, controller=fine, **arguments)
    return distance(again.result.samples, whole.result.samples), again.result


class Rows(nn.Module):
    """A network that treats rows alone, whatever they come in."""

    def forward(self, x, timestep, *, text=None, extra=None, scale=1.0, return_dict=False):
        t = timestep if timestep.ndim else timestep.expand(len(x))
        out = [one * when * scale for one, when in zip(x, t, strict=True)]
        if text is not None:
            out = [one + words.sum() for one, words in zip(out, text, strict=True)]
        if extra is not None:
            out = [one + more for one, more in zip(out, extra["added"], strict=True)]
        return (out if isinstance(x, list) else torch.stack(out), [torch.stack([o.sum() for o in out])])


class Wrapped(nn.Module):
    """Says nothing of its arguments."""

    def __init__(self):
        super().__init__()
        self.inside = Rows()

    def forward(self, *args, **kwargs):
        return self.inside(*args, **kwargs)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(1, 3), min_size=2, max_size=4),
    kind=st.sampled_from([Rows, Wrapped]),
    lists=st.booleans(),
    scalar=st.booleans(),
    texts=st.sampled_from(["none", "own", "shared size"]),
    seed=st.integers(0, 1000),
)
def test_a_joint_call_is_the_calls_it_joins(rows, kind, lists, scalar, texts, seed):
    g = torch.Generator().manual_seed(seed)
    network, calls = kind(), []
    for k, n in enumerate(rows):
        x = torch.randn(n, 2, 3, generator=g)
        t = torch.rand((), generator=g) if scalar and not lists else torch.rand(n, generator=g)
        kwargs = {"extra": {"added": torch.randn(n, 1, 1, generator=g)}, "scale": 2.0, "return_dict": False}
        if texts != "none":
            kwargs["text"] = torch.randn(n, 5 if texts == "shared size" else 5 + k, 4, generator=g)
        calls.append(Call(network, (list(x) if lists else x, t), kwargs, None))
    try:
        args, kwargs = joined(calls)
    except CannotJoinError:
        assert texts == "own"  # texts of other lengths, which are no rows of one tensor
        return
    parts = parted(network(*args, **kwargs), rows, lists)
    for call, part in zip(calls, parts, strict=True):
        alone = network(*call.args, **call.kwargs)
        for a, b in zip(part[0], alone[0], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        torch.testing.assert_close(part[1][0], alone[1][0], rtol=0, atol=1e-5)
