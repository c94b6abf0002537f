"""Predictor-corrector sampling: a step of any solver, then Langevin dynamics at the level reached."""

from __future__ import annotations

import dataclasses

from fastsde.checks import check_count, check_flags, check_instance
from fastsde.noise import StepNoise
from fastsde.score.base import BoundModel
from fastsde.sde.base import SDE
from fastsde.solvers.base import Solver, Step
from fastsde.solvers.langevin import Corrector, Langevin
from fastsde.solvers.reverse_diffusion import ReverseDiffusion
from fastsde.solvers.wrapped import WrappedSolver
from fastsde.types import Carry, State, Time


@dataclasses.dataclass(frozen=True)
class PredictorCorrector(WrappedSolver):
    r"""Algorithms 2 (VE) and 3 (VP): a predictor's step from t to s, then `n_corrector` Langevin steps at s.

    With `corrector_first`, the Langevin steps come first, at t, as in the released code; the state at t_min is then
    not corrected. In few dimensions d, the per-sample snr rule rests near (d + 2) / (d - 2) times the variance.
    Source: Song et al., https://arxiv.org/abs/2011.13456, app. G; thesis algorithms 2 and 3.

    Args:
        predictor: a solver that neither adapts its steps nor needs a warm-up; its `steps` are the grid.
        corrector: how to correct: `Langevin`, `LangevinDynamics` or `MALA`.
        n_corrector: corrections after each step; 0 leaves the predictor alone.
        corrector_first: whether to correct before the predictor's step rather than after.

    Raises:
        ValueError: if `n_corrector` is negative or the predictor cannot be used.
        TypeError: if predictor or corrector is something else.
    """

    convergence = "that of the predictor"
    cost = "predictor + n_corrector"
    grid_hint = "predictor=ReverseDiffusion(steps=...)"
    noise = "fresh"
    use = "score_sde's best sampler, for replication"

    predictor: Solver = dataclasses.field(default_factory=ReverseDiffusion)
    corrector: Corrector = dataclasses.field(default_factory=Langevin)
    n_corrector: int = 1
    corrector_first: bool = False

    def __post_init__(self) -> None:
        check_instance("predictor", self.predictor, Solver, "a Solver, such as fastsde.ReverseDiffusion()")
        check_instance("corrector", self.corrector, Corrector, "a Corrector, such as fastsde.Langevin()")
        check_count("n_corrector", self.n_corrector, 0)
        check_flags(corrector_first=self.corrector_first)
        if self.predictor.adaptive or self.predictor.warm_up or isinstance(self.predictor, PredictorCorrector):
            raise ValueError(
                f"{type(self.predictor).__name__} cannot be a predictor: use ReverseDiffusion, Ancestral, DDIM or "
                "EulerMaruyama."
            )

    @property
    def inner(self) -> Solver:
        return self.predictor

    @property
    def calls_per_step(self) -> int:
        return self.predictor.calls_per_step + self.n_corrector * self.corrector.calls

    @property
    def across_rows(self) -> bool:  # type: ignore[override]
        return getattr(self.corrector, "batch_mean", False)

    def step(self, model: BoundModel, sde: SDE, x_t: State, t: Time, s: Time, noise: StepNoise, carry: Carry) -> Step:
        shrink = (sde.alpha(t) / sde.alpha(s)) ** 2
        if self.corrector_first:
            return self.predictor.step(model, sde, self._correct(model, sde, x_t, t, shrink, noise), t, s, noise, carry)
        step = self.predictor.step(model, sde, x_t, t, s, noise, carry)
        return Step(self._correct(model, sde, step.x, s, shrink, noise), step.carry)

    def _correct(self, model: BoundModel, sde: SDE, x: State, t: Time, shrink: Time, noise: StepNoise) -> State:
        for k in range(self.n_corrector):
            # Number 0 may be the predictor's.
            x = self.corrector.correct(model, sde, x, t, shrink, lambda j, k=k: noise.normal(k + 1 + (j << 12)))  # type: ignore[misc]
        return x
