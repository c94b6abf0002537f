r"""Adversarial score matching: a discriminator judges the expected denoised samples."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastsde.checks import check_choice, check_count, check_number
from fastsde.score.base import ScoreModel
from fastsde.score.network import evaluation_mode
from fastsde.training.config import check_betas
from fastsde.training.gan_losses import GANLoss, gradient_penalty, lsgan, paired, plain
from fastsde.training.masking import Masking, attention_gini
from fastsde.types import Cond, State, Time

UPDATES = ("alternating", "simultaneous")
"""When the discriminator and the score network move."""


class Adam(torch.optim.Adam):
    """torch's Adam, with a first momentum that may be negative: in (-1, 1).

    Its formulas hold there as they are: m <- beta_1 m + (1 - beta_1) g, corrected by 1 - beta_1^k. torch only refuses
    the argument. For negative momentum in games see Gidel et al., https://arxiv.org/abs/1807.04740.

    Args:
        params, lr: parameters or groups, and the learning rate.
        betas: beta_1 in (-1, 1), beta_2 in [0, 1).

    Raises:
        ValueError: if a beta is out of range.
    """

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        betas = check_betas(betas)
        super().__init__(params, lr=lr, betas=(max(betas[0], 0.0), betas[1]))
        for group in (*self.param_groups, self.defaults):
            group["betas"] = betas


@contextlib.contextmanager
def frozen(part: nn.Module) -> Iterator[None]:
    """Keeps gradients from a part's weights, but not from what goes through it."""
    moving = [p for p in part.parameters() if p.requires_grad]
    for p in moving:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in moving:
            p.requires_grad_(True)


