"""Ancestral sampling of masked tokens, on a grid or from event to event."""

from __future__ import annotations

import dataclasses

import torch

from fastsde.noise import StepNoise
from fastsde.solvers.base import Step
from fastsde.tokens.model import BoundTokens
from fastsde.tokens.process import MASK, Masking
from fastsde.tokens.solver import ORDER, VALUES, TokenSolver, predicted, written
from fastsde.types import Carry, Time, Tokens


@dataclasses.dataclass(frozen=True)
class Ancestral(TokenSolver):
    r"""The reverse process on a grid: from the share t to s a masked token is drawn with chance (t - s) / t.

    Position l has one uniform u_l for the whole run, and is drawn in the step with s <= u_l < t. That is the same law
    as a coin in each step. So it is known before a call which rows need one: of T linear steps a row of N tokens needs
    T (1 - (1 - 1/T)^N). Finer grids follow the same u_l, down to `FirstHitting`, which is their limit. The error is of
    order 1 / T. Source: Sahoo et al., https://arxiv.org/abs/2406.07524, eq. 6 and alg. 2.

    Args:
        steps: of the process's own grid; or give `nfe` or a `Grid` to `sample`.
        temperature: of the values; a pair falls linearly from the first to the last.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    convergence = "1"
    use = "MDLM's sampler; many steps"
    exact = "in the limit of many steps"

    steps: int | None = None
    temperature: float | tuple[float, float] = 1.0

    def move(
        self, model: BoundTokens, process: Masking, x: Tokens, t: Time, s: Time, noise: StepNoise, carry: Carry
    ) -> Step:
        u = noise.fixed_uniform(ORDER).flatten(1)
        now = (x == MASK).flatten(1) & carry["free"] & (u >= s[:, None])
        used, failed, at = predicted(model, x, carry, now)
        values, _ = self.drawn(used, at, noise.fixed_uniform(VALUES), 1 - process.time(s))
        return Step(written(x, at, values), carry, s=s.masked_fill(failed, torch.nan))


@dataclasses.dataclass(frozen=True)
class FirstHitting(TokenSolver):
    r"""From one event of the reverse process to the next: one token a call, in random order, N calls.

    With n tokens masked the next event is at s = t U^(1/n): here the largest u_l of the masked positions, and that
    position is drawn. With exact conditionals its law is that of the data. Source: Zheng et al., https://arxiv.org/abs/2409.02908.

    Args:
        temperature: as for `Ancestral`.

    Raises:
        ValueError: if it is negative or not finite.
    """

    convergence = "exact"
    cost = "1; N in all"
    use = "the reference for every other"
    exact = "yes"
    decides = True

    temperature: float | tuple[float, float] = 1.0

    def move(
        self, model: BoundTokens, process: Masking, x: Tokens, t: Time, s: Time, noise: StepNoise, carry: Carry
    ) -> Step:
        masked = (x == MASK).flatten(1) & carry["free"]
        u = noise.fixed_uniform(ORDER).flatten(1).masked_fill(~masked, -1.0)
        last, place = u.max(1)
        now = masked & (torch.arange(u.shape[1], device=u.device) == place[:, None])
        used, failed, at = predicted(model, x, carry, now)
        reached = last.clamp(min=0)
        values, _ = self.drawn(used, at, noise.fixed_uniform(VALUES), 1 - process.time(reached))
        return Step(written(x, at, values), carry, s=reached.masked_fill(failed, torch.nan))
