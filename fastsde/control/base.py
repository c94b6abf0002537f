"""What a controller is."""

from __future__ import annotations

import dataclasses
import enum
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import torch

from fastsde.batching import row_norm
from fastsde.types import Carry, Coef, Index, State, Time

if TYPE_CHECKING:
    from fastsde.control.grid import Grid


class Verdict(enum.IntEnum):
    """What becomes of a proposed step.

    ACCEPT: the row moves to the proposal.
    REJECT: it stays, and tries the step that the controller's memory now says.
    RESTART: it goes back to its start. What it cost stays counted. Noise from a path is the same again.
    TOO_SHORT: its sample ends with `Status.MIN_STEP`.
    NOT_FINITE: its sample ends with `Status.NON_FINITE`.
    """

    ACCEPT = 0
    REJECT = 1
    RESTART = 2
    TOO_SHORT = 3
    NOT_FINITE = 4


@dataclasses.dataclass(frozen=True)
class Decision:
    """What becomes of a proposed step, per row.

    Attributes:
        verdict: a `Verdict` for each row, with shape (B,).
        carry: the controller's memory from now on, whatever the verdict.
    """

    verdict: Index
    carry: Carry


@runtime_checkable
class Clock(Protocol):
    """What a controller may know of a process: its time range and its log-SNR clock."""

    t_min: float
    t_max: float

    def log_snr(self, t: Time) -> Coef:
        """Log signal-to-noise ratio at t, with shape (B,)."""

    def t_of_log_snr(self, log_snr: Coef) -> Time:
        """The inverse of `log_snr`, with shape (B,)."""


class Controller(ABC):
    """Chooses target times, accepts or rejects steps, or has samples start again, row by row. Knows no solver, no SDE.

    The `carry` it is given is its memory and "position": the number of the step among the accepted, from 1, or 0 for
    the warm-up turn, with shape (B,).

    Attributes:
        adaptive: whether it needs the solver's error estimate.
    """

    adaptive: ClassVar[bool]

    def span(self, t_min: float, t_max: float) -> tuple[float, float]:
        """Where sampling starts and ends, within the process's range: (t_max, t_min) unless the controller says so.

        Raises:
            ValueError: if this controller cannot walk that range, saying why.
        """
        return t_max, t_min

    def reversed(self) -> Controller:
        """The same on the clock u = -t, for a walk from t_min up to t_max."""
        return self

    def all_grids(self) -> tuple[Grid, ...]:
        """The grids that a sample may walk, the coarsest first; empty where errors decide every step."""
        return ()

    def coarsest(self, count: int) -> Controller:
        """The same with only so many of its grids, at least one."""
        return self

    def stopping_at(self, times: Sequence[float]) -> tuple[Controller, list[float]]:
        """The same with steps that end exactly at the given times, and these; or at the nearest that it can.

        Raises:
            ValueError: if it cannot say where its steps end, which is the default.
        """
        raise ValueError(f"{type(self).__name__} does not step on given times; keep every state instead.")

    def to(self, device: torch.device) -> Controller:
        """The same with its tables on a device."""
        return self

    def record(self) -> dict[str, Any]:
        """What tells it from another one, as JSON can hold it."""
        grids = [grid.times.tolist() for grid in self.all_grids()]
        return {"grid": repr(self), **({"grid_times": grids[0] if len(grids) == 1 else grids} if grids else {})}

    def plan_row(self, carry: Carry) -> Index:
        """Which row of the solver's plan, if there is one, the step reads, with shape (B,)."""
        return carry["position"]

    @abstractmethod
    def init(self, t: Time, t_end: float) -> Carry:
        """The controller's memory for rows that start at t, with shape (B,)."""

    @abstractmethod
    def target(self, t: Time, t_end: float, carry: Carry) -> Time:
        """Where the next step goes, with shape (B,): below t and not below `t_end`, which is met exactly."""

    @abstractmethod
    def update(
        self, t: Time, s: Time, t_end: float, error: State | None, scale: State | None, carry: Carry
    ) -> Decision:
        """Judges the step from t to s.

        Args:
            t: now, with shape (B,).
            s: target, with shape (B,).
            t_end: where sampling stops.
            error: the solver's elementwise error estimate, with shape (B, *event), or None.
            scale: the magnitude that a relative tolerance refers to, with shape (B, *event), or None.
            carry: the memory from `init` or the last decision, and the position.
        """


def scaled_error(error: State | None, scale: State | None, rtol: float, atol: float, q: float = 2.0) -> Coef:
    """E = || error / max(atol, rtol scale) ||_q / d^(1/q), with shape (B,); a ValueError where there is no estimate."""
    if error is None or scale is None:
        raise ValueError("the solver gives no error estimate; it needs a Grid.")
    return row_norm(error / (rtol * scale).clamp(min=atol), q=q)
