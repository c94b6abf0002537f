"""diffusers' networks as score models: one adapter for every family, which reads signature and configuration."""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastsde.batching import expand_like
from fastsde.checks import check_labels
from fastsde.diffusers.joining import cache_hooks
from fastsde.diffusers.schedules import Config, Reading
from fastsde.score.base import ScoreModel
from fastsde.score.network import tensor_of, unwrap
from fastsde.types import Cond, State, Time

_ADDED = ("text_embeds", "time_ids", "image_embeds", "resolution", "aspect_ratio")
"""Conditioning that travels to the network inside `added_cond_kwargs`."""
_ALWAYS = ("encoder_hidden_states", "pooled_projections")
"""Arguments that text networks need even where their signature gives them a default of None."""
_DISTILLED = re.compile(r"turbo|lightning|(?<![a-z])lcm|schnell|hyper-?sd|(?<![a-z])dmd|distill", re.IGNORECASE)
_KNOWN = ("UNet1DModel", "UNet2DModel", "UNet2DConditionModel", "UNet3DConditionModel", "DiTTransformer2DModel",
          "PixArtTransformer2DModel", "SD3Transformer2DModel")  # fmt: skip
"""Networks of diffusers that take the scheduler's timestep and predict what the scheduler says."""
LATENT_RANGE = (-2.0, 2.0)
"""Two standard deviations of scaled latents, whose variance is about 1; images in [-1, 1] have about 0.5."""


