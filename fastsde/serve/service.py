"""What stands behind the HTTP endpoints: a sampler, and what of a model a request may ask for."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import inspect
import io
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

import fastsde
from fastsde.checks import check_choice, check_count, check_positive
from fastsde.job import EngineState
from fastsde.lane import Request
from fastsde.live import RequestQueue, Sampler
from fastsde.result import SampleResult
from fastsde.score import Mask, Projection
from fastsde.score.base import ScoreModel
from fastsde.solvers import SOLVERS, ExponentialPC
from fastsde.tokens import TokenModel
from fastsde.types import Cond

_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
_PIXELS = 1 << 24
"""Of an uploaded picture, at most; a small file may hold a huge one."""
_UNSAID = Field(exclude=True)
"""Of fields that are not in the record of a picture: they change nothing."""
Made = tuple[list[Image.Image | None], SampleResult]


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a server grants a request; more is refused.

    Args:
        n: samples.
        nfe: network calls of a sample.
        rtol: the smallest tolerance.
        body: bytes of the request's body.
        seconds: how long a request may take, waiting included.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    n: int = 16
    nfe: int = 250
    rtol: float = 0.005
    body: int = 8 << 20
    seconds: float = 300.0

    def __post_init__(self) -> None:
        for name in ("n", "nfe", "body"):
            check_count(name, getattr(self, name), 1)
        for name in ("rtol", "seconds"):
            check_positive(name, getattr(self, name))


class Generation(BaseModel):
    """What to draw. `rtol` or `nfe` says how many network calls a sample makes; neither: as the server was told."""

    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[str, Field(max_length=4000, description="A text; or the name or number of a class.")] = ""
    n: Annotated[int, Field(strict=True, ge=1, le=1 << 16, description="Number of images.")] = 1
    size: Annotated[str | None, Field(max_length=12, description="WIDTHxHEIGHT, or auto.")] = None
    seed: Annotated[
        int | None, Field(strict=True, ge=0, lt=1 << 63, description="Of the noise; by default a random one.")
    ] = None
    rtol: Annotated[float | None, Field(gt=0, le=10, description="Relative tolerance.")] = None
    nfe: Annotated[
        int | None, Field(strict=True, ge=1, le=1 << 20, description="Network calls that no sample exceeds.")
    ] = None
    solver: Annotated[str | None, Field(max_length=80, description="The name of a solver.")] = None
    eta: Annotated[float | None, Field(ge=0, le=10, description="Share of noise, of solvers that have it.")] = None
    guidance_scale: Annotated[float | None, Field(ge=0, le=100)] = None
    negative_prompt: Annotated[str | None, Field(max_length=4000)] = None
    image: Annotated[str | None, Field(description="A picture to edit, in base64.")] = None
    mask: Annotated[str | None, Field(description="White where the picture is drawn anew, in base64.")] = None
    strength: Annotated[float | None, Field(gt=0, le=1, description="How much of the picture goes.")] = None
    response_format: Annotated[Literal["b64_json"] | None, _UNSAID] = None
    model: Annotated[str | None, Field(max_length=400), _UNSAID] = None
    user: Annotated[str | None, Field(max_length=400, description="Not used, like the fields below."), _UNSAID] = None
    quality: Annotated[str | None, Field(max_length=40), _UNSAID] = None
    style: Annotated[str | None, Field(max_length=40), _UNSAID] = None
    background: Annotated[str | None, Field(max_length=40), _UNSAID] = None
    moderation: Annotated[str | None, Field(max_length=40), _UNSAID] = None
    output_format: Annotated[Literal["png"] | None, _UNSAID] = None


class Service(ABC):
    """A model that is served.

    Args:
        name: what it is called.
        sampler: its live queue.
        limits: what a request is granted.
        record: what is told with every picture, such as the hash of the weights.
        classes: names of its classes.

    Attributes:
        classes: names of its classes, for which a prompt stands; empty if it has none.
        prompts: whether it takes a text.
        edits: whether it takes an image to edit, and a mask.
        size: width and height of its images; None if they may be asked for.
    """

    solvers: tuple[str, ...] = tuple(solver.__name__ for solver in SOLVERS)
    prompts = edits = False
    size: tuple[int, int] | None = None

    def __init__(
        self, name: str, sampler: RequestQueue, limits: Limits, record: dict[str, Any], classes: Sequence[str] = ()
    ) -> None:
        self.name, self.sampler, self.limits, self.record, self.classes = name, sampler, limits, record, tuple(classes)

    @abstractmethod
    def arguments(self, asked: Generation) -> dict[str, Any]:
        """What a request asks of the sampler beside n, seed, solver and steps; errors as `submit`."""

    def submit(self, asked: Generation, callback: Callable[[EngineState], None] | None) -> Request:
        """Asks the sampler.

        Raises:
            ValueError, TypeError: saying what of the request is not allowed.
            SamplerFullError: if the queue is full.
        """
        sampler: Any = self.sampler
        arguments = self.arguments(asked) | within(asked, self.limits)
        request: Request = sampler.submit(n=asked.n, seed=asked.seed, callback=callback, **arguments)
        return request

    @abstractmethod
    def made(self, result: Any) -> Made:
        """Pictures of what a request has returned, None where a sample has none; and the result of its samples."""

    def previews(self, state: EngineState) -> list[Image.Image] | None:
        """Pictures of samples on their way; None where they would cost a decoder's run."""
        return None

    def refuse(self, asked: Generation, *names: str) -> None:
        """Refuses, with a ValueError that names them, fields that this model has no use for."""
        if said := [name for name in names if getattr(asked, name) is not None]:
            raise ValueError(f"{self.name} takes no {', '.join(said)}.")

    def check_size(self, asked: Generation) -> tuple[int, int] | None:
        """Width and height that are asked for, or those that the model has.

        Raises:
            ValueError: if it is no size, or not the model's.
        """
        if asked.size in (None, "auto"):
            return self.size
        found = _SIZE.fullmatch(asked.size or "")
        if found is None:
            raise ValueError(f"size must be WIDTHxHEIGHT, such as 28x28, or auto; got {asked.size!r}.")
        size = int(found[1]), int(found[2])
        if self.size is not None and size != self.size:
            raise ValueError(f"size must be {self.size[0]}x{self.size[1]}, that of {self.name}; got {asked.size}.")
        return size

    def cond(self, asked: Generation) -> Cond | None:
        """Conditioning on the class that the prompt names, by its name or number; None for an empty prompt.

        Raises:
            ValueError: if there is none.
        """
        words = asked.prompt.strip().lower()
        if not words:
            return None
        names = [name.lower() for name in self.classes]
        if not names:
            raise ValueError(f"{self.name} takes no prompt; leave it empty.")
        if words in names:
            label = names.index(words)
        elif words.isascii() and words.isdecimal() and len(words) < 9 and int(words) < len(names):
            label = int(words)
        else:
            classes = ", ".join(self.classes)
            raise ValueError(f"prompt must be a class of {self.name}: {classes}; got {asked.prompt[:80]!r}.")
        return {"class_labels": torch.full((asked.n,), label)}


