r"""Autoencoders whose encoder judges what the decoder makes: plain, introspective and soft introspective.

An encoder gives mean and log-variance of a Gaussian, z = mean + exp(logvar / 2) eps, and a decoder gives images. The
prior is N(0, I), x_r = Dec(z) a reconstruction and x_p = Dec(z_p) a sample, z_p from the prior. Sources: Huang et al.,
"IntroVAE", https://arxiv.org/abs/1807.06358, whose eq. 9 prints the divergence with the wrong sign; Daniel and Tamar,
"Soft-IntroVAE", https://arxiv.org/abs/2012.13253.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsde.checks import check_count, check_number
from fastsde.score.network import tensor_of
from fastsde.training.adversarial import frozen
from fastsde.training.batches import Rows, in_unit_range
from fastsde.training.checkpoint import History
from fastsde.training.config import TrainConfig
from fastsde.training.loop import Losses, Rule, run
from fastsde.types import Coef, Latent, State

LEAST_LOGVAR, MOST_LOGVAR = -30.0, 20.0
"""Where log-variances are cut, as diffusers does, so that no exponential is infinite."""


def posterior(network: nn.Module, x: State) -> tuple[Latent, Latent]:
    """Mean and log-variance of z given x.

    Args:
        network: whose `encode` returns the pair, or an object with a `latent_dist` that has both, as diffusers'
            AutoencoderKL does.
        x: with shape (B, *event).

    Raises:
        ValueError: if mean and log-variance differ in shape, or are not B of them.
    """
    found: Any = network.encode(x)  # type: ignore[operator] # a method, not a module
    found = getattr(found, "latent_dist", found)
    mean, logvar = found if isinstance(found, tuple) else (found.mean, found.logvar)
    if mean.shape != logvar.shape or len(mean) != len(x):
        raise ValueError(
            f"encode must give mean and log-variance of one shape, for {len(x)} rows; got {tuple(mean.shape)} and "
            f"{tuple(logvar.shape)}."
        )
    return _single(mean), _single(logvar).clamp(LEAST_LOGVAR, MOST_LOGVAR)


def decoded(network: nn.Module, z: Latent) -> State:
    """Dec(z), with shape (B, *event); `decode` of the network returns it, or an object with it under `.sample`."""
    out: Any = tensor_of(network.decode(z))  # type: ignore[operator] # a method, not a module
    return _single(out)


def _single(x: Tensor) -> Tensor:
    """At least in single precision, in which losses are summed."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sides(network: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The encoder's modules and the decoder's.

    Raises:
        TypeError: if the network has no `encoder` and `decoder`.
    """
    pairs = (("encoder", "quant_conv"), ("decoder", "post_quant_conv"))
    found = [[part for name in names if (part := getattr(network, name, None)) is not None] for names in pairs]
    if not all(found):
        raise TypeError(f"an autoencoder needs modules encoder and decoder; {type(network).__name__} has not both.")
    return nn.ModuleList(found[0]), nn.ModuleList(found[1])


def divergence(mean: Latent, logvar: Latent) -> Coef:
    r"""KL(N(mean, sigma^2) || N(0, I)) = 1/2 sum (mean^2 + sigma^2 - 1 - log sigma^2) >= 0, with shape (B,)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)


def reconstruction(x: State, x_r: State) -> Coef:
    """1/2 |x_r - x|^2, a sum over elements, with shape (B,)."""
    return 0.5 * (x_r - x).square().flatten(1).sum(1)


@dataclasses.dataclass(frozen=True)
class Draw:
    """What a step needs beside the network.

    Attributes:
        x: data with shape (B, *event).
        z_p: draws from the prior, with the shape of latents.
        eps, eps_s: noise of the posteriors of x, and of what the decoder made.
    """

    x: State
    z_p: Latent
    eps: Latent
    eps_s: Latent


