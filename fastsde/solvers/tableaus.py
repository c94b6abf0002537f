"""Explicit Runge-Kutta tableaus."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tableau:
    """The coefficients of an explicit Runge-Kutta method.

    Attributes:
        name: what it is called.
        order: of the solution it gives.
        a: rows of the matrix; stage i + 1 starts from stages 1 .. i.
        b: weights of the solution.
        c: nodes, one for each stage.
        error: weights of the error estimate, or None.
        error_order: order of the error estimate of one step.
    """

    name: str
    order: int
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    error: tuple[float, ...] | None = None
    error_order: int = 0

    def __post_init__(self) -> None:
        stages = len(self.c)
        rows = tuple(len(row) for row in self.a)
        if rows != tuple(range(1, stages)) or len(self.b) != stages or len(self.error or self.b) != stages:
            raise ValueError(f"a tableau of {stages} nodes needs rows of 1 .. {stages - 1} and {stages} weights.")
        if self.error and self.error_order < 1:
            raise ValueError(f"error_order must be at least 1 with error weights; got {self.error_order}.")

    @property
    def first_same_as_last(self) -> bool:
        """Whether the last stage is the slope at the new state, which the next step then starts from."""
        return self.c[-1] == 1 and self.a[-1] == self.b[:-1] and self.b[-1] == 0

    def __repr__(self) -> str:
        return self.name


EULER = Tableau("EULER", 1, (), (1.0,), (0.0,))
HEUN = Tableau("HEUN", 2, ((1.0,),), (0.5, 0.5), (0.0, 1.0), (-0.5, 0.5), 2)
"""Heun's method, with Euler's as error estimate."""
# Kutta 1901.
RK4 = Tableau("RK4", 4, ((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), (0.0, 0.5, 0.5, 1.0))
DORMAND_PRINCE = Tableau(
    "DORMAND_PRINCE",
    5,
    (
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
    (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
    5,
)
"""Dormand and Prince 1980, https://doi.org/10.1016/0771-050X(80)90013-3, table 2: order 5 with 4 embedded."""
