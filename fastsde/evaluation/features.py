"""Feature networks: what each makes of 8-bit images, and everything that changes it."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from fastsde.arguments import usable_device
from fastsde.checkpoints import ASSETS
from fastsde.evaluation.classifier import CARD, load_classifier
from fastsde.evaluation.images import Images
from fastsde.files import sha256

PACKAGED = ASSETS / "features"


@dataclasses.dataclass(frozen=True)
class Features:
    """A feature network, and how images reach it.

    8-bit images are scaled to [0, 1], made grey or three-channel as the network wants, resized (bicubic, antialiased)
    if `size` is given and differs, normalised with mean and std, and passed in float32.

    Attributes:
        network: from (B, C, H, W) to features (B, d), or to a pair of features and logits (B, classes).
        name: what to call it.
        channels: 1 or 3.
        mean, std: of the normalisation, of images in [0, 1].
        size: side in pixels that the network wants; None takes any.
        shape: the only image shape (C, H, W) that it was made for; None takes any.
        resize_inside: what the network itself does to the size of images, for the record.
    """

    network: Callable[[Tensor], Any]
    name: str
    channels: int = 3
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    size: int | None = None
    shape: tuple[int, int, int] | None = None
    resize_inside: str = "none"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features in float32 with shape (B, d), and logits with shape (B, classes) where the network has them.

        Args:
            images: uint8 with shape (B, C, H, W), C being 1 or 3.

        Raises:
            ValueError: if they are not, or the network was made for another size.
        """
        self.check(tuple(images.shape[1:]))
        if images.dtype != torch.uint8:
            raise ValueError(f"features are of 8-bit images (rounded, never truncated); got {images.dtype}.")
        x = images.float() / 255
        if x.shape[1] < self.channels:
            x = x.expand(-1, 3, -1, -1)
        if self.size is not None and x.shape[-2:] != (self.size, self.size):
            x = functional.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (self.mean, self.std))
        parameter = next(self.network.parameters(), None) if isinstance(self.network, nn.Module) else None
        out = self.network(((x - mean) / std).to("cpu" if parameter is None else parameter.device))
        features, logits = out if isinstance(out, tuple) else (out, None)
        return features.float().flatten(1).cpu(), None if logits is None else logits.float().cpu()

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuses, with a ValueError, images of a shape (C, H, W) that the network was not made for."""
        if self.shape is not None and shape != self.shape:
            raise ValueError(f"the features {self.name!r} are of images {self.shape}; these are {shape}.")
        if len(shape) != 3 or shape[0] not in (1, 3) or shape[0] > self.channels:
            raise ValueError(f"the features {self.name!r} take images of {self.channels} channels; these are {shape}.")

    def describe(self) -> dict[str, Any]:
        """Everything that changes a feature, for the record: two sets compare only if this is the same."""
        inside = getattr(self.network, "network", self.network)  # of the wrappers below, what they wrap
        graph = type(inside).__name__ if isinstance(inside, nn.Module) else "function"
        resize = "none" if self.size is None else f"bicubic, antialiased, to {self.size}"
        return {
            "name": self.name,
            "graph": graph,
            "weights_sha256": _hash(self.network),
            "resize": resize,
            "resize_inside": self.resize_inside,
            "normalisation": [list(self.mean), list(self.std)],
            "dtype": "float32",
            "quantisation": "rounded to 8 bits",
        }

    def of(self, images: Images | Iterable[Tensor], *, progress: bool = False) -> tuple[Tensor, Tensor | None]:
        """Features with shape (n, d), and logits, of a whole set."""
        total = None
        if isinstance(images, Images):
            self.check(images.shape)
            total, images = -(-images.n // 500), images.batches(500)
        parts = [self(part) for part in tqdm(images, "features", total, disable=None if progress else True)]
        logits = [part for _, part in parts if part is not None]
        return torch.cat([part for part, _ in parts]), torch.cat(logits) if logits else None


def _hash(network: object) -> str:
    """SHA-256 of names, shapes and values of the state; empty for a function, of which nothing can be said."""
    if not isinstance(network, nn.Module):
        return ""
    parts: list[bytes | np.ndarray] = []
    for key, value in network.state_dict().items():
        header = f"{key} {value.dtype} {tuple(value.shape)}".encode()
        parts += [header, value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()]
    return sha256(*parts)


def packaged_features() -> list[str]:
    """Names of the feature networks that come with the package."""
    return sorted(folder.name for folder in PACKAGED.iterdir() if (folder / CARD).is_file())


def open_features(name: str | Path, weights: Path | None = None, *, device: str = "cpu") -> Features:
    """The feature network of a name.

    Args:
        name: "fashion-mnist", the packaged classifier; a folder of `fastsde train-features`; "inception", the graph of
            FID; or a folder (or cached hub name) of a DINOv2 or CLIP model, which transformers reads.
        weights: for "inception": a local file, .safetensors or .pth (read without executing anything in it); without
            it, torch-fidelity's own download.
        device: where it runs.

    Raises:
        FileNotFoundError, ValueError: if there is no such network or its files are damaged.
        ImportError: if the library that reads it is not installed.
    """
    device = str(usable_device(device))
    if str(name) == "inception":
        return inception_features(weights, device=device)
    if weights is not None:
        raise ValueError(f"weights are for 'inception'; got features {str(name)!r}.")
    if str(name) in packaged_features():
        return classifier_features(PACKAGED / name, device=device)
    folder = Path(name)
    if (folder / CARD).is_file():
        return classifier_features(folder, device=device)
    if (folder / "config.json").is_file() or (str(name).count("/") == 1 and not folder.exists()):
        return transformers_features(name, device=device)
    raise FileNotFoundError(
        f"no features {str(name)!r}: neither a folder of a feature network nor one of "
        f"{', '.join([*packaged_features(), 'inception'])}."
    )


def classifier_features(folder: Path, *, device: str = "cpu") -> Features:
    """The classifier that `fastsde train-features` wrote."""
    network, card = load_classifier(folder)
    shape = tuple(card["image_shape"])
    return Features(network.to(device), folder.name, channels=shape[0], shape=shape)


class _Inception(nn.Module):
    """torch-fidelity's Inception: 8-bit images in, the 2048 features of FID and unbiased logits out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = self.network((x * 255).round().to(torch.uint8))
        return out