def within(asked: Generation, limits: Limits) -> dict[str, Any]:
    """Solver and steps that are asked for, as keyword arguments of `submit`; a ValueError names what is not granted."""
    for name, count, most in (("n", asked.n, limits.n), ("nfe", asked.nfe, limits.nfe)):
        if count is not None and count > most:
            raise ValueError(f"{name} must be at most {most} here; got {count}.")
    if asked.rtol is not None and asked.rtol < limits.rtol:
        raise ValueError(f"rtol must be at least {limits.rtol:g} here; got {asked.rtol:g}.")
    how: dict[str, Any] = {"rtol": asked.rtol, "nfe": asked.nfe}
    if asked.solver is None and asked.eta is None:
        return how
    name = asked.solver or ExponentialPC.__name__
    kinds: dict[str, Any] = {solver.__name__: solver for solver in SOLVERS}
    check_choice("solver", name, kinds)
    if asked.eta is None:
        return how | {"solver": kinds[name]()}
    if "eta" not in {field.name for field in dataclasses.fields(kinds[name])}:
        raise ValueError(f"{name} has no eta.")
    return how | {"solver": kinds[name](eta=asked.eta)}


class ModelService(Service):
    """A score model of images.

    Args:
        name, record, classes: as for `Service`.
        model: the model, with an event shape.
        images: from finite samples to images in [0, 1], with shape (n, C, H, W).
        limits: what a request is granted.
        decoded: whether `images` runs a decoder, so that samples are latents.
        options: of the `Sampler`.
    """

    def __init__(
        self,
        name: str,
        model: ScoreModel,
        images: Callable[[Tensor], Tensor],
        limits: Limits,
        record: dict[str, Any],
        classes: Sequence[str] = (),
        *,
        decoded: bool = False,
        **options: Any,
    ) -> None:
        if model.event_shape is None or len(model.event_shape) != 3:
            raise ValueError(f"served are models of images, with shape (C, H, W); {name} has {model.event_shape}.")
        super().__init__(name, Sampler(model, max_nfe=limits.nfe, **options), limits, record, classes)
        self.model, self.images, self.decoded = model, images, decoded
        self.edits = not decoded
        if not decoded:
            self.size = model.event_shape[2], model.event_shape[1]

    def arguments(self, asked: Generation) -> dict[str, Any]:
        self.refuse(asked, "guidance_scale", "negative_prompt")
        self.check_size(asked)
        cond = {"cond": self.cond(asked)}
        if asked.image is None:
            self.refuse(asked, "mask", "strength")
            return cond
        if not self.edits:
            raise ValueError(f"{self.name} takes no image.")
        x = self._read("image", asked.image)
        if asked.mask is None:
            return cond | {"x_data": x.expand(asked.n, *x.shape), "strength": asked.strength or 0.6}
        self.refuse(asked, "strength")
        drawn = self._read("mask", asked.mask).mean(0) > sum(self.model.data_range) / 2
        if drawn.all() or not drawn.any():
            raise ValueError("mask must have white parts, which are drawn anew, and black ones, which stay.")
        return cond | {"model": Projection(self.model, Mask(~drawn), x)}

    def _read(self, name: str, text: str) -> Tensor:
        """An uploaded picture as a sample, in the model's size and range."""
        assert self.model.event_shape is not None
        channels, height, width = self.model.event_shape
        picture = picture_of(name, text, mask=name == "mask").convert("L" if channels == 1 else "RGB")
        levels = np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS), np.float32) / 255
        low, high = self.model.data_range
        pixels = torch.from_numpy(levels).reshape(height, width, -1).permute(2, 0, 1)
        return low + (high - low) * pixels

    def made(self, result: SampleResult) -> Made:
        return _pictures(result.samples, self.images), result

    def previews(self, state: EngineState) -> list[Image.Image] | None:
        if self.decoded:
            return None
        x = state.x if state.x_0 is None else state.x_0
        return [picture for picture in _pictures(x.nan_to_num(), self.images) if picture is not None]


