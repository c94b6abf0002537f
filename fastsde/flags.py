"""Reading flags of a device on the host while the device works on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch

from fastsde.types import Mask


def to_host(flags: Mask) -> Callable[[], list[bool]]:
    """Starts the copy of flags with shape (B,) to the host; the function that it returns waits for it."""
    if not flags.is_cuda:
        return flags.tolist
    copy = torch.empty(flags.shape, dtype=torch.bool, pin_memory=True).copy_(flags, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(flags.device))  # of this device, which may not be the current one

    def read() -> list[bool]:
        event.synchronize()
        return copy.tolist()

    return read


class LateFlags:
    """Which rows have ended or start again, as known `lag` turns ago: the copy runs beside the next turn.

    A row that is at its end a turn late takes part in a network call for nothing. But which rows may reach their end is
    known before the call of that turn: those are waited for. Restarts and failures still come late.
    """

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self._sent: deque[Callable[[], list[bool]]] = deque()
        self._ending: Callable[[], list[bool]] = list

    def announce(self, ending: Mask) -> None:
        """Says, before the call, which rows may reach their end in this turn, with shape (B,)."""
        self._ending = to_host(ending.any()[None])

    def read(self, ended: Mask) -> bool:
        """Whether any row has ended or starts again; `ended` are the flags after this turn, with shape (B,)."""
        self._sent.append(to_host(ended))
        known: list[bool] = []
        while len(self._sent) > (0 if any(self._ending()) else self.lag):
            known = self._sent.popleft()()
        return any(known)

    def clear(self) -> None:
        """Forgets what was sent, because rows change their places; flags of rows that have ended come again."""
        self._sent.clear()
