"""A plain training loop whose every step is a function of (seed, step), so that it resumes to the same numbers."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from fastsde.score.base import ScoreModel
from fastsde.training.data import to_unit_range
from fastsde.training.ema import ema_model
from fastsde.training.losses import dsm_loss, stratified_times


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; all of them are stored with its checkpoints.

    Attributes:
        steps: optimiser steps in all; the learning rate falls linearly to 0 over them.
        batch_size: images a step.
        learning_rate: peak learning rate of Adam.
        warmup: steps over which the learning rate rises from 0.
        ema_decay: final decay of the averaged weights.
        label_dropout: share of the labels replaced by "no label".
        grad_clip: largest norm of the gradient.
        seed: determines initial weights, batches, times and noise.
        bf16: run the network in bfloat16 under autocast; weights and loss stay float32.
    """

    steps: int = 6000
    batch_size: int = 128
    learning_rate: float = 2e-3
    warmup: int = 200
    ema_decay: float = 0.999
    label_dropout: float = 0.1
    grad_clip: float = 1.0
    seed: int = 0
    bf16: bool = True

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of the given step: a linear rise over `warmup`, then a linear fall to 0."""
        return self.learning_rate * min((step + 1) / self.warmup, (self.steps - step) / self.steps)


def train(
    model: ScoreModel,
    images: Tensor,
    labels: Tensor | None,
    config: TrainConfig,
    checkpoint: Path,
    *,
    resume: bool = False,
    save_every: int = 250,
    callback: Callable[[int, float, nn.Module], None] | None = None,
) -> nn.Module:
    """Trains `model.network` in place by denoising score matching and returns its averaged copy.

    Args:
        model: score model around a torch module.
        images: uint8 data with shape (N, C, H, W).
        labels: int64 classes with shape (N,), passed as `class_labels`; the largest is followed by "no label".
        config: the settings.
        checkpoint: a .safetensors file with weights, averages and optimiser state, replaced atomically.
        resume: continue from `checkpoint`.
        save_every: steps between checkpoints.
        callback: called as `callback(step, loss, averaged_network)` after every checkpoint.

    Raises:
        ValueError: if the checkpoint was made with other settings or for another network.
        FileNotFoundError: if there is nothing to resume.
        FloatingPointError: if the loss is no longer finite.
    """
    network = model.network
    assert isinstance(network, nn.Module)
    ema = ema_model(network, config.ema_decay)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate)
    first = load_checkpoint(checkpoint, network, ema, optimizer, config) if resume else 0
    no_label = None if labels is None else int(labels.max()) + 1
    running: float | None = None
    bar = tqdm(range(first, config.steps), initial=first, total=config.steps, desc="train", unit="step")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step)
        loss = _loss_of_step(model, images, labels, no_label, config, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), config.grad_clip)
        optimizer.step()
        ema.update_parameters(network)
        value = float(loss.detach())
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {value} at step {step}; the last checkpoint is {checkpoint}.")
        running = value if running is None else 0.98 * running + 0.02 * value
        bar.set_postfix(loss=f"{running:.4f}")
        if (step + 1) % save_every == 0 or step + 1 == config.steps:
            save_checkpoint(checkpoint, network, ema, optimizer, config, step + 1)
            if callback is not None:
                callback(step + 1, running, ema.module)
    return ema.module


def _loss_of_step(
    model: ScoreModel, images: Tensor, labels: Tensor | None, no_label: int | None, config: TrainConfig, step: int
) -> Tensor:
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    rows = torch.randint(len(images), (config.batch_size,), generator=generator)
    t = stratified_times(model.sde, config.batch_size, generator)
    noise = torch.randn(rows.shape + images.shape[1:], generator=generator)
    chosen = None
    if labels is not None and no_label is not None:
        drop = torch.rand(config.batch_size, generator=generator) < config.label_dropout
        chosen = torch.where(drop, torch.tensor(no_label), labels[rows])
    return _loss_on(model, images[rows], chosen, t, noise, config.bf16).mean()


def _loss_on(model: ScoreModel, images: Tensor, labels: Tensor | None, t: Tensor, noise: Tensor, bf16: bool) -> Tensor:
    """The loss of each row, on the network's device."""
    parameter = model.parameter
    device = torch.device("cpu") if parameter is None else parameter.device
    cond = {} if labels is None else {"class_labels": labels.to(device)}
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        return dsm_loss(model, to_unit_range(images).to(device), t.to(device), noise.to(device), cond)


@torch.no_grad()
def held_out_loss(model: ScoreModel, images: Tensor, labels: Tensor | None, batch_size: int = 250) -> float:
    """Mean denoising loss over images not trained on, with fixed times and noise, so that networks can be compared.

    Args:
        model: the score model.
        images: uint8 with shape (N, C, H, W).
        labels: int64 with shape (N,), or None.
        batch_size: images evaluated at a time; the result depends on it through the draws.
    """
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for rows in tqdm(torch.arange(len(images)).split(batch_size), desc="evaluate", unit="batch"):
        t = stratified_times(model.sde, len(rows), generator)
        noise = torch.randn(rows.shape + images.shape[1:], generator=generator)
        chosen = None if labels is None else labels[rows]
        total += float(_loss_on(model, images[rows], chosen, t, noise, False).double().sum())
    return total / len(images)


def save_checkpoint(
    path: Path, network: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig, step: int
) -> None:
    """Writes weights, averages, optimiser state, settings and step to one safetensors file, atomically."""
    tensors = {f"network.{k}": v for k, v in network.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{i}.{k}": v for k, v in state.items()}
    meta = {"step": str(step), "config": json.dumps(dataclasses.asdict(config))}
    temporary = path.with_suffix(".tmp")
    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, meta)
    os.replace(temporary, path)


def load_checkpoint(
    path: Path, network: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig
) -> int:
    """Restores what `save_checkpoint` wrote and returns the next step.

    `steps` may differ from the run that wrote it: the schedule of the learning rate follows the new value.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if settings or network differ from those of the checkpoint.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; start without --resume.")
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
    if not {"step", "config"} <= meta.keys():
        raise ValueError(f"{path} is no checkpoint of `fastsde train`.")
    stored, wanted = json.loads(meta["config"]), dataclasses.asdict(config)
    changed = [k for k in wanted if k != "steps" and stored.get(k) != wanted[k]]
    if changed:
        pairs = ", ".join(f"{k}: {stored.get(k)} there, {wanted[k]} here" for k in changed)
        raise ValueError(f"{path} was written with other settings ({pairs}).")
    for name, module in (("network", network), ("ema", ema)):
        part = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
        try:
            module.load_state_dict(part)
        except RuntimeError as error:
            raise ValueError(f"{path} holds another network: {error}") from error
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("adam."):
            _, i, name = key.split(".", 2)
            state.setdefault(int(i), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    if int(meta["step"]) > config.steps:
        raise ValueError(f"{path} is at step {meta['step']}, beyond the {config.steps} steps asked for.")
    return int(meta["step"])
