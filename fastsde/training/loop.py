"""A plain training loop whose every step is a function of (seed, step), so that it resumes to the same numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastsde.checks import check_count
from fastsde.files import as_json
from fastsde.score.base import ScoreModel
from fastsde.training.adversarial import Adam, Adversary
from fastsde.training.batches import Batch, Batches, on_device, rank_and_size
from fastsde.training.checkpoint import History, load_checkpoint, save_checkpoint
from fastsde.training.config import TrainConfig
from fastsde.training.ema import ema_model
from fastsde.training.losses import dsm_loss, noisy_score_loss, stratified_times
from fastsde.types import Coef


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
    callback: Callable[[int, History, nn.Module], None] | None = None,
) -> nn.Module:
    """Trains `model.network` in place by denoising score matching, adversarial or not; returns its averaged copy.

    Where torch.distributed is initialised, the processes share each batch and average their gradients, so that their
    number changes rounding alone (with the `average` comparison of GAN losses also what is averaged); the first one
    writes.

    With an adversary on images the history has the column "gini": the Gini coefficient of where the discriminator
    looks, on the first 16 images of its last batch. Source: Huang et al., NeurIPS 2022, supplement, fig. 1.

    Args:
        model: score model around a torch module.
        images: uint8 images with shape (N, C, H, W), scaled to [-1, 1]; or floats with shape (N, *event), as they are.
        labels: int64 classes with shape (N,), passed as `class_labels`; the largest is followed by "no label".
        config: the settings.
        checkpoint: a .safetensors file with weights, averages and optimiser states, those of the discriminator too, and
            the losses, replaced atomically. Random numbers are a function of (seed, step) and need no state; those that
            a network draws itself, for dropout, are torch's own and do not repeat.
        adversary: a discriminator of denoised samples.
        resume: continue from `checkpoint`.
        save_every: steps between checkpoints.
        callback: called as `callback(step, history, averaged_network)` after every checkpoint and on resuming, with the
            losses so far.

    Raises:
        ValueError: if the data are constant, not finite or not as many as the labels, or the checkpoint was made with
            other settings, for other data or another network.
        TypeError: if the model is not around a torch module.
        FileNotFoundError: if there is nothing to resume, or no folder for the checkpoint.
        FileExistsError: if there is a checkpoint, and nothing says to resume it.
        FloatingPointError: if a loss, gradient or weight is no longer finite; the last checkpoint stays.
    """
    network = model.network
    if not isinstance(network, nn.Module):
        raise TypeError(f"model must be around a torch module to be trained; its network is {network!r}.")
    if adversary is not None and config.objective != "denoising":
        raise ValueError(f"an adversary needs objective='denoising'; got {config.objective!r}.")
    batches = Batches(model, images, labels, config)
    rules = {"loss": Rule.of("score network", network, config)}
    settings = {**dataclasses.asdict(config), **batches.describe()}
    if adversary is not None:
        rules["discriminator"] = Rule("discriminator", adversary.network, adversary.optimizer())
        settings["adversary"] = adversary.settings()
    looks = adversary is not None and images.ndim == 4

    def losses(step: int) -> Losses:
        if adversary is not None:
            for turn in range(1, adversary.steps + 1):
                batch, generator = batches.draw(step, turn)
                with batches.precision(model.device):
                    loss = adversary.discriminator_loss(model, *batch, generator)
                yield "discriminator", loss
            if looks:
                yield "gini", adversary.attention(batch[0][: max(1, 16 // batches.size)])
        batch, generator = batches.draw(step)
        with batches.precision(model.device):
            if adversary is None:
                loss = score_loss(config.objective, model, batch, generator).mean()
            else:
                loss = adversary.score_loss(model, *batch, generator)
        yield "loss", loss

    noted, simultaneous = ("gini",) if looks else (), adversary is not None and adversary.updates == "simultaneous"
    common = (config, settings, checkpoint, resume, save_every, callback)
    return run(network, rules, losses, *common, noted, simultaneous=simultaneous)


_ADVICE = "A smaller learning_rate may help; what was saved before is as it was."
Losses = Iterator[tuple[str, Tensor]]
"""Losses of one step in turn, by name; each is made after the one before has been descended, unless updates are
simultaneous. A name without a rule is a number to be noted."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a loss is descended.

    Attributes:
        what: the network's name in messages.
        network: whose weights.
        optimizer: of these.
        grad_clip: largest norm of the gradient.
        scheduled: whether the weights are part of the network that is averaged, and the learning rate is that of
            `TrainConfig.learning_rate_at`; else it stays, and a checkpoint holds this network besides.
    """

    what: str
    network: nn.Module
    optimizer: torch.optim.Optimizer
    grad_clip: float = math.inf
    scheduled: bool = False

    @classmethod
    def of(cls, what: str, network: nn.Module, config: TrainConfig) -> Rule:
        """Adam as the settings have it."""
        optimizer = Adam(network.parameters(), config.learning_rate, config.betas)
        return cls(what, network, optimizer, config.grad_clip, scheduled=True)


def run(
    network: nn.Module,
    rules: dict[str, Rule],
    losses: Callable[[int], Losses],
    config: TrainConfig,
    settings: dict[str, Any],
    checkpoint: Path,
    resume: bool,
    save_every: int,
    callback: Callable[[int, History, nn.Module], None] | None,
    noted: Sequence[str] = (),
    *,
    simultaneous: bool = False,
) -> nn.Module:
    """The loop: any losses, each a function of the step. Returns the averaged copy of the network; errors as `train`.

    Args:
        network: what is averaged.
        rules: by names of losses; "loss" is among them, and every step yields it.
        losses: of the step from 0.
        config, checkpoint, resume, save_every, callback: as for `train`.
        settings: what a checkpoint must agree on.
        noted: names of the numbers among the losses that have no rule.
        simultaneous: whether weights move after all losses of a step, rather than after each.
    """
    checkpoint = Path(checkpoint)
    check_count("save_every", save_every, 1)
    if checkpoint.is_dir() or not checkpoint.parent.is_dir():
        raise FileNotFoundError(f"checkpoint must be a file in a folder that exists; got {checkpoint}.")
    if checkpoint.is_file() and not resume:
        raise FileExistsError(f"{checkpoint} exists; resume=True goes on from it, or name another file.")
    ema = ema_model(network, config.ema_decay)
    modules: dict[str, nn.Module] = {"network": network, "ema": ema}
    modules |= {name: rule.network for name, rule in rules.items() if not rule.scheduled}
    optimizers = {"adam" if name == "loss" else f"{name}_adam": rule.optimizer for name, rule in rules.items()}
    history: History = {name: [] for name in (*rules, *noted)}
    settings = as_json(settings)
    if resume:
        history = load_checkpoint(checkpoint, modules, optimizers, settings, list(history))
    first, leads = len(history["loss"]), rank_and_size()[0] == 0
    if resume and leads and callback is not None:
        callback(first, history, ema.module)  # what the interruption may have cost
    shown = None if leads else True  # in a terminal only, and once
    bar = tqdm(range(first, config.steps), "train", config.steps, initial=first, unit="step", disable=shown)
    for step in bar:
        for rule in rules.values():
            for group in rule.optimizer.param_groups if rule.scheduled else ():
                group["lr"] = config.learning_rate_at(step)
        found = {}
        for name, loss in losses(step):
            if name not in rules:
                found[name] = float(averaged([loss.detach()])[0])
                continue
            found[name] = _slope(rules[name], loss, step)
            if not simultaneous:
                rules[name].optimizer.step()
        for rule in rules.values() if simultaneous else ():
            rule.optimizer.step()
        ema.update_parameters(network)
        for name, values in history.items():
            values.append(found[name])
        bar.set_postfix({name: f"{sum(last) / len(last):.4f}" for name, v in history.items() if (last := v[-50:])})
        if (step + 1) % save_every == 0 or step + 1 == config.steps:
            _check_weights(modules, step)
            if leads:
                save_checkpoint(checkpoint, modules, optimizers, settings, history)
            if leads and callback is not None:
                callback(step + 1, history, ema.module)
    return ema.module


def score_loss(objective: str, model: ScoreModel, batch: Batch, generator: torch.Generator) -> Coef:
    """The loss of an objective of `TrainConfig`, with shape (B,); the directions of slices are signs."""
    if objective == "denoising":
        return dsm_loss(model, *batch)
    x_0 = batch[0]
    signs = torch.randint(2, x_0.shape, generator=generator).to(x_0) * 2 - 1
    return noisy_score_loss(model, *batch, directions=signs if objective == "sliced" else None)


def averaged(parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """Tensors averaged over the processes, in place."""
    size = rank_and_size()[1]
    for part in parts if size > 1 else ():
        torch.distributed.all_reduce(part)
        part /= size
    return parts


def _slope(rule: Rule, loss: Tensor, step: int) -> float:
    """Puts the gradient, averaged over processes, on the parameters; the loss, averaged too. Both must be finite."""
    rule.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    value = loss.detach().clone()
    averaged([value, *(p.grad for p in rule.network.parameters() if p.grad is not None)])
    norm = nn.utils.clip_grad_norm_(rule.network.parameters(), rule.grad_clip)
    if not (torch.isfinite(value) and torch.isfinite(norm)):
        what = f"the loss is {float(value)} and its gradient's norm {float(norm)}"
        raise FloatingPointError(f"{rule.what} at step {step}: {what}. {_ADVICE}")
    return float(value)


def _check_weights(modules: dict[str, nn.Module], step: int) -> None:
    for name, module in modules.items():
        for key, weight in module.state_dict().items():
            if not torch.isfinite(weight).all():
                raise FloatingPointError(f"{name} at step {step}: {key} is not finite and was not saved. {_ADVICE}")


@torch.no_grad()
def held_out_loss(model: ScoreModel, images: Tensor, labels: Tensor | None, batch_size: int = 250) -> float:
    """Mean denoising loss over images not trained on, with fixed times and noise, so that networks can be compared.

    Args:
        model, images, labels: as for `train`.
        batch_size: images evaluated at a time; the result depends on it through the draws.
    """
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for rows in tqdm(torch.arange(len(images)).split(batch_size), desc="evaluate", unit="batch"):
        t = stratified_times(model.sde, len(rows), generator)
        noise = torch.randn(rows.shape + images.shape[1:], generator=generator)
        chosen = None if labels is None else labels[rows]
        x_0, t, noise, cond = on_device(model, images[rows], chosen, t, noise)
        total += float(dsm_loss(model, x_0, t, noise, cond).double().sum())
    return total / len(images)
