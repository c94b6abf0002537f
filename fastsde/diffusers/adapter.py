"""`from_diffusers`: any pretrained diffusers model as a score model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsde.checks import check_instance, check_kind
from fastsde.diffusers.latents import autoencoder
from fastsde.diffusers.loading import load
from fastsde.diffusers.networks import LATENT_RANGE, DiffusersModel, check_known, config_of
from fastsde.diffusers.schedules import CLASSES, Config, Reading, read_schedule
from fastsde.score.base import ScoreModel
from fastsde.score.guidance import NEGATIVE, ClassifierFreeGuidance, Clipped
from fastsde.score.network import check_weights
from fastsde.sde.discrete import DiscreteVPSDE


def from_diffusers(
    pipe_or_model: Any,
    scheduler: Any = None,
    *,
    guidance_scale: float | None = None,
    guidance_rescale: float = 0.0,
    guidance_interval: tuple[float, float] | None = None,
    clip: bool | None = None,
    event_shape: tuple[int, ...] | None = None,
    data_range: tuple[float, float] | None = None,
    allow_distilled: bool = False,
    **loading: Any,
) -> ScoreModel:
    r"""A pretrained diffusers model as a score model.

        r = fastsde.sample(fastsde.from_diffusers("google/ddpm-cifar10-32"), n=64, rtol=0.05)

    The configurations say the noise levels (`alphas_cumprod`), the network's time, what it predicts, and whether
    predictions are clipped. The class of the scheduler is not used. Known networks are UNet2DModel (with class labels,
    and those of score_sde, whose time is sigma), UNet2DConditionModel, DiT, PixArt and SD3 transformers, and callables
    with such a signature. All others are refused. For these use `sample_pipeline`.

    From a pipeline only the network and the scheduler are taken. Give the embeddings that text networks need in
    `sample(cond=...)`. Samples of latent models are latents: `fastsde.diffusers.decode_latents(pipe.vae, r.samples)`.

    Args:
        pipe_or_model: a pipeline, a network, or a callable `network(x, timestep, **cond)`. Or where to load it from: a
            folder, a name on the hub, a `.safetensors` file (see `fastsde.diffusers.load`).
        scheduler: a scheduler or its configuration. A pipeline has its own.
        guidance_scale: classifier-free guidance with this scale. It makes two calls in each evaluation. None and values
            up to 1 mean no guidance.
        guidance_rescale, guidance_interval: as `rescale` and `interval` of `ClassifierFreeGuidance`.
        clip: whether denoised predictions are clipped. By default they are if the configuration says so (`clip_sample`,
            `thresholding`), but never for latents. Clipping makes the score less smooth; see `Clipped`.
        event_shape: (C, H, W) of the state; from the configuration by default. Plain callables need it, or
            `shape=` in `sample`.
        data_range: (low, high) of the data, which sets the default atol. By default [0, 1] for the score_sde networks,
            two standard deviations for latents, and [-1, 1] for all others.
        allow_distilled: do not refuse checkpoints that look distilled.
        loading: arguments of `fastsde.diffusers.load`.

    Returns:
        The score model. Its process is `.sde`. `model, sde = from_diffusers(...)` also works.

    Raises:
        ValueError: for models that cannot work, with the reason: distilled ones (LCM, turbo, schnell), epsilon with
            zero terminal SNR, networks that need an image beside the state, integer timesteps, weights not finite.
        TypeError: if `pipe_or_model` is neither a model nor a place to load one from, or if there is no scheduler.
        FileNotFoundError: if there is nothing to load.
    """
    if isinstance(pipe_or_model, (str, Path)):
        pipe_or_model, scheduler = load(pipe_or_model, scheduler, **loading)
    elif loading:
        raise TypeError(f"{', '.join(loading)}: only for models that are loaded from a folder, a file or the hub.")
    scale = 1.0 if guidance_scale is None else guidance_scale
    # What would be ignored or fail late.
    if not isinstance(scale, (int, float)) or not math.isfinite(scale) or scale < 0:
        raise ValueError(
            f"guidance_scale must be a finite number that is not negative (one for each sample goes into cond); got "
            f"{scale!r}."
        )
    check_kind("clip", clip, bool, "True, False or None")
    if scale <= 1 and (guidance_rescale or guidance_interval is not None):
        raise ValueError("guidance_rescale and guidance_interval need a guidance_scale above 1.")
    pipe = pipe_or_model if hasattr(pipe_or_model, "components") else None
    network = pipe_or_model if pipe is None else network_of(pipe)
    check_instance("pipe_or_model", network, Callable, "a pipeline, a network or a path")
    if scheduler is None and pipe is not None:
        scheduler = pipe.scheduler
    latent = pipe is not None and autoencoder(pipe) is not None
    check_known(network)
    if isinstance(network, nn.Module):
        check_weights(network)
    reading = read_schedule(scheduler_config(scheduler))
    _check_table(scheduler, reading)
    model = DiffusersModel(
        network,
        reading,
        event_shape=event_shape,
        data_range=data_range or (LATENT_RANGE if latent else None),
        allow_distilled=allow_distilled,
    )
    whole = _guided(model, scale, guidance_rescale, guidance_interval)
    clips = reading.limit is not None and (not latent if clip is None else clip)
    return Clipped(whole, reading.limit, ratio=reading.ratio) if clips else whole


def _check_table(scheduler: Any, reading: Reading) -> None:
    """Refuses, with a ValueError, a scheduler whose table is not that of its configuration."""
    table = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(table, Tensor) or not isinstance(reading.sde, DiscreteVPSDE) or len(table) != reading.levels:
        return
    k = torch.arange(reading.levels - 1, dtype=torch.float64)  # the last one is moved where the terminal SNR is zero
    ours, theirs = reading.sde.alpha(reading.time(k)) ** 2, table[:-1].double().cpu()
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6):
        raise ValueError(
            f"the alphas_cumprod of {type(scheduler).__name__} are not those of its configuration. Give the table: "
            "scheduler=dict(trained_betas=[...], prediction_type=...)."
        )


def _guided(model: ScoreModel, scale: float, rescale: float, interval: tuple[float, float] | None) -> ScoreModel:
    """The model under classifier-free guidance, if the scale is above 1; its defaults are those of the other half."""
    if scale <= 1:
        return model
    own = model.default_cond or {}
    wanted = {key: value for key, value in own.items() if not key.startswith(NEGATIVE)}
    model.default_cond = wanted or None
    null = {key: own.get(NEGATIVE + key, value) for key, value in wanted.items() if key not in _SHARED}
    return ClassifierFreeGuidance(model, scale, negative=null, rescale=rescale, interval=interval)


_SHARED = ("time_ids", "resolution", "aspect_ratio", "guidance")
"""Conditioning that says nothing of the content: the same in both halves of guidance."""


def scheduler_config(scheduler: Any) -> Config:
    """The configuration of a scheduler, or the one given; a TypeError for what is neither."""
    if isinstance(scheduler, Mapping):
        return scheduler
    config = config_of(scheduler)
    if not config:
        raise TypeError(f"scheduler must be a diffusers scheduler or its configuration; got {scheduler!r}.")
    # Somebody's own scheduler is of the class that it is made from.
    bases = [kind.__name__ for kind in type(scheduler).__mro__]
    return {**config, "_class_name": next((name for name in bases if name in CLASSES), bases[0])}


def network_of(pipe: Any) -> Any:
    """The denoising network of a pipeline; a TypeError if it has none, or uses others beside it."""
    network = next((n for k in ("unet", "transformer") if (n := getattr(pipe, k, None)) is not None), None)
    name = type(pipe).__name__
    if network is None:
        raise TypeError(f"pipe must be a pipeline with a unet or a transformer; got {name}.")
    beside = [k for k in ("controlnet", "prior", "unet_2", "transformer_2") if getattr(pipe, k, None) is not None]
    if beside:
        raise TypeError(f"{name} also uses {', '.join(beside)}. For all of it: fastsde.sample_pipeline(pipe, ..).")
    return network
