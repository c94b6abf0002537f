"""Settings of `fastsde train`: a TOML file, `--set key=value`, and options, in rising order of precedence."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastsde.checks import check_choice
from fastsde.training.adversarial import Adversary
from fastsde.training.config import TrainConfig
from fastsde.training.gan_losses import all_pairs, average, centred, hinge, lsgan, one_way, paired, plain, sgan, wgan
from fastsde.training.introvae import IntroVAE, SoftIntroVAE
from fastsde.training.masking import Masking
from fastsde.training.networks import Discriminator

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LOSSES = {"sgan": sgan, "lsgan": lsgan, "hinge": hinge, "wgan": wgan}
AUTOENCODERS = ("vae", "introvae", "soft-introvae")
MODELS = ("score", *AUTOENCODERS, "latent")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
COMPARISONS = {rule.__name__.replace("_", " "): rule for rule in (plain, paired, average, centred, one_way, all_pairs)}


@dataclasses.dataclass(frozen=True)
class NetworkSettings:
    """Of `small_unet`, channels at its three resolutions; and what the network predicts."""

    widths: tuple[int, ...] = (32, 64, 112)
    prediction: str = "epsilon"

    def __post_init__(self) -> None:
        check_choice("network.prediction", self.prediction, PREDICTIONS)


@dataclasses.dataclass(frozen=True)
class AdversarySettings:
    """A discriminator and how it is trained; see `Adversary`, `Discriminator` and `Masking`."""

    loss: str = "lsgan"
    compare: str = "plain"
    weight: float = 1.0
    steps: int = 1
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (-0.5, 0.9)
    penalty: float = 0.0
    width: int = 32
    halvings: int = 3
    masking: Masking | None = None
    score_masking: Masking | None = None
    updates: str = "alternating"
    two_discriminators: bool = False

    def __post_init__(self) -> None:
        check_choice("adversary.loss", self.loss, LOSSES)
        check_choice("adversary.compare", self.compare, COMPARISONS)

    def build(self, channels: int, image_size: int) -> Adversary:
        """The discriminator, with fresh weights, and its training."""
        try:
            if image_size >> max(self.halvings, 0) < 1:
                raise ValueError(f"halvings must leave a pixel of {image_size}; got {self.halvings}.")
            first, *second = (
                Discriminator(channels, self.width, self.halvings) for _ in range(1 + self.two_discriminators)
            )
            own = ("loss", "compare", "width", "halvings", "two_discriminators")
            shared = {name: value for name, value in vars(self).items() if name not in own}
            loss = LOSSES[self.loss](COMPARISONS[self.compare])
            return Adversary(first, loss, **shared, spectral_discriminator=second[0] if second else None)
        except ValueError as error:
            raise ValueError(f"adversary: {error}") from error


@dataclasses.dataclass(frozen=True)
class VAESettings:
    """Of `small_autoencoder`, channels at its resolutions and of its latents; and weights of its losses.

    See `IntroVAE` for alpha, margin and beta, and `SoftIntroVAE` for the others. `plain` is a number of steps of the
    plain VAE at first.
    """

    widths: tuple[int, ...] = (16, 16, 32)
    channels: int = 4
    plain: int = 0
    alpha: float = 0.25
    margin: float = 25.0
    beta: float = 1.0
    beta_rec: float = 1.0
    beta_kl: float = 1.0
    beta_neg: float = 256.0

    def objective(self, model: str) -> IntroVAE | SoftIntroVAE:
        """The losses of one of `AUTOENCODERS`."""
        try:
            if model == "soft-introvae":
                return SoftIntroVAE(self.beta_rec, self.beta_kl, self.beta_neg)
            return IntroVAE(0.0 if model == "vae" else self.alpha, self.margin, self.beta)
        except ValueError as error:
            raise ValueError(f"vae: {error}") from error


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that `--config` may say. Paths are relative to where the command runs."""

    model: str = "score"
    autoencoder: str = ""
    data: str = ""
    title: str = ""
    classes: tuple[str, ...] = ()
    labels: bool = True
    save_every: int = 250
    samples_every: int = 1000
    training: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    network: NetworkSettings = dataclasses.field(default_factory=NetworkSettings)
    vae: VAESettings = dataclasses.field(default_factory=VAESettings)
    adversary: AdversarySettings | None = None

    def __post_init__(self) -> None:
        check_choice("model", self.model, MODELS)
        if (self.model == "latent") != bool(self.autoencoder):
            raise ValueError(
                f"model=latent needs autoencoder=FOLDER, and no other model takes one; got model={self.model} with "
                f"autoencoder={self.autoencoder!r}."
            )
        if self.adversary is not None and self.model != "score":
            raise ValueError(f"an adversary goes with model=score; got {self.model}.")
        if self.save_every < 1 or self.samples_every < 0 or self.samples_every % self.save_every:
            raise ValueError(
                f"save_every must be at least 1 and samples_every a multiple of it, or 0 for no samples; got "
                f"{self.save_every} and {self.samples_every}."
            )
        if not all(name.strip() for name in self.classes) or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes must be different names; got {list(self.classes)}.")

    def differences(self) -> Iterator[tuple[str, Any]]:
        """The settings that are not the defaults, as `--set` takes them, but for the data and what it is called."""
        default = _flat(dataclasses.asdict(Settings()))
        for key, value in _flat(dataclasses.asdict(self)):
            named = key not in ("data", "title", "classes", "autoencoder") and value is not None  # None: not said
            if named and (key, value) not in default:
                yield key, value