@dataclasses.dataclass(frozen=True)
class IntroVAE:
    r"""The introspective losses, descended in turn (eqs. 11 and 12):

        encoder:  KL(x) + alpha sum_{s in r, p} max(0, margin - KL(Enc(stop(x_s)))) + beta L_AE
        decoder:  alpha sum_{s in r, p} KL(Enc(x_s)) + beta L_AE

    L_AE = 1/2 |x_r - x|^2. The hinge is of each sample, as published; the official code takes it of the batch's mean,
    which is smaller where samples lie on both sides of the margin. With alpha = 0 the encoder and the decoder descend
    the plain VAE's loss KL + beta L_AE, whose decoder has the variance 1 / beta.

    Attributes:
        alpha: weight of the game; 0 for the plain VAE.
        margin: m, in nats: a little above the KL(x) that a plain VAE of the same beta reaches.
        beta: weight of the reconstruction.

    Raises:
        ValueError: naming the attribute out of range.
    """

    alpha: float = 0.25
    margin: float = 25.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, 0.0, ends="[)")
        check_number("margin", self.margin, 0.0, ends="[)")
        check_number("beta", self.beta, 0.0, ends="()")

    @property
    def plain(self) -> IntroVAE:
        """The plain VAE of the same weight."""
        return dataclasses.replace(self, alpha=0.0)

    def encoder(self, network: nn.Module, draw: Draw, mean: Latent, logvar: Latent) -> tuple[Tensor, dict[str, Coef]]:
        """L_E, a scalar, and each KL that it has, by name; z is made of `mean` and `logvar`, both of x."""
        x_r = decoded(network, _sampled(mean, logvar, draw.eps))
        kl = divergence(mean, logvar)
        loss = kl.mean() + self.beta * reconstruction(draw.x, x_r).mean()
        if self.alpha == 0:
            return loss, {"kl": kl}
        with torch.no_grad():
            x_p = decoded(network, draw.z_p)
        fake = [divergence(*posterior(network, x_s)) for x_s in (x_r.detach(), x_p)]
        hinge = sum(((self.margin - one).clamp(min=0).mean() for one in fake), torch.zeros_like(loss))
        return loss + self.alpha * hinge, {"kl": kl, "kl_reconstructed": fake[0], "kl_generated": fake[1]}

    def decoder(self, network: nn.Module, draw: Draw, z: Latent) -> Tensor:
        """L_G, a scalar; z is detached, so that x_r is a function of the decoder alone."""
        x_r = decoded(network, z)
        loss = self.beta * reconstruction(draw.x, x_r).mean()
        if self.alpha == 0:
            return loss
        fake = [divergence(*posterior(network, x_s)).mean() for x_s in (x_r, decoded(network, draw.z_p))]
        return loss + self.alpha * sum(fake, torch.zeros_like(loss))


@dataclasses.dataclass(frozen=True)
class SoftIntroVAE:
    r"""The soft introspective losses, without a margin; R = |x_r - x|^2, s = 1 / the number of elements of x:

        encoder:  s (beta_rec R(x) + beta_kl KL(x)) + 1/4 sum_{s in r, p} E exp(-2 s L_neg(x_s))
        decoder:  s (beta_rec R(x) + beta_kl / 2 sum_s KL(x_s) + gamma beta_rec / 2 sum_s R(x_s))
        L_neg = beta_rec R + beta_neg KL

    with the x_s stopped in the encoder's loss and, as targets of R, in the decoder's.

    Attributes:
        beta_rec, beta_kl: weights of reconstructions and of KL.
        beta_neg: weight of the KL of what the decoder made; if the loss is not finite, take a larger one.
        gamma: weight of the reconstruction of what the decoder made.

    Raises:
        ValueError: naming the attribute out of range.
    """

    beta_rec: float = 1.0
    beta_kl: float = 1.0
    beta_neg: float = 256.0
    gamma: float = 1e-8

    def __post_init__(self) -> None:
        for name in ("beta_rec", "beta_kl", "beta_neg"):
            check_number(name, getattr(self, name), 0.0, ends="()")
        check_number("gamma", self.gamma, 0.0, ends="[)")

    @property
    def plain(self) -> IntroVAE:
        """The plain VAE of the same weights."""
        return IntroVAE(alpha=0.0, beta=2 * self.beta_rec / self.beta_kl)

    def encoder(self, network: nn.Module, draw: Draw, mean: Latent, logvar: Latent) -> tuple[Tensor, dict[str, Coef]]:
        """The encoder's loss, a scalar, and each KL that it has; as for `IntroVAE`."""
        x_r = decoded(network, _sampled(mean, logvar, draw.eps))
        s, kl = 1 / math.prod(draw.x.shape[1:]), divergence(mean, logvar)
        loss = s * (self.beta_rec * 2 * reconstruction(draw.x, x_r) + self.beta_kl * kl).mean()
        with torch.no_grad():
            x_p = decoded(network, draw.z_p)
        found = {"kl": kl}
        for name, x_s in (("kl_reconstructed", x_r.detach()), ("kl_generated", x_p)):
            moments = posterior(network, x_s)
            found[name] = divergence(*moments)
            again = 2 * reconstruction(x_s, decoded(network, _sampled(*moments, draw.eps_s)))
            loss = loss + 0.25 * (-2 * s * (self.beta_rec * again + self.beta_neg * found[name])).exp().mean()
        return loss, found

    def decoder(self, network: nn.Module, draw: Draw, z: Latent) -> Tensor:
        """The decoder's loss, a scalar; as for `IntroVAE`."""
        x_r = decoded(network, z)
        s = 1 / math.prod(draw.x.shape[1:])
        loss = self.beta_rec * 2 * reconstruction(draw.x, x_r)
        for x_s in (x_r, decoded(network, draw.z_p)):
            moments = posterior(network, x_s)
            z_s = _sampled(*moments, draw.eps_s).detach()
            again = 2 * reconstruction(x_s.detach(), decoded(network, z_s))
            loss = loss + 0.5 * (self.beta_kl * divergence(*moments) + self.gamma * self.beta_rec * again)
        return s * loss.mean()


