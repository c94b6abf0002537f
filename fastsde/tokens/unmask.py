"""Unmasking several tokens at a time, ranked by an order."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from fastsde.checks import check_choice, check_flags, check_number
from fastsde.noise import StepNoise
from fastsde.solvers.base import Step
from fastsde.tokens.drawing import entropies, first, two_largest
from fastsde.tokens.model import BoundTokens
from fastsde.tokens.process import MASK, Masking
from fastsde.tokens.solver import ORDER, SCORES, VALUES, TokenSolver, predicted, written
from fastsde.types import Carry, Index, Time, Tokens

ORDERS = ("random", "probability", "entropy", "margin", "halton", "confidence")
"""The orders of `Unmask`."""
STATE_ORDERS = ORDERS[:-1]
"""Those that do not look at the values drawn: with one token a turn and exact conditionals the law is the data's."""


def check_order_name(order: object, allowed: tuple[str, ...]) -> None:
    """Refuses, with a ValueError, an order that is not among the allowed."""
    if order == "critic":
        raise ValueError('order="critic" is a solver of its own: TokenCritic(critic).')
    check_choice("order", order, allowed)


@functools.lru_cache(maxsize=64)
def halton_rank(shape: tuple[int, ...]) -> Tensor:
    """The place of each position in the order of Halton points, with shape (L,).

    Points of the Halton sequence in bases 2, 3, 5, .. scaled to the grid and rounded down; a position counts when it is
    hit first. As many points are made as it takes. Source: Besnier et al., https://arxiv.org/abs/2503.17076, sec. 3.
    """
    sides = [side for side in shape if side > 1] or [1]
    if len(sides) > 3:
        raise ValueError(f'order="halton" takes events of up to three dimensions; got shape {shape}.')
    total = int(torch.tensor(sides).prod())
    rank = torch.full((total,), -1, dtype=torch.int64)
    found, start, count = 0, 1, 4 * total
    while found < total:
        index = torch.arange(start, start + count)
        place = torch.zeros(count, dtype=torch.int64)
        for base, side in zip((2, 3, 5), sides, strict=False):
            value, rest, scale = torch.zeros(count, dtype=torch.float64), index.clone(), 1.0
            while bool((rest > 0).any()):
                scale /= base
                value, rest = value + scale * (rest % base), rest // base
            place = place * side + (value * side).long().clamp(max=side - 1)
        for position in place.tolist():
            if rank[position] < 0:
                rank[position], found = found, found + 1
        start += count
    return rank


def state_key(order: str, used: Tensor, at: Tensor, shape: tuple[int, ...], u: Tensor) -> Tensor:
    """What positions `at`, with shape (B, L), are ranked by in an order of `STATE_ORDERS`, the smallest first.

    `used` are their logits, with shape (W, K), `shape` is that of an event, and u has a uniform for each position, the
    same in all turns, with shape (B, L).
    """
    if order == "random":
        return -u  # the largest first, as in `FirstHitting`
    key = torch.zeros(at.shape, dtype=torch.float64, device=at.device)
    if order == "halton":
        return key + halton_rank(shape).to(at.device)
    if order == "entropy":
        key[at] = entropies(used)
    else:
        best, second = two_largest(used)
        key[at] = -best if order == "probability" else second - best
    return key


def left_masked(masked: Index, free: Index, s: Time) -> Index:
    """How many tokens stay masked in a step to s: floor(free s), but at least one fewer than now, and one unless s = 0.

    Source: Chang et al., https://arxiv.org/abs/2202.04200, alg. of their published code. All have shape (B,).
    """
    # 0.7 of 10 is 7, however it was rounded.
    kept = torch.where(s > 0, torch.floor(free * s + 1e-9).long().clamp(min=1), 0)
    return torch.minimum(kept, masked - 1).clamp(min=0)


