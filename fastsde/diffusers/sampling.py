"""`sample_pipeline`: the whole job of a pipeline, prompts to images, with our engine in the place of its loop."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastsde import api
from fastsde.checks import check_count, check_kind
from fastsde.control import Controller
from fastsde.diffusers.adapter import guided, image_size, latent_shape, unguided
from fastsde.diffusers.conditions import (
    Prompt,
    call_default,
    embedded_guidance,
    network_of,
    takes_text,
    text_cond,
)
from fastsde.diffusers.latents import autoencoder, decode_latents
from fastsde.diffusers.networks import clipped
from fastsde.job import EngineState
from fastsde.result import Interrupted, SampleResult, SamplingError
from fastsde.score.base import ScoreModel
from fastsde.score.guidance import NEGATIVE
from fastsde.solvers import Solver

_OUTPUTS = ("pil", "np", "pt", "latent")


@dataclasses.dataclass(frozen=True)
class PipelineResult:
    """Images and what each of them cost.

    Attributes:
        images: in the order of the prompts: a list of PIL images ("pil", None for a sample that failed), an array with
            shape (n, H, W, C) in [0, 1] ("np"), a tensor with shape (n, C, H, W) in [0, 1] ("pt"), or the state itself
            ("latent").
        result: the `SampleResult`: states, calls, steps, status of each.
    """

    images: Any
    result: SampleResult


def sample_pipeline(
    pipe: Any,
    prompt: Prompt | None = None,
    *,
    negative_prompt: Prompt | None = None,
    class_labels: int | Sequence[int] | Tensor | None = None,
    n: int | None = None,
    num_images_per_prompt: int = 1,
    height: int | None = None,
    width: int | None = None,
    guidance_scale: float | Sequence[float] | None = None,
    guidance_rescale: float = 0.0,
    guidance_interval: tuple[float, float] | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    nfe: int | None = None,
    solver: Solver | None = None,
    controller: Controller | None = None,
    generator: int | torch.Generator | Sequence[torch.Generator] | None = None,
    index: Sequence[int] | Tensor | None = None,
    latents: Tensor | None = None,
    batch_size: int | None = None,
    decode_batch_size: int = 8,
    output_type: str = "pil",
    dtype: torch.dtype = torch.float32,
    wrap: Callable[[ScoreModel], ScoreModel] | None = None,
    progress: bool = True,
    callback: Callable[[EngineState], None] | None = None,
    allow_distilled: bool = False,
    **encode: Any,
) -> PipelineResult:
    r"""Draws images with a diffusers pipeline: its text encoders, network and autoencoder, our solvers.

        r = fastsde.sample_pipeline(pipe, prompt="a lighthouse in fog", rtol=0.05, generator=0)
        r.images, r.result.nfe

    Prompts and labels travel with their sample: each takes the steps it needs, and those that are done leave the batch.

    Args:
        pipe: a text-to-image pipeline (Stable Diffusion, SDXL, SD3, Flux, PixArt), a class-conditional (DiT) or an
            unconditional one.
        prompt: one, or a list.
        negative_prompt: one for all, or as many as prompts; by default what the pipeline takes then, the empty prompt
            or, for SDXL, zeros. Of no use without guidance.
        class_labels: one, or a list of classes.
        n: number of images, where neither prompts nor labels say; they are repeated to it if there is one of them.
        num_images_per_prompt: images for each prompt or label, one after the other.
        height: of the images, in pixels; the pipeline's own by default.
        width: likewise.
        guidance_scale: classifier-free guidance, two calls for one if above 1, of any image; up to 1 is none. The
            pipeline's default; one, or one for each image. For Flux the scale its network embeds, at one call.
        guidance_rescale: as `rescale` of `ClassifierFreeGuidance`.
        guidance_interval: as `interval` of `ClassifierFreeGuidance`.
        rtol: as for `sample`, like atol, nfe, solver, controller, index, batch_size, dtype, progress and callback. NFE
            counts both halves of guidance.
        generator: a seed; a `torch.Generator`, which is asked for one, torch's own by default (`.result.seed` says
            which came); or a list of generators, one for each image, which then depends on its own alone.
        latents: start states with shape (n, C, h, w), of variance 1, rather than draws.
        decode_batch_size: latents decoded at a time.
        output_type: "pil", "np", "pt" or "latent".
        wrap: makes another score model of the one used, for inverse problems: `lambda m: MMPS(m, Mask(mask), 0.05, y)`.
        allow_distilled: do not refuse checkpoints that look distilled.
        encode: arguments of the pipeline's own `encode_prompt`: `prompt_2`, `clip_skip`, `prompt_embeds`, ..

    Returns:
        A `PipelineResult`. Images of samples that failed are None or NaN; `.result.status` says how each one ended.

    Raises:
        ValueError, TypeError: before the first network call, naming the argument, what came and what is allowed.
        SamplingError: if the network or the autoencoder fails after samples were finished; they are in `.result`.
        Interrupted: at Ctrl-C; a `PipelineResult` with what is finished is in `.result`.
    """
    if output_type not in _OUTPUTS:
        raise ValueError(f"output_type must be one of {', '.join(_OUTPUTS)}; got {output_type!r}.")
    check_count("decode_batch_size", decode_batch_size, 1)
    check_kind("latents", latents, Tensor, "a tensor")
    check_kind("index", index, (Sequence, Tensor, np.ndarray), "a list of sample numbers")
    check_kind("wrap", wrap, Callable, "a function from score model to score model")
    shape = latent_shape(pipe, height, width)
    if output_type == "pil" and autoencoder(pipe) is None and shape[0] not in (1, 3):
        raise ValueError(f"{shape[0]} channels without an autoencoder make no picture; use output_type='latent'.")
    if "image" in inspect.signature(pipe.__call__).parameters:
        raise TypeError(
            f"{type(pipe).__name__} starts from an image, which sample_pipeline does not; take the text-to-image "
            "pipeline of the same parts, or its own loop with FastSDEScheduler."
        )
    job = _Request(pipe, prompt, negative_prompt, class_labels, n, num_images_per_prompt, index, latents, encode)
    scales = _scales(pipe, guidance_scale, job.n)
    embedded, doubled = embedded_guidance(pipe), bool((scales > 1).any())
    network = unguided(pipe, event_shape=shape, allow_distilled=allow_distilled)
    model = guided(network, 1.0 if embedded else float(scales.max()), guidance_rescale, guidance_interval)
    if autoencoder(pipe) is None:
        model = clipped(model, network.reading)
    cond = job.cond(shape, guided=doubled and not embedded)
    if doubled or embedded:
        cond["guidance" if embedded else "guidance_scale"] = scales
    seed, numbers = _streams(generator, index, job.n)
    try:
        result = api.sample(
            model if wrap is None else _wrapped(wrap, model),
            rtol=rtol,
            atol=atol,
            nfe=nfe,
            solver=solver,
            controller=controller,
            shape=(job.n, *shape),
            seed=seed,
            index=numbers,
            batch_size=batch_size,
            cond=cond,
            x_init=None if latents is None else latents.to(model.device, dtype) * network.reading.start_std,
            dtype=dtype,
            device=model.device,
            progress=progress,
            callback=callback,
        )
        images = _decoded(pipe, result, output_type, model.data_range, decode_batch_size)
    except Interrupted as stopped:
        images = _decoded(pipe, stopped.result, output_type, model.data_range, decode_batch_size)
        raise Interrupted(PipelineResult(images, stopped.result)) from None
    finally:
        if hasattr(pipe, "maybe_free_model_hooks"):
            pipe.maybe_free_model_hooks()
    return PipelineResult(images, result)


def _decoded(
    pipe: Any, result: SampleResult, output_type: str, data_range: tuple[float, float], batch_size: int
) -> Any:
    """The images; if they cannot be made, the samples are not lost."""
    try:
        return finish(pipe, result.samples, output_type, data_range, batch_size)
    except Exception as error:
        raise SamplingError(
            f"decoding failed ({type(error).__name__}: {error}); the {len(result.nfe)} samples are in .result of this "
            "exception, for fastsde.diffusers.decode_latents.",
            result,
        ) from error


class _Request:
    """What is to be drawn: n prompts or labels, in order."""

    def __init__(
        self,
        pipe: Any,
        prompt: Prompt | None,
        negative: Prompt | None,
        labels: int | Sequence[int] | Tensor | None,
        n: int | None,
        each: int,
        index: Sequence[int] | Tensor | None,
        latents: Tensor | None,
        encode: dict[str, Any],
    ) -> None:
        self.pipe, self.encode = pipe, encode
        each = check_count("num_images_per_prompt", each, 1)
        text = takes_text(pipe)
        embeds = encode.get("prompt_embeds")
        if (prompt is not None or negative is not None or encode) and not text:
            raise TypeError(f"{type(pipe).__name__} takes no prompts ({', '.join(['prompt', *encode])}).")
        if labels is not None and (text or "class_labels" not in _names(pipe)):
            raise TypeError(f"{type(pipe).__name__} takes no class_labels.")
        if prompt is not None and embeds is not None:
            raise ValueError("give either prompt or prompt_embeds, not both.")
        if text and prompt is None and embeds is None:
            raise ValueError("prompt must be a string or a list of strings, or give prompt_embeds=; got None.")
        prompts = _strings("prompt", prompt)
        rows = len(prompts) if prompts else len(embeds) if embeds is not None else None
        if labels is not None:
            labels = _labels(labels)
            rows = len(labels)
        if rows is None:
            rows = (
                next((len(k) for k in (index, latents) if k is not None and len(k)), 1)
                if n is None
                else check_count("n", n, 1)
            )
        elif n is not None and rows == each == 1:
            each = check_count("n", n, 1)
        elif rows == each == 1:
            each = next((len(k) for k in (index, latents) if k is not None and len(k)), 1)
        elif n is not None and n != rows * each:
            raise ValueError(f"n must be left out or be prompts times images of each, {rows * each}; got {n}.")
        for name, given in (("index", index), ("latents", latents)):
            if given is not None and len(given) != rows * each:
                raise ValueError(f"{name} must have one entry for each of {rows * each} images; got {len(given)}.")
        negatives = _strings("negative_prompt", negative)
        if negatives is not None and len(negatives) not in (1, rows):
            raise ValueError(f"negative_prompt must be one or {rows}, one for each prompt; got {len(negatives)}.")
        self.rows, self.each, self.n = rows, each, rows * each
        self.prompts, self.labels = prompts, labels
        if negatives is None and isinstance(own := call_default(pipe, "negative_prompt"), str):
            negatives = [own]
        self.negatives = None if negatives is None else negatives * (rows if len(negatives) == 1 else 1)

    def cond(self, shape: tuple[int, int, int], *, guided: bool) -> dict[str, Tensor]:
        """The conditioning, each tensor with leading axis n."""
        cond: dict[str, Tensor] = {}
        if self.labels is not None:
            cond = {"class_labels": self.labels}
        elif takes_text(self.pipe):
            size, negatives = image_size(self.pipe, shape), self.negatives if guided else None
            cond = text_cond(self.pipe, self.prompts, negatives, size, guided=guided, **self.encode)
            if guided and not any(key.startswith(NEGATIVE) for key in cond):
                raise ValueError("guidance needs negative_prompt_embeds= beside prompt_embeds=, or prompts.")
        return {key: value.repeat_interleave(self.each, 0) for key, value in cond.items()}


def _labels(given: int | Sequence[int] | Tensor) -> Tensor:
    """The labels as a vector."""
    try:
        labels = torch.as_tensor(given).reshape(-1)
    except (TypeError, ValueError, RuntimeError):
        labels = torch.empty(0)
    if len(labels) == 0 or labels.is_floating_point():
        raise ValueError(f"class_labels must be an integer or a list of them; got {given!r}.")
    return labels


def _wrapped(wrap: Callable[[ScoreModel], ScoreModel], model: ScoreModel) -> ScoreModel:
    wrapped = wrap(model)
    if not isinstance(wrapped, ScoreModel):
        raise TypeError(f"wrap must return a score model; it returned {type(wrapped).__name__}.")
    return wrapped


def _names(pipe: Any) -> set[str]:
    return set(inspect.signature(network_of(pipe).forward).parameters)


def _strings(name: str, value: Prompt | None) -> list[str] | None:
    if value is None:
        return None
    values = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else []
    if not values or not all(isinstance(v, str) for v in values):
        raise TypeError(f"{name} must be a string or a list of strings; got {value!r}.")
    return values


def _scales(pipe: Any, given: float | Sequence[float] | None, n: int) -> Tensor:
    """The guidance scale of each image, with shape (n,)."""
    default = call_default(pipe, "guidance_scale")
    if given is None:
        given = 1.0 if default is None else default
    try:
        scales = torch.as_tensor(given, dtype=torch.float32)
    except (TypeError, ValueError):
        scales = torch.empty(0)
    if scales.ndim == 0:
        scales = scales.expand(n)
    if scales.shape != (n,) or not torch.isfinite(scales).all() or (scales < 0).any():
        raise ValueError(
            f"guidance_scale must be one finite number, not negative, or one for each of {n} images; got {given!r}."
        )
    # Up to 1 means no guidance, for a sample beside guided ones as for one alone.
    return scales if embedded_guidance(pipe) else scales.clamp(min=1.0)


def _streams(
    generator: int | torch.Generator | Sequence[torch.Generator] | None,
    index: Sequence[int] | Tensor | None,
    n: int,
) -> tuple[int, Sequence[int] | Tensor | None]:
    """The seed and the sample numbers that generators stand for."""
    if isinstance(generator, (int, np.integer)) and not isinstance(generator, bool):
        return int(generator), index
    if generator is None or isinstance(generator, torch.Generator):
        device = "cpu" if generator is None else generator.device
        return int(torch.randint(1 << 62, (1,), generator=generator, device=device)), index
    if not isinstance(generator, Sequence) or not all(isinstance(g, torch.Generator) for g in generator):
        raise TypeError(f"generator must be a seed, a torch.Generator or a list of them; got {generator!r}.")
    if len(generator) != n or index is not None:
        raise ValueError(f"generator must be one, or {n}, one for each image, and then index= is left out.")
    return 0, [int(torch.randint(1 << 32, (1,), generator=g, device=g.device)) for g in generator]


def finish(pipe: Any, x: Tensor, output_type: str, data_range: tuple[float, float], batch_size: int = 8) -> Any:
    """Images from final states, decoded if the pipeline has an autoencoder; see `PipelineResult.images`."""
    if output_type == "latent":
        return x
    whole = torch.isfinite(x.flatten(1)).all(1)
    low, high = data_range
    vae = autoencoder(pipe)
    if vae is not None and whole.any():
        decoded, low, high = decode_latents(vae, x[whole], batch_size=batch_size), -1.0, 1.0
    else:
        decoded = x[whole].float().cpu()
    images = torch.full((len(x), *decoded.shape[1:]), torch.nan, dtype=torch.float32)
    images[whole.cpu()] = ((decoded - low) / (high - low)).clamp(0, 1)
    if output_type == "pt":
        return images
    array = images.permute(0, 2, 3, 1).numpy()
    if output_type == "np":
        return array
    pictures = (array.clip(0, 1) * 255).round()
    return [
        Image.fromarray(p.astype(np.uint8).squeeze(-1) if p.shape[-1] == 1 else p.astype(np.uint8)) if ok else None
        for p, ok in zip(pictures, whole.tolist(), strict=True)
    ]