class TokenService(Service):
    """A model of tokens that are images.

    Args:
        name, record, classes, limits: as for `ModelService`.
        model: the token model.
        images: from tokens to images in [0, 1], with shape (n, C, H, W).
        options: of the `Sampler`.
    """

    def __init__(
        self,
        name: str,
        model: TokenModel,
        images: Callable[[Tensor], Tensor],
        limits: Limits,
        record: dict[str, Any],
        classes: Sequence[str] = (),
        **options: Any,
    ) -> None:
        super().__init__(name, Sampler(model, max_nfe=limits.nfe, **options), limits, record, classes)
        self.images, self.solvers = images, ()

    def arguments(self, asked: Generation) -> dict[str, Any]:
        others = ("guidance_scale", "negative_prompt", "image", "mask", "strength", "solver", "eta", "size")
        self.refuse(asked, *others)
        return {"cond": self.cond(asked)}

    def made(self, result: SampleResult) -> Made:
        lost = (result.samples < 0).flatten(1).any(1)
        pictures = iter(_pictures(result.samples[~lost], self.images))
        return [None if gone else next(pictures) for gone in lost.tolist()], result


class PipelineService(Service):
    """A pipeline of diffusers that makes images.

    Args:
        name, record, limits: as for `ModelService`.
        pipe: the pipeline.
        pixels: the most pixels of an image.
        options: of the `PipelineSampler`.
    """

    prompts = True

    def __init__(
        self, name: str, pipe: Any, limits: Limits, record: dict[str, Any], *, pixels: int = 1 << 21, **options: Any
    ) -> None:
        super().__init__(name, fastsde.PipelineSampler(pipe, max_nfe=limits.nfe, **options), limits, record)
        self.pixels = pixels
        self.takes = inspect.signature(type(pipe).__call__).parameters
        self.prompts, self.edits = "prompt" in self.takes, "image" in self.takes

    def arguments(self, asked: Generation) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        if (size := self.check_size(asked)) is not None:
            if math.prod(size) > self.pixels:
                raise ValueError(f"size must be at most {self.pixels} pixels here; got {asked.size}.")
            arguments |= {"width": size[0], "height": size[1]}
        for key, text in {"image": asked.image, "mask_image": asked.mask}.items():
            if text is not None:
                arguments[key] = picture_of(key, text, mask=key == "mask_image")
                if math.prod(arguments[key].size) > self.pixels:
                    raise ValueError(f"{key} must have at most {self.pixels} pixels here.")
        given = {name: getattr(asked, name) for name in ("guidance_scale", "negative_prompt", "strength")}
        arguments |= {name: value for name, value in given.items() if value is not None}
        if asked.prompt or self.prompts:
            arguments["prompt"] = asked.prompt
        return arguments

    def made(self, result: Any) -> Made:
        return [picture if isinstance(picture, Image.Image) else None for picture in result.images], result.result


