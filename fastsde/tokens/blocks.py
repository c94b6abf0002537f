"""Semi-autoregressive sampling: blocks from left to right."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from fastsde.checks import check_count
from fastsde.control import Grid
from fastsde.noise import StepNoise
from fastsde.solvers.base import Step
from fastsde.solvers.wrapped import of_inner
from fastsde.tokens.model import BoundTokens, TokenModel
from fastsde.tokens.process import MASK, Masking
from fastsde.tokens.solver import TokenSolver
from fastsde.tokens.unmask import Unmask
from fastsde.types import Carry, Time, Tokens


@dataclasses.dataclass(frozen=True)
class Blocks(TokenSolver):
    """Any other solver, in one block of positions after another. The network always sees everything.

    Blocks are counted from the first free position of each sample, so prompts may have any lengths. A grid gives each
    block as many steps. Source: Nie et al., https://arxiv.org/abs/2502.09992, sec. 2.4 and app. B.4.

    Args:
        inner: the solver within a block; its `steps` are those of a block.
        length: positions in a block.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    convergence = "that of the inner solver"
    cost = "that of the inner solver"
    use = "long texts: LLaDA, Dream"
    exact = "as the inner solver"
    calls_per_step = of_inner("calls_per_step")
    decides = of_inner("decides")
    reports = of_inner("reports")
    steps = of_inner("steps")

    inner: TokenSolver = dataclasses.field(default_factory=Unmask)
    length: int = 32

    def __post_init__(self) -> None:
        check_count("length", self.length, 1)
        if not isinstance(self.inner, TokenSolver) or isinstance(self.inner, Blocks) or self.inner.remasks:
            raise TypeError(
                f"inner must be a solver of tokens that takes none back, such as Unmask(); got {self.inner!r}."
            )

    def check_model(self, model: Any) -> None:
        super().check_model(model)
        self.inner.check_model(model)

    def within(self, rtol: float) -> TokenSolver:
        return dataclasses.replace(self, inner=self.inner.within(rtol))

    def grid_steps(self, model: TokenModel, nfe: int) -> int:
        return self.inner.grid_steps(model, nfe // self._count(model.event_shape))

    def grid(self, process: Masking, steps: int) -> Grid:
        # The number of blocks is known with the event: `block_grid`.
        return self.inner.grid(process, steps)

    def _count(self, shape: tuple[int, ...] | None) -> int:
        return math.ceil(math.prod(shape or (1,)) / self.length)

    def block_grid(self, grid: Grid, shape: tuple[int, ...]) -> Grid:
        """The grid of a block for every block, one after another."""
        count = self._count(shape)
        parts = [(grid.times[:-1] + (count - 1 - k)) / count for k in range(count)]
        return Grid(torch.cat([*parts, torch.zeros(1, dtype=torch.float64)]))

    def init(self, x_t: Tokens) -> Carry:
        return self.inner.init(x_t)

    def move(
        self, model: BoundTokens, process: Masking, x: Tokens, t: Time, s: Time, noise: StepNoise, carry: Carry
    ) -> Step:
        count, free = self._count(tuple(x.shape[1:])), carry["free"]
        block = torch.floor((1 - t) * count + 1e-9).clamp(max=count - 1)
        place = torch.arange(free.shape[1], device=x.device) - free.int().argmax(1)[:, None]
        inside = free & (place.div(self.length, rounding_mode="floor") == block[:, None])
        rest = count - 1 - block
        now, target = ((time * count - rest).clamp(0, 1) for time in (t, s))
        step = self.inner.move(model, process, x, now, target, noise, {**carry, "free": inside, "all": free})
        reached = target if step.s is None else step.s
        if self.decides:
            left = (step.x == MASK).flatten(1) & inside
            reached = torch.where(torch.isnan(reached) | left.any(1), reached, 0.0)
        carry = {key: free if key == "free" else value for key, value in step.carry.items() if key != "all"}
        return Step(step.x, carry, s=(reached + rest) / count)
