"""Training of masked-token networks and of critics: their losses, in the loop of score networks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from fastsde.checks import check_flags
from fastsde.tokens.drawing import draw
from fastsde.tokens.model import Critic, TokenModel
from fastsde.tokens.process import MASK
from fastsde.training.batches import Rows
from fastsde.training.checkpoint import History
from fastsde.training.config import TrainConfig
from fastsde.training.loop import Losses, Rule, run
from fastsde.types import Coef, Cond, Time, Tokens


def masked_loss(
    model: TokenModel, x_0: Tokens, t: Time, uniform: Tensor, cond: Cond | None = None, *, weighted: bool = True
) -> Coef:
    r"""Cross-entropy of the masked tokens, one value per row.

        loss = w(t) sum over masked l of -log p(x_l | x_t),    w(t) = share'(t) / share(t)

    For t uniform in (0, 1), its mean is an upper bound of -log p(x_0) in nats, the same for every schedule; with exact
    conditionals it is the entropy of the data. Without the weight it is MaskGIT's loss, up to a constant. Source: Sahoo
    et al., https://arxiv.org/abs/2406.07524, eq. 10; Chang et al., https://arxiv.org/abs/2202.04200, eq. 3.

    Args:
        model: the token model being trained.
        x_0: data, with shape (B, *event).
        t: times of the schedule in (0, 1), with shape (B,).
        uniform: in (0, 1), with shape (B, *event): they choose the masks.
        cond: keyword arguments of the network, each with leading axis B.
        weighted: whether to weight by w(t).

    Returns:
        With shape (B,).
    """
    x_t = model.process.mask(x_0, t, uniform)
    masked = (x_t == MASK).flatten(1)
    logits = model(x_t, masked.double().mean(1), cond)
    each = cross_entropy(logits.transpose(1, 2), x_0.flatten(1), reduction="none").masked_fill(~masked, 0.0)
    loss = each.sum(1)
    return loss * model.process.weight(t).to(loss.dtype) if weighted else loss


def critic_loss(
    critic: Critic, model: TokenModel, x_0: Tokens, t: Time, uniform: Tensor, fill: Tensor, cond: Cond | None = None
) -> Coef:
    r"""Binary cross-entropy of a critic for which tokens are original, one value per row.

        x = x_0 at kept places, a draw of the model elsewhere;    loss = -sum over l of log p(kept_l | x)

    The model is not trained. Source: Lezama et al., https://arxiv.org/abs/2209.04439, eq. 6 of the supplement.

    Args:
        critic, model: the critic being trained, and the token model.
        x_0, t, uniform, cond: as for `masked_loss`.
        fill: uniforms in (0, 1), float64 with shape (B, *event), for the model's draws.

    Returns:
        With shape (B,).
    """
    x_t = model.process.mask(x_0, t, uniform)
    masked = x_t == MASK
    with torch.no_grad():
        logits = model(x_t, masked.flatten(1).double().mean(1), cond)
        values, _ = draw(logits[masked.flatten(1)], fill[masked])
        completed = x_t.masked_scatter(masked, values)
    said = critic(completed, cond)
    return binary_cross_entropy_with_logits(said, (~masked).flatten(1).to(said), reduction="none").sum(1)


def train_tokens(
    model: TokenModel,
    tokens: Tokens,
    labels: Tensor | None,
    config: TrainConfig,
    checkpoint: Path,
    *,
    critic: Critic | None = None,
    weighted: bool = True,
    resume: bool = False,
    save_every: int = 250,
    callback: Callable[[int, History, nn.Module], None] | None = None,
) -> nn.Module:
    """Trains `model.network` in place, or the critic's while the model stays; returns the averaged copy.

    Args:
        model: token model around a torch module.
        tokens: int64 with shape (N, *event).
        labels: int64 classes with shape (N,), passed as `class_labels`; the largest is followed by "no label".
        config: the settings; `levels` and `objective` are not used.
        critic: what to train in place of the model.
        weighted: as for `masked_loss`.
        checkpoint, resume, save_every, callback: as for `train`.

    Raises:
        ValueError: if the tokens are out of the model's range; also as `train`, like other errors.
    """
    trained = model if critic is None else critic
    network = trained.network
    if not isinstance(network, nn.Module):
        raise TypeError(f"{trained.role} must be a torch module to be trained; got {network!r}.")
    check_flags(weighted=weighted, resume=resume)
    if tokens.dtype != torch.int64 or int(tokens.min()) < 0 or int(tokens.max()) >= model.vocabulary:
        raise ValueError(
            f"tokens must be int64 from 0 to {model.vocabulary - 1}; got {tokens.dtype} from {int(tokens.min())} to "
            f"{int(tokens.max())}."
        )
    batches, device = Rows(tokens, labels, config, tokens=True), trained.device
    settings = {**dataclasses.asdict(config), **batches.describe(), "trained": trained.role}
    settings |= {"process": repr(model.process), "weighted": weighted}

    def losses(step: int) -> Losses:
        rows, generator = batches.rows(step)
        # One time in each cell of (0, 1): less variance, the same mean.
        offset = torch.rand((), generator=generator, dtype=torch.float64)
        t = (torch.arange(len(rows), dtype=torch.float64) + offset) / len(rows)
        uniform, fill = torch.rand((2, len(rows), *tokens.shape[1:]), generator=generator, dtype=torch.float64)
        chosen = batches.labels_of(rows, generator)
        own = batches.own
        x_0, t, uniform, fill = (part[own].to(device) for part in (tokens[rows], t, uniform, fill))
        cond = {} if chosen is None else {"class_labels": chosen[own].to(device)}
        with batches.precision(device):
            if critic is None:
                loss = masked_loss(model, x_0, t, uniform, cond, weighted=weighted)
            else:
                loss = critic_loss(critic, model, x_0, t, uniform, fill, cond)
        yield "loss", loss.mean() / math.prod(x_0.shape[1:])

    rules = {"loss": Rule.of(trained.role, network, config)}
    return run(network, rules, losses, config, settings, checkpoint, resume, save_every, callback)
