"""Solvers that may take tokens back: ReMDM and Token-Critic."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from fastsde.checks import check_instance, check_number
from fastsde.control import Grid
from fastsde.noise import StepNoise
from fastsde.solvers.base import Step
from fastsde.tokens.drawing import first
from fastsde.tokens.model import BoundTokens, Critic, TokenModel
from fastsde.tokens.process import MASK, Masking
from fastsde.tokens.solver import COINS, SCORES, VALUES, TokenSolver, predicted, written
from fastsde.tokens.unmask import left_masked
from fastsde.types import Carry, Time, Tokens


class Remasking(ABC):
    """How often a token is masked again: sigma, between 0 and sigma_max = min(1, (1 - alpha_s) / alpha_t)."""

    looped: bool = False
    """Whether it has a path of its own, on which the engine's clock runs uniformly."""

    def alpha(self, t: Time) -> Time:
        """The share of known tokens at times of the engine's clock, with shape (B,)."""
        return 1 - t

    @abstractmethod
    def sigma(self, most: Time, t: Time, psi: Tensor, known: Tensor) -> Tensor:
        """sigma of each position, with shape (B, L) or (B, 1), from `most` = sigma_max with shape (B,).

        Args:
            most: sigma_max, with shape (B,).
            t: the engine's clock, with shape (B,).
            psi: probability of each known token when it was with shape (B, L).
            known: which positions hold a token and are free, with shape (B, L).
        """


@dataclasses.dataclass(frozen=True)
class Cap(Remasking):
    """sigma = min(eta, sigma_max).

    Raises:
        ValueError: if `eta` is outside [0, 1].
    """

    eta: float = 0.04

    def __post_init__(self) -> None:
        check_number("eta", self.eta, 0.0, 1.0)

    def sigma(self, most: Time, t: Time, psi: Tensor, known: Tensor) -> Tensor:
        return most.clamp(max=self.eta)[:, None]


@dataclasses.dataclass(frozen=True)
class Rescale(Remasking):
    """sigma = eta sigma_max.

    Raises:
        ValueError: if `eta` is outside [0, 1].
    """

    eta: float = 0.015

    def __post_init__(self) -> None:
        check_number("eta", self.eta, 0.0, 1.0)

    def sigma(self, most: Time, t: Time, psi: Tensor, known: Tensor) -> Tensor:
        return self.eta * most[:, None]


@dataclasses.dataclass(frozen=True)
class ByConfidence(Remasking):
    """sigma_l = sigma_max softmax_l(-psi_l) over known tokens, psi the probability each had when it was drawn.

    The sum over positions is sigma_max: about one token a step is taken back at most. sigma is 0 at masks, as
    published, so that a little fewer tokens are known on the way than with the other rules.
    """

    def sigma(self, most: Time, t: Time, psi: Tensor, known: Tensor) -> Tensor:
        weight = torch.where(known, torch.exp(-psi), 0.0)
        return most[:, None] * weight / weight.sum(1, keepdim=True).clamp(min=1e-300)


@dataclasses.dataclass(frozen=True)
class Loop(Remasking):
    """Unmasking to a share alpha of known tokens, a loop of masking and drawing there, and unmasking to the end.

    The engine's clock t falls uniformly; alpha rises linearly to `alpha` until t = `on`, stays, and rises linearly to 1
    from t = `off`. In the loop sigma = eta.

    Raises:
        ValueError: if a number is out of range.
    """

    eta: float = 0.02
    on: float = 0.55
    off: float = 0.05
    level: float = 0.9

    looped = True

    def __post_init__(self) -> None:
        check_number("eta", self.eta, 0.0, 1.0)
        check_number("on", self.on, 0.0, 1.0, ends="()")
        check_number("off", self.off, 0.0, self.on, ends="()")
        check_number("level", self.level, 0.0, 1.0, ends="()")

    def alpha(self, t: Time) -> Time:
        rising = (1 - t) * self.level / (1 - self.on)
        ending = 1 - t * (1 - self.level) / self.off
        return torch.where(t > self.on, rising, torch.where(t > self.off, self.level, ending))

    def sigma(self, most: Time, t: Time, psi: Tensor, known: Tensor) -> Tensor:
        inside = (t > self.off) & (t <= self.on)
        return torch.where(inside, most.clamp(max=self.eta), 0.0)[:, None]


