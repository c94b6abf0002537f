"""What a pipeline makes of prompts and labels, as conditioning of its network: one small function for each family."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsde.diffusers.networks import config_of, takes_resolution
from fastsde.score.guidance import NEGATIVE

Prompt = str | Sequence[str]


def network_of(pipe: Any) -> Any:
    """The denoising network of a pipeline.

    Raises:
        TypeError: if it has none, or uses others beside it.
    """
    network = next((n for k in ("unet", "transformer") if (n := getattr(pipe, k, None)) is not None), None)
    if network is None:
        raise TypeError(f"pipe must be a pipeline with a unet or a transformer; got {type(pipe).__name__}.")
    beside = [k for k in ("controlnet", "prior", "unet_2", "transformer_2") if getattr(pipe, k, None) is not None]
    if beside:
        raise TypeError(f"{type(pipe).__name__} also uses {', '.join(beside)}, which fastsde does not call.")
    return network


def call_default(pipe: Any, name: str) -> Any:
    """The default of an argument of the pipeline's own call; None if it has no such argument."""
    parameter = inspect.signature(type(pipe).__call__).parameters.get(name)
    return None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default


def takes_text(pipe: Any) -> bool:
    """Whether the pipeline is prompted by text."""
    return hasattr(pipe, "encode_prompt")


def embedded_guidance(pipe: Any) -> bool:
    """Whether the network takes the guidance scale as an input, and one call does."""
    return bool(config_of(network_of(pipe)).get("guidance_embeds"))


def text_cond(
    pipe: Any,
    prompts: Sequence[str] | None,
    negative: Sequence[str] | None,
    size: tuple[int, int],
    *,
    guided: bool = False,
    **encode: Any,
) -> dict[str, Tensor]:
    """Conditioning of a text-to-image network, each tensor with leading axis n.

    Args:
        pipe: the pipeline, whose own `encode_prompt` does the work.
        prompts: n prompts; None where `encode` has embeddings.
        negative: n negative prompts, for guidance; None for what the pipeline takes where none is given: the empty
            prompt, or zeros (SDXL).
        guided: whether the negative half is wanted.
        size: (height, width) of the images in pixels.
        encode: further arguments of `encode_prompt`, such as `clip_skip`, `prompt_2` or `prompt_embeds`.

    Raises:
        TypeError: for arguments that `encode_prompt` does not have, or a family we do not know.
    """
    takes = inspect.signature(pipe.encode_prompt).parameters
    unknown = [key for key in encode if key not in takes]
    if unknown:
        raise TypeError(f"{type(pipe).__name__} takes no {', '.join(unknown)}; its prompts take {', '.join(takes)}.")
    arguments = {
        "prompt": None if prompts is None else list(prompts),
        "prompt_2": None,
        "prompt_3": None,
        "device": pipe._execution_device,
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": guided,
        "negative_prompt": None if negative is None else list(negative),
        **encode,
    }
    with torch.no_grad():
        encoded = pipe.encode_prompt(**{key: value for key, value in arguments.items() if key in takes})
        cond = _family(pipe)(pipe, encoded, size)
    return {key: value for key, value in cond.items() if value is not None}


def _family(pipe: Any) -> Callable[[Any, tuple[Any, ...], tuple[int, int]], dict[str, Tensor | None]]:
    """Told by the network's arguments, so that variants of a pipeline work too."""
    network = network_of(pipe)
    names = inspect.signature(network.forward).parameters
    if "img_ids" in names:
        return _flux
    if "pooled_projections" in names:
        return _sd3
    if config_of(network).get("addition_embed_type") == "text_time":
        return _sdxl
    if "encoder_attention_mask" in names and config_of(network).get("norm_type") == "ada_norm_single":
        return _pixart
    if "encoder_hidden_states" in names and "sample" in names and not config_of(network).get("addition_embed_type"):
        return _sd
    raise TypeError(
        f"fastsde does not know how {type(pipe).__name__} conditions its network; give from_diffusers the network and "
        "the scheduler, and the conditioning to sample(cond=...)."
    )


def _sd(pipe: Any, encoded: tuple[Any, ...], size: tuple[int, int]) -> dict[str, Tensor | None]:
    prompt, negative = encoded
    return {"encoder_hidden_states": prompt, NEGATIVE + "encoder_hidden_states": negative}


def _sdxl(pipe: Any, encoded: tuple[Any, ...], size: tuple[int, int]) -> dict[str, Tensor | None]:
    prompt, negative, pooled, negative_pooled = encoded
    second = pipe.text_encoder_2
    width = pooled.shape[-1] if second is None else second.config.projection_dim
    # Original size, crop corner and target size, as if the training image had been as large as this one.
    ids = pipe._get_add_time_ids(size, (0, 0), size, dtype=prompt.dtype, text_encoder_projection_dim=int(width))
    return {
        "encoder_hidden_states": prompt,
        "text_embeds": pooled,
        "time_ids": ids.to(prompt.device).expand(len(prompt), -1),
        NEGATIVE + "encoder_hidden_states": negative,
        NEGATIVE + "text_embeds": negative_pooled,
    }


def _sd3(pipe: Any, encoded: tuple[Any, ...], size: tuple[int, int]) -> dict[str, Tensor | None]:
    prompt, negative, pooled, negative_pooled = encoded
    return {
        "encoder_hidden_states": prompt,
        "pooled_projections": pooled,
        NEGATIVE + "encoder_hidden_states": negative,
        NEGATIVE + "pooled_projections": negative_pooled,
    }


def _flux(pipe: Any, encoded: tuple[Any, ...], size: tuple[int, int]) -> dict[str, Tensor | None]:
    prompt, pooled, _ = encoded
    return {"encoder_hidden_states": prompt, "pooled_projections": pooled}


def _pixart(pipe: Any, encoded: tuple[Any, ...], size: tuple[int, int]) -> dict[str, Tensor | None]:
    prompt, mask, negative, negative_mask = encoded
    cond: dict[str, Tensor | None] = {
        "encoder_hidden_states": prompt,
        "encoder_attention_mask": mask,
        NEGATIVE + "encoder_hidden_states": negative,
        NEGATIVE + "encoder_attention_mask": negative_mask,
    }
    if takes_resolution(config_of(network_of(pipe))):
        shape = torch.tensor([size], dtype=prompt.dtype, device=prompt.device).expand(len(prompt), -1)
        cond |= {"resolution": shape, "aspect_ratio": shape[:, :1] / shape[:, 1:]}
    return cond
