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

from fastsde.diffusers import FastSDEScheduler

PIPELINES = (
    tiny_image_pipelines.PIPELINES
    | tiny_video_pipelines.PIPELINES
    | tiny_audio_pipelines.PIPELINES
    | tiny_other_pipelines.PIPELINES
)
"""Name of a class -> function that gives (pipe, arguments of its call)."""


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


def distance(a, b):
    """|| a - b || / || b ||."""
    return float((a - b).norm() / b.norm())


def drop_in(name, steps, more_steps=None):
    """Distance of the drop-in's last state to the own loop's, and of that with half as many steps.

    Raises:
        ValueError: where the drop-in refuses.
    """
    pipe, arguments = PIPELINES[name]()
    own = limit_scheduler(pipe.scheduler)
    ours = FastSDEScheduler.from_config(own.config)
    if name != "CosmosTextToWorldPipeline":
        pipe.scheduler = own
        half, whole = (last_state(pipe, arguments, n) for n in (steps // 2, steps))
    pipe.scheduler = ours
    return distance(last_state(pipe, arguments, more_steps or steps), whole), distance(half, whole)