def _sampled(mean: Latent, logvar: Latent, eps: Latent) -> Latent:
    return mean + (0.5 * logvar).exp() * eps


def train_autoencoder(
    network: nn.Module,
    images: Tensor,
    config: TrainConfig,
    checkpoint: Path,
    objective: IntroVAE | SoftIntroVAE,
    *,
    plain: int = 0,
    resume: bool = False,
    save_every: int = 250,
    callback: Callable[[int, History, nn.Module], None] | None = None,
) -> nn.Module:
    """Trains an autoencoder in place, and returns its averaged copy: encoder and decoder in turn, at each step.

    The decoder's step makes x_r again, of the detached z of the encoder's: the official code goes back through graphs
    of weights that have changed since. A plain VAE (alpha = 0) has one loss, and both descend it at once.

    Args:
        network: with `encode` and `decode` as for `posterior` and `decoded`, and modules `encoder` and `decoder` (and
            `quant_conv`, `post_quant_conv`). Its rows should not know each other: with batch normalisation the encoder
            can tell real and generated batches apart by their statistics.
        images, config, checkpoint, resume, save_every, callback: as for `loop.train`. The history has the losses as
            "encoder" and "loss" (the decoder's), and the mean KL of data, reconstructions and samples as "kl",
            "kl_reconstructed" and "kl_generated"; the latter two are NaN in steps of the plain VAE.
        objective: the losses.
        plain: steps of the plain VAE at first.

    Raises:
        ValueError, TypeError, OSError: as `loop.train`; also if the network has no `encoder` and `decoder`, gives other
            images than it takes, or latents of two shapes.
    """
    check_count("plain", plain, 0)
    rows, (encoder, decoder) = Rows(images, None, config), sides(network)
    device = next(network.parameters()).device
    latent = _latent_shape(network, in_unit_range(images[:1]).to(device))
    settings = {**dataclasses.asdict(config), **rows.describe(), "plain": plain}
    settings |= {"objective": type(objective).__name__, **dataclasses.asdict(objective)}
    together = isinstance(objective, IntroVAE) and objective.alpha == 0
    noted = ("kl",) if together else ("kl", "kl_reconstructed", "kl_generated")
    if together:
        rules = {"loss": Rule.of("autoencoder", network, config)}
    else:
        rules = {"encoder": Rule.of("encoder", encoder, config), "loss": Rule.of("decoder", decoder, config)}

    def losses(step: int) -> Losses:
        number, generator = rows.rows(step)
        z_p, eps, eps_s = torch.randn(3, len(number), *latent, generator=generator)[:, rows.own].to(device)
        draw = Draw(in_unit_range(images[number[rows.own]]).to(device), z_p, eps, eps_s)
        rule = objective.plain if step < plain else objective
        with rows.precision(device), contextlib.nullcontext() if together else frozen(decoder):
            mean, logvar = posterior(network, draw.x)
            loss, kl = rule.encoder(network, draw, mean, logvar)
        yield "loss" if together else "encoder", loss
        if not together:
            with rows.precision(device), frozen(encoder):
                loss = rule.decoder(network, draw, _sampled(mean, logvar, eps).detach())
            yield "loss", loss
        for name in noted:
            yield name, kl[name].mean() if name in kl else torch.tensor(math.nan)

    return run(network, rules, losses, config, settings, checkpoint, resume, save_every, callback, noted)


@torch.no_grad()
def _latent_shape(network: nn.Module, x: Tensor) -> torch.Size:
    """Of one row, after trying encoder and decoder on it."""
    mean, _ = posterior(network, x)
    x_r = decoded(network, mean)
    if x_r.shape != x.shape:
        raise ValueError(f"decode must give images as encode takes them, {tuple(x.shape)}; it gave {tuple(x_r.shape)}.")
    return mean.shape[1:]
