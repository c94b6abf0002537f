"""What a controller is."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import ClassVar, Protocol, runtime_checkable

from fastsde.types import Carry, Coef, Index, Mask, State, Time


@dataclasses.dataclass(frozen=True)
class Decision:
    """What becomes of a proposed step, per row.

    Attributes:
        accept: whether to take it, with shape (B,); None to take it in every row.
        carry: the controller's memory, whether or not the step is taken.
        failure: a `Status` that ends the row, or `Status.PENDING` to go on, with shape (B,); None to go on everywhere.
        restart: which rows, none of them accepted, go back to their start with `carry`, with shape (B,); None for none.
            What they cost stays counted. Noise from a path is the same again.
    """

    accept: Mask | None
    carry: Carry
    failure: Index | None = None
    restart: Mask | None = None


@runtime_checkable
class Clock(Protocol):
    """What a controller may know of a process: its time range and its log-SNR clock."""

    t_min: float
    t_max: float

    def log_snr(self, t: Time) -> Coef:
        """Log signal-to-noise ratio at t, with shape (B,)."""
        ...

    def t_of_log_snr(self, log_snr: Coef) -> Time:
        """The inverse of `log_snr`, with shape (B,)."""
        ...


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
