"""What is measured of a pipeline in its own loop: by tests on some classes, by benchmarks/pipelines.py on all."""

import inspect

import numpy as np
import torch
from tiny_pipelines import PIPELINES, distance, last_state, limit_scheduler

import fastsde
from fastsde import HEUN, AdaptiveGrid, Grid, ProbabilityFlow

PROMPTS = ["a red cat", "blue", "a green dog"]


def built(name):
    """The pipeline of that name, and arguments of its call for one sample, with its last state as the output."""
    pipe, arguments = PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    arguments = {"output_type": "latent", **arguments}
    arguments.pop("batch_size", None)
    return pipe, arguments


def networks(pipe):
    """The networks whose calls count."""
    from fastsde.diffusers.loop import denoisers

    return denoisers(pipe).items()


def recorded(pipe):
    """Counts the rows that its networks are called with, and their forwards, from now on."""
    seen = {"rows": 0, "forwards": 0}
    for name, network in networks(pipe):
        if not name.startswith(("unet", "transformer")):  # others are called before the loop
            continue

        def forward(*args, own=network.forward, **kwargs):
            values = (*args, *kwargs.values())
            states = (v for v in values if isinstance(v, list) or (torch.is_tensor(v) and v.ndim > 1))
            seen["rows"] += len(next(states, ()))
            seen["forwards"] += 1
            return own(*args, **kwargs)

        network.forward = forward
    return seen


def first_array(output):
    """The first sample of a pipeline's output."""
    out = output[0] if isinstance(output, tuple) else next(v for v in vars(output).values() if v is not None)
    while isinstance(out, (list, tuple)):
        out = out[0]
    return torch.as_tensor(np.asarray(out)).float()


def agreement(name, steps):
    """Distance of our sample to the own loop's with as many evaluations, and of that loop's to its own with half."""
    pipe, arguments = built(name)
    pipe.scheduler = limit_scheduler(pipe.scheduler)
    half, whole = (last_state(pipe, PIPELINES[name]()[1], k) for k in (steps // 2, steps))
    generator = torch.Generator().manual_seed(0)
    r = fastsde.sample_pipeline(pipe, generator=generator, num_inference_steps=steps, progress=False, **arguments)
    return distance(first_array(r.outputs[0]), whole), distance(half, whole)


def mixed(name):
    """Three samples at times of their own: the distance of the last to itself alone, calls said and calls made."""
    pipe, arguments = built(name)
    seen = recorded(pipe)
    each = {"prompt": PROMPTS} if isinstance(arguments.get("prompt"), str) else {}
    if "guidance_scale" in inspect.signature(type(pipe).__call__).parameters:
        each["guidance_scale"] = [2.0, 3.0, 4.0]
    shared = {key: value for key, value in arguments.items() if key not in each}
    shared |= {"seed": 3, "solver": ProbabilityFlow(tableau=HEUN), "rtol": 0.5, "progress": False, "max_nfe": 200}
    r = fastsde.sample_pipeline(pipe, n=3, per_sample=each, batch_size=3, **shared)
    made = seen["rows"]
    alone = fastsde.sample_pipeline(pipe, index=[2], **shared, **{key: value[2] for key, value in each.items()})
    return distance(r.result.samples[2], alone.result.samples[0]), r, made


def restarted(name):
    """Distance of samples that were sent back to their start to the same on the finer grid alone."""
    pipe, arguments = built(name)
    sde = fastsde.sample_pipeline(pipe, nfe=8, seed=3, progress=False, **arguments).process
    coarse, fine = (Grid.log_snr(sde, k) for k in (4, 6))
    never = AdaptiveGrid([coarse, fine], rtol=1e-9, atol=1e-12)
    shared = {"seed": 3, "progress": False, **arguments}
    again = fastsde.sample_pipeline(pipe, controller=never, **shared).result
    whole = fastsde.sample_pipeline(pipe, controller=fine, **shared).result
    return distance(again.samples, whole.samples), again