def inception_features(weights: Path | None = None, *, device: str = "cpu") -> Features:
    """InceptionV3 in the graph of FID, as torch-fidelity has it: resized to 299 inside, as TensorFlow 1 did.

    Args:
        weights: a local .safetensors or .pth file; without it torch-fidelity downloads its own.
        device: where it runs.

    Raises:
        ImportError: if torch-fidelity is not installed.
        FileNotFoundError, ValueError: if the file is missing or no state of this network.
    """
    if weights is not None and not weights.is_file():
        raise FileNotFoundError(f"no weights at {weights}.")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Inception
    except (ImportError, RuntimeError) as error:  # torchvision, which it imports, fails so beside another torch
        raise ImportError(f"the graph of FID is torch-fidelity's, which cannot be imported: {error}") from error
    wanted = ["2048", "logits_unbiased"]
    if weights is None:
        network = Inception("inception-v3-compat", wanted)
    else:
        try:
            state = load_file(weights) if weights.suffix == ".safetensors" else torch.load(weights, weights_only=True)
        except Exception as error:
            raise ValueError(f"{weights} is no file of plain weights: {error}") from error
        # It unpickles the file that it is given without care: so it gets one that we wrote from plain tensors.
        with tempfile.TemporaryDirectory() as folder:
            torch.save(dict(state), Path(folder) / "weights.pth")
            try:
                network = Inception("inception-v3-compat", wanted, str(Path(folder) / "weights.pth"))
            except RuntimeError as error:
                raise ValueError(f"{weights} does not fit the Inception of FID: {error}") from error
    inside = "299, bilinear as TensorFlow 1"
    return Features(
        _Inception(network).to(device, torch.float32).eval(), "inception", 3, (0.0,), (1.0,), resize_inside=inside
    )


class _Pooled(nn.Module):
    """The class token of a vision transformer (DINOv2), or the image embedding of a CLIP."""

    def __init__(self, network: nn.Module, clip: bool) -> None:
        super().__init__()
        self.network, self.clip = network, clip

    def forward(self, x: Tensor) -> Tensor:
        out = self.network(pixel_values=x)
        return out.image_embeds if self.clip else out.last_hidden_state[:, 0]


def transformers_features(name: str | Path, *, device: str = "cpu") -> Features:
    """DINOv2 or CLIP, from a folder or the local cache; size and normalisation from its preprocessor_config.json.

    Raises:
        ImportError: if transformers is not installed.
        ValueError: if the model is neither, or its weights are not here.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError("these features are read by transformers: pip install transformers.") from error
    try:
        config = transformers.AutoConfig.from_pretrained(name, local_files_only=True)
        kinds: dict[str, Any] = {
            "dinov2": transformers.Dinov2Model,
            "clip": transformers.CLIPVisionModelWithProjection,
            "clip_vision_model": transformers.CLIPVisionModelWithProjection,
        }
        if config.model_type not in kinds:
            raise ValueError(f"a {config.model_type}, where {', '.join(kinds)} are known")
        options = {"local_files_only": True, "use_safetensors": True}
        network = kinds[config.model_type].from_pretrained(name, **options)
        path = transformers.utils.cached_file(name, "preprocessor_config.json", local_files_only=True)
        settings = json.loads(Path(str(path)).read_text())
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"the features {str(name)!r} cannot be read: {error}") from error
    size = settings.get("crop_size") or settings["size"]
    side = size if isinstance(size, int) else size.get("height", size.get("shortest_edge"))
    pooled = _Pooled(network, config.model_type != "dinov2").to(device, torch.float32).eval()
    return Features(pooled, str(name), 3, tuple(settings["image_mean"]), tuple(settings["image_std"]), size=int(side))
