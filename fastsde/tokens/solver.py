"""What solvers of masked tokens share."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from fastsde.checks import check_number, check_steps
from fastsde.control import Grid
from fastsde.noise import StepNoise
from fastsde.solvers.base import Solver, Step
from fastsde.tokens.drawing import draw
from fastsde.tokens.model import BoundTokens, TokenModel
from fastsde.tokens.process import MASK, Masking
from fastsde.types import Carry, Time, Tokens

VALUES, ORDER, COINS, SCORES = range(4)
"""Numbers of the uniforms that a step uses: for values, for the order of positions, for coins, beside scores."""


class TokenSolver(Solver):
    """One step of masked tokens from the share t to s < t, for every row: some masks become values.

    t and s are masked shares of the positions that are free: those that are masked at the start. A prompt is never
    touched. A row is at its end as soon as nothing in it is masked.

    Attributes (besides those of `Solver`):
        decides: whether it says itself how far a step goes, so that it takes neither a grid nor `nfe`.
        exact: its law with exact conditionals, in words.
        remasks: whether tokens may become masks again, so that a row without masks is not at its end before 0.
        temperature: of the values; a pair falls linearly from the first to the last over the run.
    """

    sdes = "masking"
    noise = "uniforms"
    calls_per_step = 1
    decides: bool = False
    exact: str = ""
    remasks: bool = False
    temperature: float | tuple[float, float] = 1.0

    def __post_init__(self) -> None:
        check_steps(self.steps)
        value: Any = self.temperature
        for end in value if isinstance(value, tuple) and len(value) == 2 else (value,):
            check_number("temperature", end, 0.0, ends="[)")

    def check(self, sde: Any, times: Tensor | None) -> None:
        if not isinstance(sde, Masking):
            raise ValueError(f"{type(self).__name__} is for tokens, not for {sde!r}.")

    def plan(self, sde: Any, times: Tensor) -> None:
        return None

    def check_model(self, model: Any) -> None:
        if not isinstance(model, TokenModel):
            raise ValueError(f"{type(self).__name__} is for tokens: it takes a fastsde.tokens.TokenModel.")

    def grid_steps(self, model: TokenModel, nfe: int) -> int:
        """Steps that `nfe` calls pay for."""
        return nfe // model.calls

    def grid(self, process: Masking, steps: int) -> Grid:
        """Its grid of so many steps: the process's own, unless it has another clock."""
        return process.grid(steps)

    def within(self, rtol: float) -> TokenSolver:
        """The same order and temperature with a tolerance that decides how many tokens are drawn at a time.

        Raises:
            ValueError: if it takes none, which is the default.
        """
        raise ValueError(
            f"{type(self).__name__} takes no rtol: give steps or nfe, or use Unmask or EntropyBudget, whose tolerance "
            "decides how many tokens are drawn at a time."
        )

    def init(self, x_t: Tokens) -> Carry:
        return {"free": (x_t == MASK).flatten(1)}

    def heat(self, progress: Tensor, at: Tensor) -> Tensor:
        """The temperature at positions (B, L), with shape (W,), from the progress of each row, with shape (B,)."""
        first, last = self.temperature if isinstance(self.temperature, tuple) else (self.temperature, self.temperature)
        return (float(first) + float(last - first) * progress)[:, None].expand(at.shape)[at]

    def drawn(self, used: Tensor, at: Tensor, u: Tensor, progress: Tensor) -> tuple[Tensor, Tensor]:
        """Values at positions, and the logarithms of their probabilities, each with shape (W,).

        Args:
            used: logits, with shape (W, K).
            at: positions, with shape (B, L).
            u: uniforms, with shape (B, *event).
            progress: of each row, with shape (B,).
        """
        return draw(used, u.flatten(1)[at], self.heat(progress, at))

    @abstractmethod
    def move(
        self, model: BoundTokens, process: Masking, x: Tokens, t: Time, s: Time, noise: StepNoise, carry: Carry
    ) -> Step:
        """The step, without what every solver does at its end; arguments as for `step`."""

    def step(  # type: ignore[override] # a solver of tokens alone
        self, model: BoundTokens, sde: Masking, x_t: Tokens, t: Time, s: Time, noise: StepNoise, carry: Carry
    ) -> Step:
        step = self.move(model, sde, x_t, t, s, noise, carry)
        return step if self.remasks else finished(step, s, model.model.end_id)


def finished(step: Step, s: Time, end_id: int | None) -> Step:
    """The step with rows at their end sent to 0, and others kept above it; behind `end_id` nothing is read.

    The target s has shape (B,); `step.s` may say the shares reached in its place.
    """
    x, s = step.x, s if step.s is None else step.s
    flat = x.flatten(1)
    masked = flat == MASK
    if end_id is not None:
        known = (~masked).int().cumprod(1).bool()
        # Behind the first end that has no mask before it.
        over = ((flat == end_id) & known).int().cumsum(1).bool() & (step.carry["free"])
        flat, masked = torch.where(over, end_id, flat), masked & ~over
    left = masked.sum(1)
    total = step.carry["free"].sum(1).clamp(min=1)
    s = torch.where(torch.isnan(s), s, torch.where(left == 0, 0.0, torch.where(s > 0, s, left.double() / total)))
    return Step(flat.reshape(x.shape), step.carry, s=s)


def predicted(model: BoundTokens, x: Tokens, carry: Carry, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One call on the rows where any position is wanted, with shape (B, L).

    `carry` has "free", and "all" where that is a part of what is free.

    Returns:
        Logits of the wanted positions, in their order, with shape (W, K); flags of rows whose logits hold NaN, with
        shape (B,); and the positions themselves, (B, L), without those of rows that have ended.
    """
    free = carry.get("all", carry["free"])
    share = (x == MASK).flatten(1).sum(1).double() / free.sum(1).clamp(min=1)
    wanted = wanted & model.active[:, None]
    ids, logits = model(x, share, wanted.any(1))
    used = logits[wanted.index_select(0, ids)]
    failed = torch.zeros(wanted.shape, dtype=torch.bool, device=x.device)
    failed[wanted] = torch.isnan(used).any(1) | ~(used > -torch.inf).any(1)
    return used, failed.any(1), wanted


def written(x: Tokens, at: Tensor, values: Tensor) -> Tokens:
    """Tokens with values at the flagged positions (B, L), in their order."""
    return x.flatten(1).masked_scatter(at, values).reshape(x.shape)
