"""The batch of each step: a function of (seed, step), shared by the processes of a run."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from fastsde.checks import check_finite
from fastsde.files import sha256
from fastsde.score.base import ScoreModel
from fastsde.training.config import TrainConfig
from fastsde.training.data import to_unit_range
from fastsde.training.levels import geometric_levels, level_times
from fastsde.training.losses import stratified_times

Batch = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]
"""x_0 and noise with shape (B, *event), times with shape (B,) between them, conditioning: what the losses take."""


def rank_and_size() -> tuple[int, int]:
    """Which process of a distributed run this is, and of how many; (0, 1) if there is none."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if there else (0, 1)


class Rows:
    """Which data each step sees.

    Args:
        images: uint8 with shape (N, C, H, W), or floats with shape (N, *event).
        labels: int64 with shape (N,), or None; the largest is followed by "no label".
        config: the settings.
        share: which process of how many draws; by default as torch.distributed says.
        tokens: whether the data are tokens, int64 with shape (N, *event).

    Raises:
        ValueError: if the data are constant, not finite or not as many as the labels, or the processes cannot share a
            batch evenly.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None,
        config: TrainConfig,
        share: tuple[int, int] | None = None,
        *,
        tokens: bool = False,
    ) -> None:
        check_data(images, labels, tokens=tokens)
        self.rank, self.size = share or rank_and_size()
        if config.batch_size % self.size:
            raise ValueError(f"batch_size {config.batch_size} cannot be shared evenly by {self.size} processes.")
        self.images, self.labels, self.config = images, labels, config
        self.no_label = 0 if labels is None else int(labels.max()) + 1
        self.own = slice(self.rank, None, self.size)
        """This process's share of what is drawn for a whole batch."""

    def describe(self) -> dict[str, str]:
        """What a checkpoint must agree on besides the settings: the data."""
        return {"data": data_hash(self.images, self.labels)}

    def precision(self, device: torch.device) -> AbstractContextManager[None]:
        """Autocast to bfloat16 if the settings say so."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.config.bf16)

    def rows(self, step: int, turn: int = 0) -> tuple[Tensor, torch.Generator]:
        """Numbers of the images of a whole batch, and a generator for what else is drawn for it."""
        generator = torch.Generator().manual_seed(self._seed(step, turn))
        return torch.randint(len(self.images), (self.config.batch_size,), generator=generator), generator

    def labels_of(self, rows: Tensor, generator: torch.Generator) -> Tensor | None:
        """Labels of rows, some of them dropped, with the shape of `rows`; None without labels."""
        if self.labels is None:
            return None
        drop = torch.rand(len(rows), generator=generator) < self.config.label_dropout
        return self.labels[rows].masked_fill(drop, self.no_label)

    def _seed(self, step: int, turn: int) -> int:
        return self.config.seed * 1_000_003 + step + (turn << 40)


class Batches(Rows):
    """Draws data, times, noise and conditioning.

    Args:
        model: the score model, on whose device batches are put.
        images, labels, config, share: as for `Rows`, errors too.
    """

    def __init__(
        self,
        model: ScoreModel,
        images: Tensor,
        labels: Tensor | None,
        config: TrainConfig,
        share: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(images, labels, config, share)
        self.model = model
        sde = model.sde
        last, first = sde.log_snr(torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64)).div(-2).exp().tolist()
        self.levels = geometric_levels(first, last, config.levels) if config.levels else None

    def describe(self) -> dict[str, str]:
        """The data, and how the network is read."""
        return {**super().describe(), "sde": repr(self.model.sde), "prediction": str(self.model.prediction)}

    def draw(self, step: int, turn: int = 0) -> tuple[Batch, torch.Generator]:
        """This process's share of a step's batch, and a generator for what else it draws.

        Args:
            step: from 0.
            turn: 0 for the score network, from 1 for the updates of a discriminator.
        """
        rows, generator = self.rows(step, turn)
        size, own = len(rows), self.own
        if self.levels is None:
            t = stratified_times(self.model.sde, size, generator)
        else:
            t = level_times(self.model.sde, self.levels, size, generator)
        noise = torch.randn(rows.shape + self.images.shape[1:], generator=generator)
        chosen = self.labels_of(rows, generator)
        batch = on_device(
            self.model, self.images[rows[own]], chosen if chosen is None else chosen[own], t[own], noise[own]
        )
        return batch, torch.Generator().manual_seed(self._seed(step, turn) + (self.rank + 1 << 50))


def on_device(model: ScoreModel, images: Tensor, labels: Tensor | None, t: Tensor, noise: Tensor) -> Batch:
    """The batch on the network's device, 8-bit images in [-1, 1]."""
    device = model.device
    cond = {} if labels is None else {"class_labels": labels.to(device)}
    x_0 = in_unit_range(images)
    return x_0.to(device), t.to(device), noise.to(device, x_0.dtype), cond


def in_unit_range(images: Tensor) -> Tensor:
    """8-bit images in [-1, 1], floats as they are."""
    return to_unit_range(images) if images.dtype == torch.uint8 else images


def data_hash(images: Tensor, labels: Tensor | None) -> str:
    """Sixteen hexadecimal digits that tell one data set from another."""
    parts = [part.numpy() for part in (images, labels) if part is not None]
    return sha256(f"{tuple(images.shape)} {images.dtype}".encode(), *parts)[:16]


def check_data(images: Tensor, labels: Tensor | None, *, tokens: bool = False) -> None:
    """Refuses, with a ValueError, data that nothing can be learned from; `tokens` says that the data are integers."""
    if len(images) < 2:
        raise ValueError(f"images must be at least two; got shape {tuple(images.shape)}.")
    if not tokens and images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images must be uint8 or floats; got {images.dtype}.")
    if images.is_floating_point():
        check_finite(images, "images")
    if bool((images == images[:1]).all()):
        raise ValueError(f"all {len(images)} images are the same: there is nothing to learn.")
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype != torch.int64 or labels.min() < 0):
        raise ValueError(
            f"labels must be int64 from 0 with shape ({len(images)},); got {labels.dtype} with shape "
            f"{tuple(labels.shape)}, the least {int(labels.min()) if labels.numel() else '-'}."
        )
