"""Reference statistics: the moments of features of a data set, in a file that other tools read and write too."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastsde.evaluation.features import PACKAGED, Features
from fastsde.evaluation.images import Images
from fastsde.evaluation.statistics import NEIGHBOUR, Moments
from fastsde.files import ArrayFile, differences, sha256, write_whole

REFERENCE = "reference.npz"


@dataclasses.dataclass(frozen=True)
class Reference:
    """Mean and covariance of the features of data, and what they are of.

    The file is an .npz with `mu` and `sigma` in float64, which pytorch-fid and clean-fid read; `feats`, some of the
    features, clean-fid's name for them; and `record`, JSON in text. A file with `mu` and `sigma` alone, as pytorch-fid,
    clean-fid and ADM's suite write them, is read too, but does not say which network it is of.

    Attributes:
        mean, covariance: with shape (d,) and (d, d).
        feats: features of some of the images, with shape (k, d), for kernel distance, precision and recall; or None.
        record: what the file says of itself: features, image shape, n, source; empty if it says nothing.
    """

    mean: Tensor
    covariance: Tensor
    feats: Tensor | None
    record: dict[str, Any]

    @classmethod
    def build(cls, images: Images, features: Features, *, keep: int = 10_000, progress: bool = False) -> Reference:
        """Measures a data set in one pass.

        Args:
            images: the data.
            features: the network.
            keep: features to keep: of images chosen at random, by a fixed seed.
            progress: show a bar.

        Raises:
            ValueError: if the network was made for other images, or there are no more images than features.
        """
        features.check(images.shape)
        chosen = torch.randperm(images.n, generator=torch.Generator().manual_seed(0))[:keep].sort().values
        moments, kept, digest = None, [], hashlib.sha256()
        for part in tqdm(images.batches(), "stats", -(-images.n // 500), disable=None if progress else True):
            digest.update(part.numpy().tobytes())
            found, _ = features(part)
            moments = moments or Moments(found.shape[1])
            own = chosen - moments.n
            kept.append(found[own[(own >= 0) & (own < len(found))]])
            moments.update(found)
        assert moments is not None
        d = len(moments.mean)
        if moments.n <= d:
            raise ValueError(f"{moments.n} images are too few for {d} features: their covariance would be singular.")
        record = {
            "features": features.describe(),
            "image_shape": list(images.shape),
            "n": moments.n,
            "source": {"kind": images.kind, "name": Path(images.source).name, "pixels_sha256": digest.hexdigest()},
        }
        return cls(moments.mean, moments.covariance, torch.cat(kept) if keep else None, record)

    def sha256(self) -> str:
        """SHA-256 of mean, covariance and features, in hexadecimal."""
        parts = (self.mean, self.covariance, self.feats)
        return sha256(*(part.numpy() for part in parts if part is not None))

    def save(self, path: Path, *, half: bool = False) -> None:
        """Writes the file; `half` keeps `feats` in half precision."""
        arrays = {"mu": self.mean.numpy(), "sigma": self.covariance.numpy()}
        if self.feats is not None:
            arrays["feats"] = self.feats.numpy().astype(np.float16 if half else np.float32)
        if self.record:
            arrays["record"] = np.array(json.dumps(self.record))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, arrays)

    @classmethod
    def load(cls, path: Path) -> Reference:
        """Reads a file of ours, pytorch-fid's, clean-fid's or ADM's.

        Raises:
            FileNotFoundError: if it is not there.
            ValueError: if it is damaged, lacks mu and sigma, or they do not fit.
        """
        if not path.is_file():
            raise FileNotFoundError(f"no reference at {path}; `fastsde stats` writes one.")
        with ArrayFile(path) as file:
            if not {"mu", "sigma"} <= file.headers.keys():
                raise ValueError(f"{path} has no mu and sigma, but {', '.join(file.headers) or 'nothing'}.")
            for name, (shape, kind) in file.headers.items():
                if name in ("mu", "sigma", "feats") and kind.kind not in "fiu":
                    raise ValueError(f"{path}: {name} must hold real numbers; it is {kind} with shape {shape}.")
            mean, covariance = (torch.from_numpy(file.read(key).astype(np.float64)) for key in ("mu", "sigma"))
            feats = torch.from_numpy(file.read("feats").astype(np.float32)) if "feats" in file.headers else None
            text = str(file.read("record")) if "record" in file.headers else "{}"
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} has a record that is not JSON: {error}") from error
        known = isinstance(record, dict) and isinstance(record.get("features"), dict)
        if record != {} and not (known and isinstance(record.get("image_shape"), list)):
            raise ValueError(f"{path} has a record that is none of `fastsde stats`.")
        d = len(mean) if mean.ndim else 0
        if not d or mean.ndim != 1 or covariance.shape != (d, d) or (feats is not None and feats.shape[1:] != (d,)):
            raise ValueError(f"{path}: mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)} do not fit.")
        if not (torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
            raise ValueError(f"{path}: mu and sigma must be finite.")
        values = torch.linalg.eigvalsh(covariance)
        if (covariance - covariance.T).abs().max() > 1e-6 * values[-1].abs() or values[0] < -1e-6 * values[-1].abs():
            raise ValueError(f"{path}: sigma is no covariance: it must be symmetric, with no negative eigenvalue.")
        return cls(mean, covariance, feats, record)

    def check(self, features: Features, shape: tuple[int, ...]) -> None:
        """Refuses, with a ValueError, features of another network, and images of another shape.

        A file that does not say what it is of is taken at its word: only the number of features is compared.
        """
        features.check(shape)
        found, _ = features(torch.zeros(1, *shape, dtype=torch.uint8))
        if found.shape[1:] != self.mean.shape:
            raise ValueError(f"the reference has {len(self.mean)} features, {features.name!r} has {found.shape[1]}.")
        if self.feats is not None and len(self.feats) <= NEIGHBOUR:
            raise ValueError(
                f"the reference keeps {len(self.feats)} features, more than {NEIGHBOUR} are needed, or none."
            )
        if not self.record:
            return
        here = {key: value for key, value in features.describe().items() if key != "name"}
        if changed := differences({key: self.record["features"].get(key) for key in here}, here):
            raise ValueError(f"the reference is of other features ({changed}).")
        if list(shape) != self.record["image_shape"]:
            raise ValueError(
                f"the reference is of images {tuple(self.record['image_shape'])}, these are {tuple(shape)}: "
                "distances between resolutions mean nothing."
            )


def packaged_reference(name: str) -> Reference:
    """The packaged statistics of the training images of a packaged feature network's data."""
    return Reference.load(PACKAGED / name / REFERENCE)
