"""Resampling: every step is taken several times, with noise back in between."""

from __future__ import annotations

import dataclasses

from fastsde.batching import expand_like
from fastsde.checks import check_count, check_instance
from fastsde.noise import StepNoise
from fastsde.score.base import BoundModel
from fastsde.sde.base import SDE
from fastsde.solvers.ancestral import Ancestral
from fastsde.solvers.base import Solver, Step
from fastsde.solvers.wrapped import WrappedSolver
from fastsde.types import Carry, State, Time

_OWN = 1 << 12
"""Normals set aside for each repeat: number 0 goes forward, 1 is the solver's z, the others its further ones."""


class _Repeated(StepNoise):
    """The noise of one more time over the same step: all of it from normals that no other time uses."""

    def __init__(self, noise: StepNoise, first: int, t: Time, s: Time) -> None:
        self._noise, self._first, self._root = noise, first, (t - s).sqrt()

    @property
    def dw(self) -> State:
        z = self.z
        return expand_like(self._root, z) * z

    @property
    def z(self) -> State:
        return self._noise.normal(self._first + 1)

    def normal(self, k: int = 0) -> State:
        return self._noise.normal(self._first + 2 + k)

    def fixed(self, k: int = 0) -> State:
        return self._noise.fixed(k)


@dataclasses.dataclass(frozen=True)
class Resampling(WrappedSolver):
    r"""A solver's step from t to s, taken `repeats` times; before each further time, the state goes back by

        x_t = a x_s + b z,    a = alpha_t / alpha_s,    b^2 = sigma_t^2 - a^2 sigma_s^2

    with fresh z, the exact forward process. With an exact score the law stays what it is; with `Projection` the unknown
    part gets time to agree with the known one. Made of one-step jumps, where the paper jumps back over 10 steps of 250
    and repeats 10 times. Source: Lugmayr et al. (RePaint), https://arxiv.org/abs/2201.09865, alg. 1.

    Args:
        solver: one that neither adapts its steps nor needs a warm-up; its `steps` are the grid.
        repeats: how often to take each step; 1 is the solver alone.

    Raises:
        ValueError: if `repeats` is below 1 or the solver cannot be used.
        TypeError: if `solver` is no solver.
    """

    convergence = "that of the solver"
    cost = "repeats * solver"
    grid_hint = "solver=Ancestral(steps=...)"
    noise = "fresh"
    use = "inpainting with `Projection`, as in RePaint"

    solver: Solver = dataclasses.field(default_factory=Ancestral)
    repeats: int = 10

    def __post_init__(self) -> None:
        check_instance("solver", self.solver, Solver, "a Solver, such as fastsde.Ancestral()")
        check_count("repeats", self.repeats, 1)
        if self.solver.adaptive or self.solver.warm_up or isinstance(self.solver, Resampling):
            raise ValueError(f"{type(self.solver).__name__} cannot be resampled: use Ancestral, DDIM or EulerMaruyama.")

    @property
    def calls_per_step(self) -> int:
        return self.repeats * self.solver.calls_per_step

    def step(self, model: BoundModel, sde: SDE, x_t: State, t: Time, s: Time, noise: StepNoise, carry: Carry) -> Step:
        a, b2 = sde.transition(t, s)
        step = self.solver.step(model, sde, x_t, t, s, noise, carry)
        for k in range(1, self.repeats):
            first = k * _OWN
            back = expand_like(a, x_t) * step.x + expand_like(b2.sqrt(), x_t) * noise.normal(first)
            step = self.solver.step(model, sde, back, t, s, _Repeated(noise, first, t, s), carry)
        return step