def read_settings(config: Path | None, assignments: Sequence[str], options: Mapping[str, Any]) -> Settings:
    """The settings of a TOML file, with assignments and then options over them, which are None where not given.

    Assignments are such as "training.steps=100", with values as in TOML, or else words.
    """
    found: dict[str, Any] = {}
    if config is not None:
        try:
            found = tomllib.loads(config.read_text())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{config} is no TOML file: {error}") from error
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set must be KEY=VALUE; got {text!r}.")
        _put(found, key.strip(), _value(value.strip()))
    for key, value in options.items():
        if value is not None:
            _put(found, key, value)
    training, network = found.get("training", {}), found.get("network", {})
    if found.get("model") == "latent" and isinstance(network, dict) and "widths" not in network:
        _put(found, "network.widths", [32])  # latents of 7 x 7 cannot be halved
    if "adversary" in found and isinstance(training, dict) and "betas" not in training:
        _put(found, "training.betas", [0.0, 0.9])  # published; momentum of the score network makes the game unstable
    settings: Settings = _build(Settings, found, "")
    return settings


def _value(text: str) -> Any:
    try:
        found = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
    return found["value"] if len(found) == 1 else text


def _put(found: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for k, name in enumerate(path):
        found = found.setdefault(name, {})
        if not isinstance(found, dict):
            raise ValueError(f"{'.'.join(path[: k + 1])} is no table, so there is no {key}.")
    found[last] = value


def _build(kind: Any, value: Any, key: str) -> Any:
    """A value as a field of that type wants it: tables become dataclasses, lists tuples."""
    choices = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else ()
    if choices:
        kind = choices[0]
    if dataclasses.is_dataclass(kind):
        return _build_table(kind, value, key)
    items = typing.get_args(kind)
    if items:
        same = items[-1] is Ellipsis
        if not isinstance(value, list | tuple) or not (same or len(value) == len(items)):
            raise ValueError(f"{key} must be a list{'' if same else f' of {len(items)}'}; got {value!r}.")
        return tuple(_build(items[0 if same else k], part, key) for k, part in enumerate(value))
    if kind is float and type(value) is int and abs(value) < 1 << 53:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{key} must be of the kind {kind.__name__}; got {value!r}.")
    return value


def _build_table(kind: Any, value: Any, key: str) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"{key} must be a table; got {value!r}.")
    hints, prefix = typing.get_type_hints(kind), f"{key}." if key else ""
    unknown = [name for name in value if name not in hints]
    if unknown:
        raise ValueError(f"there is no setting {prefix}{unknown[0]}; {key or 'a run'} has {', '.join(hints)}.")
    try:
        return kind(**{name: _build(hints[name], part, f"{prefix}{name}") for name, part in value.items()})
    except ValueError as error:
        raise ValueError(str(error) if key == "" or str(error).startswith(key) else f"{key}: {error}") from error


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, part in value.items():
        flat += _flat(part, f"{prefix}{key}.") if isinstance(part, dict) else [(f"{prefix}{key}", part)]
    return flat


def as_toml(value: Any) -> str:
    """A value as `--set` reads it."""
    return json.dumps(list(value) if isinstance(value, tuple) else value)