class DiffusersModel(ScoreModel):
    r"""A diffusers network, or any callable with such a signature, read under a scheduler's configuration.

    The network is called as `network(x, timestep, **cond)`, with x first, the rest by name and the time, a float32
    vector with shape (B,), never rounded to a level. Conditioning has the network's own names: `class_labels`,
    `encoder_hidden_states`, `encoder_attention_mask`, `pooled_projections`; `text_embeds` and `time_ids` (SDXL),
    `resolution` and `aspect_ratio` (PixArt) go into its `added_cond_kwargs`. A learned variance, the second half of
    twice the channels, is dropped. With EDM's preconditioning, F the network and s = sigma_data,

        x_0 = c_skip x + c_out F(c_in x, log(sigma) / 4),    c_skip = s^2 / (sigma^2 + s^2),
        c_in = (sigma^2 + s^2)^(-1/2),    c_out = c_in sigma s, or its negative for v

    (Karras et al., https://arxiv.org/abs/2206.00364, table 1).

    Args:
        network: the network.
        reading: its process, time and prediction, from `read_schedule`.
        event_shape: (C, H, W); from the network's configuration by default, where it says.
        data_range, default_cond: as for `ScoreModel`.
        allow_distilled: do not refuse checkpoints that look distilled.

    Raises:
        ValueError: for networks and pairs of network and schedule that cannot work, with the reason.
    """

    def __init__(
        self,
        network: Callable[..., Any],
        reading: Reading,
        *,
        event_shape: tuple[int, ...] | None = None,
        data_range: tuple[float, float] | None = None,
        default_cond: dict[str, Tensor] | None = None,
        allow_distilled: bool = False,
    ) -> None:
        self.config = config = config_of(network)
        self.arguments = _arguments(network)
        # Networks of that name for text or for one dimension have no logarithm of the time and do not divide by it.
        other = "encoder_hidden_states" in self.arguments or "UNet1DModel" in _class_names(network)
        fourier = config.get("time_embedding_type") == "fourier" and not other
        _check_pair(network, config, reading, self.arguments, fourier=fourier)
        if not allow_distilled:
            check_distilled(config, reading)
        # DiT's last label is "none".
        dit = _is_dit(config, self.arguments)
        none = {"class_labels": torch.tensor(config["num_embeds_ada_norm"])} if dit else None
        super().__init__(
            network,
            reading.sde,
            reading.prediction if reading.sigma_data is None else "sample",
            event_shape=event_shape or _event_shape(network, config),
            data_range=data_range or ((0.0, 1.0) if fourier or config.get("center_input_sample") else (-1.0, 1.0)),
            timestep=reading.timestep,
            default_cond=default_cond or none,
        )
        self.reading, self.preconditioned = reading, reading.sigma_data is not None
        self.required = _required(config, self.arguments)
        self.classes = _classes(config, self.arguments)
        self.labels = (self.classes or 0) - dit
        self._dtype: torch.dtype | None = None

    @property
    def device(self) -> torch.device:
        return offloaded_to(self.network) or super().device

    @property
    def compute_dtype(self) -> torch.dtype | None:
        return self._dtype or _cast_to(self.network) or super().compute_dtype

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        if cache_hooks(self.network):
            raise ValueError(
                "the network has a cache of diffusers (enable_cache), which remembers a sample. Take it "
                "off with network.disable_cache(), or sample its pipeline: fastsde.sample_pipeline(pipe, ..)."
            )
        # Modules are looked at once and not at every call.
        before, self._dtype = self._dtype, self.compute_dtype
        try:
            with super().sampling():
                yield
        finally:
            self._dtype = before

    def check_cond(self, cond: Cond) -> None:
        missing = [key for key in self.required if key not in cond]
        if missing:
            texts = "encoder_hidden_states" in missing
            hint = " With prompts: fastsde.sample_pipeline(pipe, prompt, ..)." if texts else ""
            raise ValueError(f"the network needs {', '.join(missing)} in cond; got {sorted(cond) or 'nothing'}.{hint}")
        known = self.arguments.keys() | (set(_ADDED) if "added_cond_kwargs" in self.arguments else set())
        unknown = [key for key in cond if key not in known]
        if unknown and not any(p.kind is p.VAR_KEYWORD for p in self.arguments.values()):
            raise ValueError(f"the network takes no {', '.join(unknown)}; it takes {', '.join(sorted(known))}.")
        self._check_embeddings(cond)
        labels = cond.get("class_labels")
        if labels is None or not self.config:
            return
        if self.classes is None and self.config.get("class_embed_type") is None:
            raise ValueError("the network was trained without classes and would ignore class_labels.")
        if self.classes is not None:
            check_labels(labels, self.classes)

    def _check_embeddings(self, cond: Cond) -> None:
        """Refuses text embeddings and SDXL's numbers of another width than the network's."""
        shapes: dict[str, tuple[int | str, ...]] = {}
        keys = ("joint_attention_dim", "caption_channels", "encoder_hid_dim", "cross_attention_dim")
        width = next((self.config[key] for key in keys if self.config.get(key) is not None), None)
        if isinstance(width, int):
            shapes["encoder_hidden_states"] = ("tokens", width)
        if (pooled := self.config.get("pooled_projection_dim")) is not None:
            shapes["pooled_projections"] = (int(pooled),)
        for key, shape in shapes.items():
            value = cond.get(key)
            if value is None:
                continue
            fits = value.ndim == 1 + len(shape) and value.shape[-1] == shape[-1]
            if not fits or not value.is_floating_point():
                wanted = ", ".join(map(str, shape))
                raise ValueError(
                    f"{key} must be floating point with shape (n, {wanted}); got {tuple(value.shape)} of {value.dtype}."
                )
        if self.config.get("addition_embed_type") == "text_time":
            numbers, pooled = (cond[k].reshape(len(cond[k]), -1).shape[1] for k in ("time_ids", "text_embeds"))
            each, total = (self.config[k] for k in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"))
            if pooled + numbers * each != total:
                raise ValueError(
                    f"the network adds embeddings of {total} numbers: the width of text_embeds and {each} for each of "
                    f"time_ids; got {pooled} and {numbers} x {each}."
                )

    def call(self, x: State, time: Tensor, cond: Cond) -> object:
        given: dict[str, Any] = {}
        added: dict[str, Tensor] = {}
        for key, value in cond.items():
            inside = key in _ADDED and "added_cond_kwargs" in self.arguments
            # Embeddings in the network's dtype; numbers per row, such as Flux's guidance, keep their digits.
            cast = value.is_floating_point() and value.ndim > 1
            (added if inside else given)[key] = value.to(x.dtype) if cast else value
        if added:
            given["added_cond_kwargs"] = added
        by_name = "timestep" in self.arguments
        out = tensor_of(self.network(x, **given, timestep=time) if by_name else self.network(x, time, **given))
        if isinstance(out, Tensor) and out.ndim > 1 and out.shape[1] == 2 * x.shape[1]:
            return out[:, : x.shape[1]]  # the other half is a learned variance
        return out

    def output(self, x_t: State, t: Time, cond: Cond | None = None) -> State:
        if not self.preconditioned:
            return super().output(x_t, t, cond)
        out = super().output(expand_like(self.reading.c_in(t), x_t) * x_t, t, cond)
        return self.reading.read(out, x_t, self.sde.level(t)).out


def config_of(thing: object) -> Config:
    """The configuration of a diffusers object, with its class name, or nothing for other callables."""
    thing = unwrap(thing)
    config = getattr(thing, "config", None)
    return {"_class_name": type(thing).__name__, **config} if isinstance(config, Mapping) else {}


def _class_names(network: object) -> list[str]:
    """Names of the network's class and its bases, inside of wrappers."""
    return [kind.__name__ for kind in type(unwrap(network)).__mro__]


def check_known(network: object) -> None:
    """Refuses, with a ValueError, a network of diffusers whose time and sign are not known."""
    # Nothing if diffusers was not imported, and then no network is of it.
    exported = dir(sys.modules["diffusers"]) if "diffusers" in sys.modules else []
    names = _class_names(network)
    theirs = [name for name in names if name in exported and not name.endswith("Mixin")]
    if not theirs and isinstance(network, nn.Module):  # somebody's module around one of theirs
        inner = {type(part).__name__ for part in network.modules()}
        names = theirs = sorted(name for name in inner if name in exported and name.endswith("Model"))
    if theirs and not any(name in _KNOWN for name in names):
        raise ValueError(
            f"fastsde does not know how {theirs[0]} is called: its time may be t, t / 1000 or 1 - t / 1000, and its "
            "output noise minus data or the reverse. Its pipeline knows: fastsde.sample_pipeline(pipe, ..), or where "
            "another program runs it, pipe.scheduler = fastsde.diffusers.FastSDEScheduler.from_config(..). Or say how "
            "it is called, with fastsde.ScoreModel(lambda x, t, **cond: ..., sde, prediction, timestep=...), and check "
            "that with fastsde.diagnose."
        )


def offloaded_to(module: object) -> torch.device | None:
    """Where the hooks of accelerate or diffusers let a module compute: with offloading not where its weights are."""
    for part in module.modules() if isinstance(module, nn.Module) else []:
        own = vars(part)  # many times faster than asking for an attribute
        hook, registry = own.get("_hf_hook"), own.get("_diffusers_hook")
        for one in getattr(hook, "hooks", [hook]):
            if getattr(one, "execution_device", None) is not None:
                return torch.device(one.execution_device)
        group = None if registry is None else registry.get_hook("group_offloading")
        if group is not None:
            return torch.device(group.config.onload_device)
    return None


def _cast_to(network: object) -> torch.dtype | None:
    """The dtype that weights kept in fewer bits are used in (diffusers' `enable_layerwise_casting`)."""
    parts = network.modules() if isinstance(network, nn.Module) else ()
    registries = (vars(part).get("_diffusers_hook") for part in parts)
    hooks = (registry.get_hook("layerwise_casting") for registry in registries if registry is not None)
    return next((hook.compute_dtype for hook in hooks if hook is not None), None)


def _arguments(network: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The arguments of the network after its first, x."""
    inside = unwrap(network)
    function = inside.forward if isinstance(inside, nn.Module) else inside
    parameters = list(inspect.signature(function).parameters.values())
    rest = {p.name: p for p in parameters[1:]}
    if "timestep" not in rest:  # a time by another name, given by position
        places = [p for p in parameters if p.kind in _BY_POSITION]
        if len(places) < 2 and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
            takes = ", ".join(map(str, parameters))
            raise ValueError(f"the network must take x and a time, network(x, timestep, ...); it takes ({takes}).")
        if len(places) > 1:
            rest.pop(places[1].name)
    return rest


_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _required(config: Config, arguments: Mapping[str, inspect.Parameter]) -> list[str]:
    """Names without which the network cannot be called."""
    named = [p for p in arguments.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = [p.name for p in named if p.default is p.empty and p.name != "timestep"]
    required += [name for name in _ALWAYS if name in arguments and name not in required and config]
    if "class_labels" in arguments and _classes(config, arguments) is not None:
        required.append("class_labels")
    if config.get("addition_embed_type") == "text_time":
        required += ["text_embeds", "time_ids"]
    said = config.get("use_additional_conditions")
    if said is None:  # then a PixArt transformer's size says whether it is told the resolution
        said = config.get("norm_type") == "ada_norm_single" and config["sample_size"] == 128
    return required + (["resolution", "aspect_ratio"] if said else [])


def _classes(config: Config, arguments: Mapping[str, inspect.Parameter]) -> int | None:
    """How many labels there are, the "no label" one of DiT included; None where labels are something else."""
    if config.get("num_class_embeds") and config.get("class_embed_type") is None:
        return int(config["num_class_embeds"])
    if _is_dit(config, arguments):
        return int(config["num_embeds_ada_norm"]) + 1
    return None


def _is_dit(config: Config, arguments: Mapping[str, inspect.Parameter]) -> bool:
    return "class_labels" in arguments and config.get("norm_type") == "ada_norm_zero"


def _event_shape(network: object, config: Config) -> tuple[int, ...] | None:
    """What the configuration says; of video, nothing of the number of frames."""
    size, channels = config.get("sample_size"), config.get("in_channels")
    names = _class_names(network)
    if size is None or channels is None or "UNet3DConditionModel" in names:
        return None
    if "UNet1DModel" in names:
        return (int(channels), int(size))
    height, width = (size, size) if isinstance(size, int) else size
    return (int(channels), int(height), int(width))


def _check_pair(
    network: object, config: Config, reading: Reading, arguments: Mapping[str, inspect.Parameter], *, fourier: bool
) -> None:
    """Refuses networks, and pairs of network and schedule, that cannot work."""
    name, flow = type(unwrap(network)).__name__, reading.prediction == "flow_prediction"
    c_in, c_out = config.get("in_channels"), config.get("out_channels")
    if c_in is not None and c_out is not None and c_out not in (c_in, 2 * c_in):
        raise ValueError(
            f"{name} takes {c_in} channels and returns {c_out}: it wants an image beside the state (inpainting, "
            "editing, upscaling), which is not given here. Use the model without it; fastsde.score has inpainting."
        )
    if (reading.prediction == "score") != fourier and config:
        raise ValueError(
            f"{name} has time_embedding_type={config.get('time_embedding_type')!r} and the schedule is {reading.sde}: "
            "networks whose time is sigma ('fourier') and variance exploding schedules belong together."
        )
    if config.get("encoder_hid_dim_type") == "ip_image_proj":
        raise ValueError(
            f"{name} has an IP adapter, whose pictures are no rows of a tensor. Its pipeline takes them: "
            "fastsde.sample_pipeline(pipe, .., ip_adapter_image=..)."
        )
    if config.get("time_embedding_type") == "learned":
        raise ValueError(f"{name} knows integer timesteps only (time_embedding_type='learned'), not the times between.")
    if "pooled_projections" in arguments and not flow:
        raise ValueError(f"{name} is a flow-matching network, but the schedule predicts {reading.prediction!r}.")


def check_distilled(config: Config, reading: Reading) -> None:
    """Refuses, with a ValueError, checkpoints that look distilled for a few steps."""
    path = str(config.get("_name_or_path", ""))
    # Of a local path, the last parts: a folder further up may be called anything.
    tail = "/".join(path.replace("\\", "/").split("/")[-3:])
    reason = None
    if _DISTILLED.search(tail):
        reason = f"its name is {tail!r}"
    elif config.get("time_cond_proj_dim") is not None:
        reason = "it embeds a guidance scale into its time (time_cond_proj_dim), as LCMs do"
    elif config.get("_class_name") == "FluxTransformer2DModel" and not config["guidance_embeds"] and reading.unshifted:
        reason = "a Flux transformer without guidance_embeds under a schedule without shift is FLUX.1-schnell"
    if reason is not None:
        raise ValueError(
            f"this checkpoint looks distilled for a few steps ({reason}); its output is no score, and no SDE or ODE "
            "leads through it. If it is not, give allow_distilled=True."
        )