def picture_of(name: str, text: str, *, mask: bool = False) -> Image.Image:
    """The picture in a field of a request: base64, also as a data URL. It is turned as its camera was held.

    What is transparent is white. Of a mask with transparency only that counts: what is transparent is drawn anew, as in
    OpenAI's interface.

    Raises:
        ValueError: if it is none, or too large.
    """
    try:
        data = base64.b64decode(text.rpartition("base64,")[2], validate=True)
        picture: Image.Image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
    except (binascii.Error, UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise ValueError(f"{name} must be a PNG, JPEG or WebP picture in base64.") from None
    if math.prod(picture.size) > _PIXELS:
        raise ValueError(f"{name} has {picture.width} x {picture.height} pixels; at most {_PIXELS} are allowed.")
    try:
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I"):  # 16 bits
            picture = Image.fromarray((np.asarray(picture, np.float64) / 257).clip(0, 255).astype(np.uint8))
        if not picture.has_transparency_data:
            return picture.convert("RGB")
        cover = picture.convert("RGBA")
        if mask:
            return ImageOps.invert(cover.getchannel("A")).convert("RGB")
        return Image.alpha_composite(Image.new("RGBA", cover.size, "white"), cover).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name} is a damaged picture.") from error


def _pictures(x: Tensor, images: Callable[[Tensor], Tensor]) -> list[Image.Image | None]:
    """8-bit pictures of samples; None for those that are not finite."""
    whole = torch.isfinite(x).flatten(1).all(1)
    found: list[Image.Image | None] = [None] * len(x)
    if whole.any():
        levels = (
            (images(x[whole]).double() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        )
        for place, one in zip(whole.nonzero().flatten().tolist(), levels, strict=True):
            found[place] = Image.fromarray(one[:, :, 0] if one.shape[2] == 1 else one)
    return found
