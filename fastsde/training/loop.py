"""A plain training loop whose every step is a function of (seed, step), so that it resumes to the same numbers."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from fastsde.score.base import ScoreModel
from fastsde.training.adversarial import Adam, Adversary
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
        betas: of Adam; (0, 0.9) for adversarial training.
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
    betas: tuple[float, float] = (0.9, 0.999)
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
    adversary: Adversary | None = None,
    resume: bool = False,
    save_every: int = 250,
    callback: Callable[[int, float, nn.Module], None] | None = None,
) -> nn.Module:
    """Trains `model.network` in place by denoising score matching, adversarial or not; returns its averaged copy.

    Args:
        model: score model around a torch module.
        images: uint8 images with shape (N, C, H, W), scaled to [-1, 1]; or floats with shape (N, *event), as they are.
        labels: int64 classes with shape (N,), passed as `class_labels`; the largest is followed by "no label".
        config: the settings.
        checkpoint: a .safetensors file with weights, averages and optimiser states, those of the discriminator too,
            replaced atomically. Random numbers are a function of (seed, step) and need no state.
        adversary: a discriminator of denoised samples.
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
    optimizer = Adam(network.parameters(), config.learning_rate, config.betas)
    modules: dict[str, nn.Module] = {"network": network, "ema": ema}
    optimizers: dict[str, torch.optim.Optimizer] = {"adam": optimizer}
    settings = dataclasses.asdict(config)
    if adversary is not None:
        modules["discriminator"], optimizers["discriminator_adam"] = adversary.discriminator, adversary.optimizer()
        settings["adversary"] = adversary.settings()
    first = load_checkpoint(checkpoint, modules, optimizers, settings) if resume else 0
    no_label = None if labels is None else int(labels.max()) + 1
    running: float | None = None
    bar = tqdm(range(first, config.steps), initial=first, total=config.steps, desc="train", unit="step")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step)
        if adversary is not None:
            _update_discriminator(model, images, labels, no_label, config, step, adversary, optimizers)
        x_0, t, noise, cond = _draw(model, images, labels, no_label, config, step)
        with torch.autocast(x_0.device.type, torch.bfloat16, enabled=config.bf16):
            if adversary is None:
                loss = dsm_loss(model, x_0, t, noise, cond).mean()
            else:
                loss = adversary.score_loss(model, x_0, t, noise, cond)
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
            save_checkpoint(checkpoint, modules, optimizers, settings, step + 1)
            if callback is not None:
                callback(step + 1, running, ema.module)
    return ema.module


_Draw = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]


def _draw(
    model: ScoreModel,
    images: Tensor,
    labels: Tensor | None,
    no_label: int | None,
    config: TrainConfig,
    step: int,
    turn: int = 0,
) -> _Draw:
    """Data, times, noise and conditioning of a step, on the network's device; of the discriminator for turns from 1."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step + (turn << 40))
    rows = torch.randint(len(images), (config.batch_size,), generator=generator)
    t = stratified_times(model.sde, config.batch_size, generator)
    noise = torch.randn(rows.shape + images.shape[1:], generator=generator)
    chosen = None
    if labels is not None and no_label is not None:
        drop = torch.rand(config.batch_size, generator=generator) < config.label_dropout
        chosen = torch.where(drop, torch.tensor(no_label), labels[rows])
    return _on_device(model, images[rows], chosen, t, noise)


def _on_device(model: ScoreModel, images: Tensor, labels: Tensor | None, t: Tensor, noise: Tensor) -> _Draw:
    parameter = model.parameter
    device = torch.device("cpu") if parameter is None else parameter.device
    cond = {} if labels is None else {"class_labels": labels.to(device)}
    x_0 = to_unit_range(images) if images.dtype == torch.uint8 else images
    return x_0.to(device), t.to(device), noise.to(device, x_0.dtype), cond


def _update_discriminator(
    model: ScoreModel,
    images: Tensor,
    labels: Tensor | None,
    no_label: int | None,
    config: TrainConfig,
    step: int,
    adversary: Adversary,
    optimizers: dict[str, torch.optim.Optimizer],
) -> None:
    for turn in range(1, adversary.steps + 1):
        x_0, t, noise, cond = _draw(model, images, labels, no_label, config, step, turn)
        with torch.autocast(x_0.device.type, torch.bfloat16, enabled=config.bf16):
            loss = adversary.discriminator_loss(model, x_0, t, noise, cond)
        optimizers["discriminator_adam"].zero_grad(set_to_none=True)
        loss.backward()
        optimizers["discriminator_adam"].step()


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
        x_0, t, noise, cond = _on_device(model, images[rows], chosen, t, noise)
        total += float(dsm_loss(model, x_0, t, noise, cond).double().sum())
    return total / len(images)


def save_checkpoint(
    path: Path,
    modules: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    settings: dict[str, Any],
    step: int,
) -> None:
    """Writes weights, averages, optimiser states, settings and step to one safetensors file, atomically."""
    tensors = {f"{name}.{k}": v for name, module in modules.items() for k, v in module.state_dict().items()}
    for name, optimizer in optimizers.items():
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{name}.{i}.{k}": v for k, v in state.items()}
    meta = {"step": str(step), "config": json.dumps(settings)}
    temporary = path.with_suffix(".tmp")
    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, meta)
    os.replace(temporary, path)


def load_checkpoint(
    path: Path,
    modules: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    settings: dict[str, Any],
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
    stored, wanted = json.loads(meta["config"]), json.loads(json.dumps(settings))
    # `betas` came later: a checkpoint without them was made with the default.
    stored = {"betas": list(TrainConfig.betas), **stored}
    changed = [k for k in sorted(stored.keys() | wanted.keys()) if k != "steps" and stored.get(k) != wanted.get(k)]
    if changed:
        pairs = ", ".join(f"{k}: {stored.get(k)} there, {wanted.get(k)} here" for k in changed)
        raise ValueError(f"{path} was written with other settings ({pairs}).")
    for name, module in modules.items():
        part = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
        try:
            module.load_state_dict(part)
        except RuntimeError as error:
            raise ValueError(f"{path} holds another network: {error}") from error
    for name, optimizer in optimizers.items():
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"{name}."):
                i, field = key.removeprefix(f"{name}.").split(".", 1)
                state.setdefault(int(i), {})[field] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    if int(meta["step"]) > int(wanted["steps"]):
        raise ValueError(f"{path} is at step {meta['step']}, beyond the {wanted['steps']} steps asked for.")
    return int(meta["step"])
