"""Tiny pipelines of many classes with random weights: what each is built of, and a call that ends in its last state.

Text goes in as embeddings where a pipeline takes them, so that no tokenizer and no encoder is needed.
"""

import inspect

import diffusers
import numpy as np
import tiny_audio_pipelines
import tiny_image_pipelines
import tiny_other_pipelines
import tiny_video_pipelines
import torch
from tiny_parts import normal

import fastsde
from fastsde.diffusers import FastSDEScheduler, decode_latents

PIPELINES = (
    tiny_image_pipelines.PIPELINES
    | tiny_video_pipelines.PIPELINES
    | tiny_audio_pipelines.PIPELINES
    | tiny_other_pipelines.PIPELINES
)
"""Name of a class -> function that gives (pipe, arguments of its call)."""
READ = {
    "StableDiffusionPipeline": {"prompt": "", "guidance_scale": 1.0},
    "StableDiffusionXLPipeline": {"prompt": "", "guidance_scale": 1.0},
    "StableDiffusion3Pipeline": {"prompt": "", "guidance_scale": 1.0, "max_sequence_length": 256},
    "FluxPipeline": {"prompt": "", "guidance_scale": 3.5, "max_sequence_length": 512},
    "PixArtAlphaPipeline": {"prompt": "", "guidance_scale": 1.0, "max_sequence_length": 120},
    "DiTPipeline": {"class_labels": [1000], "guidance_scale": 1.0},
    "DDPMPipeline": {},
    "DDIMPipeline": {},
    "IFPipeline": {"guidance_scale": 1.0},
}
"""What a pipeline is to be asked for to do what `from_diffusers` reads: the empty prompt, or no class, unguided."""
AS_TEXT = (
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionPipeline, IP-Adapter",
    "StableDiffusionPAGPipeline",
    "StableDiffusionAdapterPipeline",
    "StableDiffusionPAGImg2ImgPipeline",
    "StableDiffusionXLPAGPipeline",
    "StableDiffusionGLIGENPipeline",
    "StableDiffusionPanoramaPipeline",
    "StableDiffusionSAGPipeline",
    "SemanticStableDiffusionPipeline",
    "StableDiffusion3Img2ImgPipeline",
    "StableDiffusion3InpaintPipeline",
    "StableDiffusion3PAGPipeline",
    "FluxImg2ImgPipeline",
    "FluxInpaintPipeline",
    "FluxKontextPipeline",
    "FluxKontextInpaintPipeline",
    "PixArtSigmaPipeline",
    "PixArtSigmaPAGPipeline",
    "IFImg2ImgPipeline",
    "IFInpaintingPipeline",
    "IFSuperResolutionPipeline",
    "TextToVideoSDPipeline",
    "AudioLDMPipeline",
    "MusicLDMPipeline",
    "LDMPipeline",
    "RePaintPipeline",
)
"""Pipelines whose network is read as that of the text-to-image (or unconditional) pipeline of the same parts."""


def limit_scheduler(scheduler):
    """One whose steps lead to the flow of a pipeline's own, where that adds noise."""
    if isinstance(scheduler, (diffusers.DDPMScheduler, diffusers.EulerAncestralDiscreteScheduler)):
        return diffusers.DPMSolverMultistepScheduler.from_config(scheduler.config)
    return scheduler


def last_state(pipe, arguments, steps, seed=0):
    """What the pipeline's own loop ends in, from the noise of a seed."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # some draw an encoder's noise without the generator
    call = {"output_type": "latent", **arguments, "num_inference_steps": steps, "generator": generator}
    if "output_type" not in inspect.signature(type(pipe).__call__).parameters:
        del call["output_type"]
    with torch.no_grad():
        out = pipe(**call, return_dict=False)[0]
    while isinstance(out, (list, tuple)):
        out = out[0]
    return torch.as_tensor(np.asarray(out)).float()


def read_state(pipe, steps, seed=0):
    """The same from `from_diffusers` and `sample`.

    Raises:
        ValueError, TypeError: where the pipeline is refused.
    """
    flux = isinstance(pipe, diffusers.FluxPipeline)
    model, sde = fastsde.from_diffusers(pipe, **({"event_shape": (4, 8, 8)} if flux else {}))
    noise = torch.randn((1, *model.event_shape), generator=torch.Generator().manual_seed(seed))
    start = noise * model.sde.prior_std if isinstance(sde, fastsde.RectifiedFlow) else noise
    cond = {"encoder_hidden_states": normal(1, 5, 32)} if isinstance(pipe, diffusers.IFPipeline) else None
    x = fastsde.sample(model, sde, x_init=start, nfe=steps, dtype=torch.float32, cond=cond).samples
    if flux:
        x = pipe._pack_latents(x, 1, 4, 8, 8)
    if isinstance(pipe, diffusers.DiTPipeline):
        x = decode_latents(pipe.vae, x)
    return x if hasattr(pipe, "text_encoder") else (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def distance(a, b):
    """|| a - b || / || b ||."""
    return float((a - b).norm() / b.norm())


def drop_in(name, steps, more_steps=None):
    """Distance of the drop-in's last state to the own loop's, and of that with half as many steps.

    Raises:
        ValueError: where the drop-in refuses.
    """
    pipe, arguments = PIPELINES[name]()
    own, ours = pipe.scheduler, FastSDEScheduler.from_config(pipe.scheduler.config)
    if name != "CosmosTextToWorldPipeline":
        pipe.scheduler = limit_scheduler(own)
        half, whole = (last_state(pipe, arguments, n) for n in (steps // 2, steps))
    pipe.scheduler = ours
    return distance(last_state(pipe, arguments, more_steps or steps), whole), distance(half, whole)


def read(name, steps):
    """The same for `from_diffusers`; errors as `read_state`."""
    pipe, arguments = PIPELINES[name]()
    ours = read_state(pipe, min(steps, 100))
    pipe.scheduler = limit_scheduler(pipe.scheduler)
    half, whole = (last_state(pipe, {**arguments, **READ[name]}, n) for n in (steps // 2, steps))
    return distance(ours, whole), distance(half, whole)
