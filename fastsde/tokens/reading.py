"""Token models of other libraries: what their configurations and signatures say of how to read them.

Nothing is imported here: a network is told by what it has.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastsde.tokens.model import TokenModel
from fastsde.tokens.process import LINEAR, SINE, Masking
from fastsde.types import Tokens

_KNOWN: dict[str, dict[str, Any]] = {
    "llada": {"mask_id": 126336, "shift": False},
    "dream": {"shift": True},
    "mdlm": {"shift": False},
}
"""What is known of families that do not say it in their configurations, by `model_type` in small letters."""


class _ZeroTime(nn.Module):
    """MDLM's networks take a noise level, which is 0 for those that were trained without time."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tokens, **cond: Tensor) -> object:
        return self.model(ids, timesteps=torch.zeros(len(ids), device=ids.device), **cond)


def from_transformers(
    model: nn.Module,
    mask_id: int | None = None,
    *,
    shift: bool | None = None,
    event_shape: tuple[int, ...] | None = None,
    end_id: int | None = None,
    process: Masking | None = None,
    default_cond: Mapping[str, Tensor | float] | None = None,
) -> TokenModel:
    """A masked language model with the signature of transformers: LLaDA, Dream, MDLM, and those like BERT.

    The network is called as `model(ids, **cond)` and returns an object with logits of shape (B, L, V). An
    `attention_mask` for rows of different lengths goes into `cond`, with shape (n, L).

    Args:
        model: the network, with its `config`.
        mask_id: the id of the mask; by default what the configuration says (`mask_token_id`), or what is known of the
            family: 126336 of LLaDA, the last id of MDLM.
        shift: whether position l - 1 predicts position l. Known of LLaDA and MDLM (no) and Dream (yes); no for others.
        event_shape: (L,), if all samples have one length.
        end_id, process, default_cond: as for `TokenModel`.

    Raises:
        TypeError: if the model has no configuration with a vocabulary, or its first argument is not `input_ids`.
        ValueError: if nothing says which id the mask is.
    """
    config = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None)
    if not isinstance(model, nn.Module) or not isinstance(size, int):
        raise TypeError(f"model must be a network with config.vocab_size; got {type(model).__name__}.")
    names = list(inspect.signature(model.forward).parameters)
    if not names or names[0] != "input_ids":
        raise TypeError(
            f"model must be called as model(input_ids); the arguments of its forward are {', '.join(names)}."
        )
    kind = str(getattr(config, "model_type", "")).lower()
    known = next((facts for family, facts in _KNOWN.items() if family in kind), {})
    stated = getattr(config, "mask_token_id", None)
    if mask_id is None:
        mask_id = stated if stated is not None else known.get("mask_id", size - 1 if "mdlm" in kind else None)
    if mask_id is None:
        raise ValueError(f"mask_id is missing: nothing in the configuration of {type(model).__name__} says it.")
    # Tables are padded, so that networks have columns for ids that do not exist: rows of the embedding say how many.
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    rows = getattr(getattr(embedding, "weight", None), "shape", (size,))[0]
    return TokenModel(
        _ZeroTime(model) if "timesteps" in names else model,
        max(size, rows),
        mask_id,
        event_shape=event_shape,
        process=Masking(LINEAR) if process is None else process,
        shift=bool(known.get("shift", False)) if shift is None else shift,
        end_id=end_id,
        default_cond=default_cond,
    )


def from_amused(
    transformer: nn.Module,
    mask_id: int | None = None,
    *,
    event_shape: tuple[int, int] | None = None,
    default_cond: Mapping[str, Tensor | float] | None = None,
) -> TokenModel:
    """The transformer of diffusers' aMUSEd pipelines (`UVit2DModel`), with its schedule.

    `cond` has `encoder_hidden_states`, `pooled_text_emb` and `micro_conds`, as the pipeline gives them. Guidance is
    `TokenGuidance(model, 10.0)`, with the names of the other half after "negative_". Tokens become images by the
    pipeline's own `vqvae.decode`.

    Args:
        transformer: `pipeline.transformer`.
        mask_id: `pipeline.scheduler.config.mask_token_id`; by default the last id of the transformer.
        event_shape: (h, w) of the tokens.
        default_cond: as for `TokenModel`.

    Raises:
        TypeError: if it has another configuration.
    """
    config = getattr(transformer, "config", None)
    sizes = [getattr(config, name, None) for name in ("codebook_size", "vocab_size")]
    if not isinstance(transformer, nn.Module) or not all(isinstance(size, int) for size in sizes):
        raise TypeError(
            "transformer must be diffusers' UVit2DModel, with codebook_size and vocab_size in its configuration; got "
            f"{type(transformer).__name__}."
        )
    codes, ids = sizes
    return TokenModel(
        transformer,
        codes,  # type: ignore[arg-type] # it is an integer
        ids - 1 if mask_id is None else mask_id,  # type: ignore[operator]
        event_shape=event_shape,
        process=Masking(SINE),
        channels_first=True,
        default_cond=default_cond,
    )
