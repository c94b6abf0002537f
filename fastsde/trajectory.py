"""Keeping the states on the way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsde.result import Trajectory
from fastsde.types import AnyState, Index, Mask, Time


class Recorder:
    """Keeps accepted states, every one or those at given times. They are moved to the CPU as they come.

    Args:
        n: number of samples.
        save_at: the times to keep, on the engine's clock; None for all. The controller must stop there.
        sign: -1 if the engine's clock is the time reversed, so that the times handed back are the caller's.
    """

    def __init__(self, n: int, save_at: Sequence[float] | None = None, *, sign: float = 1.0) -> None:
        self.n, self.sign = n, sign
        self.save_at = None if save_at is None else torch.tensor(save_at, dtype=torch.float64)
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []
        self._since = torch.zeros(n, dtype=torch.int64)

    def start(self, slots: Index, t: Time, x: AnyState) -> None:
        """Notes the start of rows, and forgets what was kept of a sample that starts again; arguments as in `keep`."""
        self._since[slots.cpu()] = len(self._kept)
        self.keep(slots, torch.ones_like(slots, dtype=torch.bool), t, x)

    def keep(self, slots: Index, moved: Mask, t: Time, x: AnyState) -> None:
        """Notes the time and the state, with shapes (B,) and (B, *event), that the rows that moved have reached.

        `slots` are the places of all rows in the result, and `moved` says which have moved, both with shape (B,).
        """
        if self.save_at is not None:
            moved = moved & torch.isin(t, self.save_at.to(t.device))
        rows = moved.nonzero().flatten()
        if len(rows):
            self._kept.append((slots[rows].cpu(), t[rows].cpu(), x[rows].detach().cpu()))

    def paths(self) -> list[Trajectory]:
        """What was kept of each sample, in the order of the result."""
        if not self._kept:
            return [Trajectory(torch.empty(0, dtype=torch.float64), torch.empty(0)) for _ in range(self.n)]
        slot, t, x = (torch.cat(parts) for parts in zip(*self._kept, strict=True))
        part = torch.arange(len(self._kept)).repeat_interleave(torch.tensor([len(kept[0]) for kept in self._kept]))
        # A stable sort keeps the order of time within a sample: a row only ever moves on.
        order = slot.sort(stable=True).indices
        order = order[part[order] >= self._since[slot[order]]]
        counts = torch.bincount(slot[order], minlength=self.n).tolist()
        return [
            Trajectory(self.sign * times, states)
            for times, states in zip(t[order].split(counts), x[order].split(counts), strict=True)
        ]