@dataclasses.dataclass(frozen=True)
class Unmask(TokenSolver):
    r"""At each step the best positions are so many that floor(n s) of n free ones stay masked.

    Orders, the first best:

        "random"        in an order of the sample's own, the same at any number of steps
        "probability"   the largest probability at the position
        "entropy"       the smallest entropy at the position
        "margin"        the largest difference of the two largest probabilities
        "halton"        spread over the grid, always the same (Besnier et al., https://arxiv.org/abs/2503.17076)
        "confidence"    the largest log p(value drawn) + choice_temperature (1 - r) g, g Gumbel noise, r progress

    The last is MaskGIT (Chang et al., https://arxiv.org/abs/2202.04200), with `choice_temperature=4.5` and
    `Masking(SINE)`. It prefers likely values, so its law is not the data's, even with one token a step: which
    position is kept depends on the value. Noise mends that. The others look at the state alone. With one token a step
    and exact conditionals their law is that of the data. What tokens drawn together lose is their total correlation.

    Args:
        order: one of the above.
        steps: of the process's own grid; or give `nfe` or a `Grid` to `sample`.
        temperature: of the values; a pair falls linearly from the first to the last. 0 takes the most likely.
        choice_temperature: of the order "confidence".
        annealed: whether that noise falls to 0 with the time, as published; else it is constant.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    convergence = "exact at one token a step"
    use = "MaskGIT, LLaDA's and Dream's orders, Halton"
    exact = 'at one token a step; never with "confidence"'

    order: str = "entropy"
    steps: int | None = None
    temperature: float | tuple[float, float] = 1.0
    choice_temperature: float = 0.0
    annealed: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_order_name(self.order, ORDERS)
        check_number("choice_temperature", self.choice_temperature, 0.0, ends="[)")
        check_flags(annealed=self.annealed)
        if self.choice_temperature and self.order != "confidence":
            raise ValueError('choice_temperature is for order="confidence"; for others leave it out.')

    def check_model(self, model: Any) -> None:
        super().check_model(model)
        if self.order == "halton" and model.event_shape is not None:
            halton_rank(model.event_shape)

    def within(self, rtol: float) -> TokenSolver:
        if self.order not in STATE_ORDERS:
            raise ValueError(f"rtol needs an order that does not look at the values drawn; got {self.order!r}.")
        if self.steps is not None:
            raise ValueError("give either rtol or the solver's steps, not both.")
        return EntropyBudget(rtol, self.order, self.temperature)

    def move(
        self, model: BoundTokens, process: Masking, x: Tokens, t: Time, s: Time, noise: StepNoise, carry: Carry
    ) -> Step:
        masked = (x == MASK).flatten(1) & carry["free"]
        used, failed, at = predicted(model, x, carry, masked)
        count = masked.sum(1)
        taken = count - left_masked(count, carry["free"].sum(1), s)
        progress = 1 - process.time(s)
        if self.order == "confidence":
            values, log_p = self.drawn(used, at, noise.uniform(VALUES), progress)
            key = torch.zeros(at.shape, dtype=torch.float64, device=x.device)
            key[at] = -log_p.nan_to_num(0.0)
            if self.choice_temperature:
                gumbel = -(-noise.uniform(SCORES).flatten(1).log()).log()
                key = key - self.choice_temperature * gumbel * ((1 - progress)[:, None] if self.annealed else 1.0)
            now = first(key, at, taken)
            values = values[now[at]]
        else:
            u = noise.fixed_uniform(ORDER).flatten(1)
            key = state_key(self.order, used, at, tuple(x.shape[1:]), u)
            now = first(key, at, taken)
            values, _ = self.drawn(used[now[at]], now, noise.fixed_uniform(VALUES), progress)
        return Step(written(x, now, values), carry, s=s.masked_fill(failed, torch.nan))


DEFAULT_RTOL = 0.1
"""Relative tolerance when nothing is said."""


@dataclasses.dataclass(frozen=True)
class EntropyBudget(TokenSolver):
    r"""Tokens are drawn together as long as a bound of what that loses stays within a tolerance. Calls follow.

    Tokens that are drawn in one turn are independent given the rest. What that loses, their conditional total
    correlation, is at most the sum of their entropies H_l minus the largest (Ben-Hamu et al.,
    https://arxiv.org/abs/2505.24857, eq. 2). Of n free tokens, with m of them known, a turn draws the largest k, in the
    order given, for which

        bound + (sum of H over the k - max of H over the k) <= rtol H_ref (m + k) / n

    and at least one. H_ref is the sum of entropies over all free positions at the first call, `bound` what the turns
    before have spent. So with exact conditionals KL(data || samples) <= E bound <= rtol E H_ref. The network's own
    error is not covered. With rtol = 0 one token is drawn at a time.

    The result reports "bound" and "entropy" (H_ref) of each sample, in nats.

    Args:
        rtol: share of the entropy that may be lost, in [0, 1].
        order: as for `Unmask`, but for "confidence".
        temperature: as for `Unmask`. Entropies are those of what is drawn from; at 0 those at temperature 1.

    Raises:
        ValueError: naming the argument.
    """

    convergence = "KL <= rtol H_ref"
    cost = "1; the tolerance says how many"
    use = "the default: calls as each sample needs them"
    exact = "to its bound"
    decides = True
    reports = ("bound", "entropy")

    rtol: float = DEFAULT_RTOL
    order: str = "entropy"
    temperature: float | tuple[float, float] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("rtol", self.rtol, 0.0, 1.0)
        check_order_name(self.order, STATE_ORDERS)

    def within(self, rtol: float) -> TokenSolver:
        return dataclasses.replace(self, rtol=rtol)

    def init(self, x_t: Tokens) -> Carry:
        zero = torch.zeros(len(x_t), dtype=torch.float64, device=x_t.device)
        return super().init(x_t) | {"bound": zero, "entropy": zero.clone(), "last": zero.clone()}

    def move(
        self, model: BoundTokens, process: Masking, x: Tokens, t: Time, s: Time, noise: StepNoise, carry: Carry
    ) -> Step:
        free = carry["free"].sum(1)
        masked = (x == MASK).flatten(1) & carry["free"]
        used, failed, at = predicted(model, x, carry, masked)
        count = masked.sum(1)
        progress = 1 - process.time(count.double() / free.clamp(min=1))
        warmth = self.heat(progress, at)
        each = torch.zeros(at.shape, dtype=torch.float64, device=x.device)
        each[at] = entropies(used / warmth.masked_fill(warmth == 0, 1.0)[:, None].to(used.dtype)).nan_to_num(0.0)

        # The first call of a sample, or of one of its blocks, says how much there is.
        begins = count == free
        last = torch.where(begins, each.sum(1), carry["last"])
        entropy = torch.where(begins, carry["entropy"] + last, carry["entropy"])
        key = state_key(self.order, used, at, tuple(x.shape[1:]), noise.fixed_uniform(ORDER).flatten(1))
        order = key.masked_fill(~at, torch.inf).argsort(dim=1, stable=True)
        ranked = each.gather(1, order)
        bound = carry["bound"][:, None] + ranked.cumsum(1) - ranked.cummax(1).values
        k = torch.arange(1, each.shape[1] + 1, device=x.device)
        share = ((free - count)[:, None] + k).double() / free.clamp(min=1)[:, None]
        budget = self.rtol * (entropy[:, None] - last[:, None] * (1 - share))
        # A rounding must not cost a call; of no tokens nothing is lost.
        fits = (bound <= budget * (1 + 1e-9) + 1e-12) & (k <= count[:, None])
        taken = (fits * k).amax(1).clamp(min=1)
        now = first(key, at, taken)
        values, _ = self.drawn(used[now[at]], now, noise.fixed_uniform(VALUES), progress)
        spent = bound.gather(1, taken[:, None] - 1).squeeze(1)
        moved = at.any(1)
        after = {
            "bound": torch.where(moved, spent, carry["bound"]),
            "entropy": torch.where(moved, entropy, carry["entropy"]),
            "last": torch.where(moved, last, carry["last"]),
        }
        reached = (count - taken).clamp(min=0).double() / free.clamp(min=1)
        return Step(written(x, now, values), {**carry, **after}, s=reached.masked_fill(failed, torch.nan))