@dataclasses.dataclass(frozen=True)
class ReMDM(TokenSolver):
    r"""Ancestral sampling that masks known tokens again: with alpha = 1 - t the share of known tokens,

        a known token becomes a mask with chance sigma,
        a masked one is drawn with chance (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t).

    For any sigma up to min(1, (1 - alpha_s) / alpha_t) the marginals are those of `Ancestral`, so the same networks
    serve; errors made early can be repaired. sigma = 0 is `Ancestral` with coins of its own. Source: Wang et al.,
    https://arxiv.org/abs/2503.00307, eq. 9 and sec. 4.

    Args:
        rule: `Cap`, `Rescale`, `ByConfidence` or `Loop`.
        steps: of the grid; or give `nfe` to `sample`.
        temperature: as for `Unmask`.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    convergence = "1"
    use = "repairs early errors where there are many calls"
    exact = "in the limit of many steps"
    remasks = True

    rule: Remasking = dataclasses.field(default_factory=Cap)
    steps: int | None = None
    temperature: float | tuple[float, float] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_instance("rule", self.rule, Remasking, "Cap, Rescale, ByConfidence or Loop")

    def grid(self, process: Masking, steps: int) -> Grid:
        return Grid(torch.linspace(1, 0, steps + 1, dtype=torch.float64)) if self.rule.looped else process.grid(steps)

    def init(self, x_t: Tokens) -> Carry:
        carry = super().init(x_t)
        return carry | {"psi": torch.zeros(carry["free"].shape, dtype=torch.float64, device=x_t.device)}

    def move(
        self, model: BoundTokens, process: Masking, x: Tokens, t: Time, s: Time, noise: StepNoise, carry: Carry
    ) -> Step:
        masked = (x == MASK).flatten(1) & carry["free"]
        known = carry["free"] & ~masked
        before, after = self.rule.alpha(t), self.rule.alpha(s)
        most = ((1 - after) / before.clamp(min=1e-300)).clamp(0, 1)
        sigma = self.rule.sigma(most, t, carry["psi"], known)
        chance = (after[:, None] - (1 - sigma) * before[:, None]) / (1 - before).clamp(min=1e-300)[:, None]
        coin = noise.uniform(COINS).flatten(1)
        # At the end there is no chance about it.
        drawn_now = masked & ((coin < chance) | (s <= 0)[:, None])
        taken_back = known & (coin < sigma) & (s > 0)[:, None]
        used, failed, at = predicted(model, x, carry, drawn_now)
        values, log_p = self.drawn(used, at, noise.uniform(VALUES), 1 - process.time(s))
        psi = carry["psi"].masked_scatter(at, log_p.exp()).masked_fill(taken_back, 0.0)
        x = written(x, at, values).flatten(1).masked_fill(taken_back, MASK).reshape(x.shape)
        return Step(x, {**carry, "psi": psi}, s=s.masked_fill(failed, torch.nan))


@dataclasses.dataclass(frozen=True)
class TokenCritic(TokenSolver):
    r"""All masks are filled, and a critic says which tokens stay: of n free ones the floor(n s) with the lowest scores
    become masks again, old ones too.

        score_l = critic(x)_l + scale r' u_l,    u uniform in (0, 1), r' falls from 1 to 0 over the run

    A step costs a call of the model and one of the critic; the last needs none of the critic. Source: Lezama et al.,
    https://arxiv.org/abs/2209.04439, alg. 1. The paper does not say whether its scores are logits or probabilities;
    these are logits.

    Args:
        critic: the critic.
        steps: of the process's own grid; or give `nfe` or a `Grid` to `sample`.
        scale: of the noise beside the critic's logits.
        temperature: as for `Unmask`; the paper's falls linearly.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    convergence = "none proved"
    cost = "2: the model and the critic"
    use = "a trained critic is at hand"
    exact = "no"
    calls_per_step = 2

    critic: Critic | None = None
    steps: int | None = None
    scale: float = 1.0
    temperature: float | tuple[float, float] = 1.0

    def __post_init__(self) -> None:
        check_instance("critic", self.critic, Critic, "a fastsde.tokens.Critic")
        super().__post_init__()
        check_number("scale", self.scale, 0.0, ends="[)")

    def check_model(self, model: Any) -> None:
        super().check_model(model)
        theirs, ours = model.event_shape, self.critic.event_shape  # type: ignore[union-attr] # it was checked
        if theirs is not None and ours is not None and theirs != ours:
            raise ValueError(f"the critic is for tokens of shape {ours}, the model for {theirs}.")

    def grid_steps(self, model: TokenModel, nfe: int) -> int:
        own = self.critic.calls  # type: ignore[union-attr] # it was checked
        return (nfe + own) // (model.calls + own)

    def move(
        self, model: BoundTokens, process: Masking, x: Tokens, t: Time, s: Time, noise: StepNoise, carry: Carry
    ) -> Step:
        masked, free = (x == MASK).flatten(1) & carry["free"], carry["free"].sum(1)
        used, failed, at = predicted(model, x, carry, masked)
        progress = 1 - process.time(s)
        values, _ = self.drawn(used, at, noise.uniform(VALUES), progress)
        completed = written(x, at, values)
        back = left_masked(free, free, s)
        ids, said = model.ask(self.critic, completed, (back > 0) & ~failed)  # type: ignore[arg-type]
        score = torch.zeros(masked.shape, dtype=torch.float64, device=x.device)
        score[ids] = said.double()
        failed = failed | torch.isnan(score).any(1)
        score = score + self.scale * (1 - progress)[:, None] * noise.uniform(SCORES).flatten(1)
        again = first(score.nan_to_num(0.0), carry["free"], back)
        x = completed.flatten(1).masked_fill(again, MASK).reshape(x.shape)
        return Step(x, carry, s=s.masked_fill(failed, torch.nan))