@dataclasses.dataclass(frozen=True)
class Adversary:
    r"""A discriminator D, and how it is trained with the score network.

        D:     min  E f_1(D(x_0)) + E f_2(D(H(x_t)))                      (n_D updates before each of the score network)
        score: min  E g_2(D(H(x_t))) + lambda / 2 E |sigma score + eps|^2

    H = E[x_0 | x_t] being the expected denoised sample. The last norm is a sum over elements. Source:
    Jolicoeur-Martineau et al., https://arxiv.org/abs/2009.05475, sec. 5; thesis, eqs. 8.4 (which prints max for min) to
    8.6. The plain generator's part of real data, g_1, has no gradient and is left out, as in eq. 8.5.

    A relativistic comparison wants independent pairs (eqs. 4.7 to 4.12), and H(x_t) is made of its x_0: so the sample
    of a row is compared with the denoised one of the row before, as it is for the points of the gradient penalty.

    Attributes:
        discriminator: from (B, *event), in the range of the data, to (B,).
        loss: the GAN loss; least squares is the published one.
        weight: lambda.
        steps: n_D.
        learning_rate: of the discriminator, constant.
        betas: of its Adam; the published ones. For the score network they are (0, 0.9): `TrainConfig(betas=...)`.
        penalty: lambda of the gradient penalty, added to D's loss; 10 is the published one for `wgan`.
        masking: masks on what D sees, real and fake; or None.
        score_masking: other masks in the score network's turn; a larger share slows it down, as its gradient through D
            is scaled by what is seen (supplement, eq. 29). `masking` where None.
        updates: "alternating", D first; or "simultaneous": both gradients are taken at the same parameters, and then
            both networks step, for which n_D must be 1.
        spectral_discriminator: a second D. It sees the spectral masks alone, and `discriminator` the spatial ones alone
            (supplement, D.2). The losses are means over both.

    Raises:
        ValueError: naming the attribute out of range.
    """

    discriminator: nn.Module
    loss: GANLoss = dataclasses.field(default_factory=lsgan)
    weight: float = 1.0
    steps: int = 1
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (-0.5, 0.9)
    penalty: float = 0.0
    masking: Masking | None = None
    score_masking: Masking | None = None
    updates: str = "alternating"
    spectral_discriminator: nn.Module | None = None

    def __post_init__(self) -> None:
        check_count("steps", self.steps, 1)
        for name in ("weight", "penalty"):
            check_number(name, getattr(self, name), 0.0, ends="[)")
        check_number("learning_rate", self.learning_rate, 0.0, ends="()")
        check_betas(self.betas)
        check_choice("updates", self.updates, UPDATES)
        if self.updates == "simultaneous" and self.steps != 1:
            raise ValueError(f"steps must be 1 for simultaneous updates; got {self.steps}.")
        if self.spectral_discriminator is not None and self.masking is None:
            raise ValueError("spectral_discriminator needs masking, of which it sees the spectral part; got None.")

    @property
    def network(self) -> nn.Module:
        """The discriminator, or both."""
        if self.spectral_discriminator is None:
            return self.discriminator
        return nn.ModuleList([self.discriminator, self.spectral_discriminator])

    def settings(self) -> dict[str, Any]:
        """What a checkpoint must agree on: numbers, and the loss at a few points, as functions have no name."""
        u = torch.tensor([-0.7, 0.3, 1.9], dtype=torch.float64)
        loss = [round(float(part(u, u.flip(0) / 2)), 12) for part in (self.loss.discriminator, self.loss.generator)]
        masks = {name: getattr(self, name) for name in ("masking", "score_masking")}
        return {
            **{name: getattr(self, name) for name in ("weight", "learning_rate", "penalty", "updates")},
            **{name: mask and dataclasses.asdict(mask) for name, mask in masks.items()},
            "n_D": self.steps,
            "betas": list(self.betas),
            "loss": loss,
        }

    def optimizer(self) -> Adam:
        """Adam on the discriminator's parameters."""
        return Adam(self.network.parameters(), self.learning_rate, self.betas)

    def discriminator_loss(
        self,
        model: ScoreModel,
        x_0: State,
        t: Time,
        noise: State,
        cond: Cond | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """L_D, a scalar, on data x_0 with shape (B, *event), times t (B,) and noise (B, *event).

        `generator` draws masks and the points of the gradient penalty, and is needed with those only.
        """
        with torch.no_grad():
            denoised = self._of_others(model(model.sde.marginal(x_0, t, noise), t, cond).x_0)
        losses = []
        for judge, masking in self._judges(self.masking):
            real, fake = (_seen(masking, x, x_0, generator) for x in (x_0, denoised))
            loss = self.loss.discriminator(_judged(judge, real), _judged(judge, fake))
            if self.penalty > 0:
                mix = torch.rand(len(real), generator=_needed(generator)).to(real)
                loss = loss + self.penalty * gradient_penalty(judge, real, fake, mix)
            losses.append(loss)
        return torch.stack(losses).mean()

    def score_loss(
        self,
        model: ScoreModel,
        x_0: State,
        t: Time,
        noise: State,
        cond: Cond | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The score network's loss, a scalar; the discriminator gets no gradient."""
        prediction = model(model.sde.marginal(x_0, t, noise), t, cond)
        matching = (prediction.epsilon - noise).square().flatten(1).sum(1).mean()
        losses = []
        with frozen(self.network):
            for judge, masking in self._judges(self.score_masking or self.masking):
                fake = _judged(judge, _seen(masking, self._of_others(prediction.x_0), x_0, generator))
                if self.loss.compare is plain:
                    losses.append(self.loss.g_2(fake).mean())
                else:
                    losses.append(self.loss.generator(_judged(judge, _seen(masking, x_0, x_0, generator)), fake))
        return torch.stack(losses).mean() + 0.5 * self.weight * matching

    def attention(self, images: State) -> Tensor:
        """Mean Gini coefficient of where D looks (`attention_gini`), a scalar, on whole images with shape (B, C, H, W).

        It leaves no trace: the vectors of spectral norm stay as they are.
        """
        with evaluation_mode(self.network):
            return torch.stack([attention_gini(judge, images).mean() for judge, _ in self._judges(None)]).mean()

    def _judges(self, masking: Masking | None) -> Iterator[tuple[nn.Module, Masking | None]]:
        """Each discriminator with its masks."""
        if self.spectral_discriminator is None:
            yield self.discriminator, masking
        else:
            yield self.discriminator, masking and dataclasses.replace(masking, spectrum=0.0)
            yield self.spectral_discriminator, masking and dataclasses.replace(masking, space=0.0)

    def _of_others(self, denoised: State) -> State:
        """The denoised sample of another row, whose data is an independent draw."""
        if len(denoised) == 1 and self.loss.compare is paired:
            raise ValueError("a paired comparison needs a batch of at least 2 on each process; got 1.")
        return denoised.roll(1, 0)


def _judged(judge: nn.Module, x: State) -> Tensor:
    value: Tensor = judge(x)
    if value.shape != x.shape[:1]:
        raise ValueError(f"discriminator must give one number a row, ({len(x)},); it gave {tuple(value.shape)}.")
    return value


def _seen(masking: Masking | None, x: State, x_0: State, generator: torch.Generator | None) -> State:
    """What D sees of x, with shape (B, *event), among data x_0."""
    return x if masking is None else masking(x, x_0, _needed(generator))


def _needed(generator: torch.Generator | None) -> torch.Generator:
    if generator is None:
        raise TypeError("generator is needed: masks and the gradient penalty are drawn.")
    return generator
