"""`langevin`: a Markov chain for each sample, at one level of noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from fastsde.arguments import as_model, resolve_samples
from fastsde.checks import check_count, check_instance, check_number, check_states
from fastsde.control import Grid
from fastsde.engine import Engine
from fastsde.job import Options, make_job
from fastsde.noise import FreshNoise, StepNoise
from fastsde.result import SampleResult
from fastsde.score.base import BoundModel, ScoreModel
from fastsde.sde.base import SDE
from fastsde.solvers.base import Solver, Step
from fastsde.solvers.langevin import MALA, LangevinDynamics, moved, uniform
from fastsde.types import Carry, Cond, ScoreFn, State, Time


def langevin(
    score_fn: ScoreModel | ScoreFn,
    sde: SDE | None = None,
    *,
    kernel: LangevinDynamics,
    steps: int,
    t: float,
    n: int | None = None,
    shape: Sequence[int] | None = None,
    x_init: Tensor | None = None,
    seed: int = 0,
    index: Sequence[int] | Tensor | None = None,
    batch_size: int | None = None,
    cond: Cond | None = None,
    max_nfe: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> SampleResult:
    r"""Samples from p_t, the law of the noisy data at one time, by a Markov chain for each sample.

        r = fastsde.langevin(model, kernel=fastsde.MALA(step_size=0.1), steps=200, t=0.01, n=64)

    `LangevinDynamics` moves along the score with noise; `MALA` accepts or refuses each move, per sample. Sample i
    depends on (seed, i) alone. The denoised sample is `model(r.samples, t).x_0`.

    Args:
        score_fn: as for `sample`, like sde.
        kernel: `LangevinDynamics(step_size)` or `MALA(step_size)`.
        steps: length of the chain, at least 1.
        t: the level of noise, a time of the process in [t_min, t_max].
        x_init: start states with shape (n, *event); draws from the prior at t, that of pure noise, by default.
        max_nfe: a sample that would need more calls ends with `Status.MAX_NFE`, where it is.
        n, shape, seed, index, batch_size, cond, dtype, device, progress: as for `sample`.

    Returns:
        A `SampleResult` with the last states, with shape (n, *event). `accepted` and `rejected` count the moves of
        `MALA`; without acceptance all are accepted.

    Raises:
        ValueError, TypeError, SamplingError, Interrupted: as `sample`.
    """
    if x_init is not None:
        check_states("x_init", x_init)
    check_instance("kernel", kernel, LangevinDynamics, "fastsde.LangevinDynamics(..) or fastsde.MALA(..)")
    model = as_model(score_fn, sde)
    process = model.sde if sde is None else sde
    level = check_number("t", t, process.t_min, process.t_max)
    steps = check_count("steps", steps, 1)
    asked = resolve_samples(
        model, n=n, shape=shape, given=x_init, index=index, seed=seed, cond=cond, dtype=dtype, device=device
    )
    if asked.dtype.itemsize < 4:
        raise TypeError(
            f"dtype must be torch.float32 or torch.float64 for a chain, which counts moves; got {asked.dtype}."
        )
    if x_init is None:
        x_init = process.prior(FreshNoise(asked.seed, asked.event, asked.dtype).prior(asked.index), level)
    flat = x_init.to(asked.device, asked.dtype).flatten(1)
    # The last column counts the moves that were accepted.
    samples = dataclasses.replace(asked, start=torch.nn.functional.pad(flat, (0, 1)), event=(flat.shape[1] + 1,))
    grid = Grid(torch.arange(steps, -1, -1, dtype=torch.float64))  # the engine's clock counts the steps that are left
    solver, options = _Chain(kernel, asked.event, level), Options(batch_size, max_nfe, progress=progress)
    r = Engine(make_job(model, process, solver, grid, grid.ends, samples, options)).run()
    taken = r.samples[:, -1].nan_to_num().long()
    return dataclasses.replace(
        r,
        samples=r.samples[:, :-1].reshape(len(r.samples), *asked.event),
        accepted=taken,
        rejected=r.accepted + r.rejected - taken,
    )


@dataclasses.dataclass(frozen=True)
class _Chain(Solver):
    """Steps of a kernel at one level, on states that carry the count of accepted moves in a last column."""

    kernel: LangevinDynamics
    event: tuple[int, ...]
    level: float

    @property
    def calls_per_step(self) -> int:
        return self.kernel.calls_per_move if isinstance(self.kernel, MALA) else 1

    @property
    def warm_up(self) -> bool:  # type: ignore[override]
        return isinstance(self.kernel, MALA)  # which keeps the score of where it is

    def init(self, x_t: State) -> Carry:
        count = torch.zeros(len(x_t), dtype=torch.int64, device=x_t.device)
        return {"count": count} | ({"score": torch.zeros_like(x_t[:, :-1])} if self.warm_up else {})

    def step(self, model: BoundModel, sde: SDE, x_t: State, t: Time, s: Time, noise: StepNoise, carry: Carry) -> Step:
        shape, normals, at = (len(x_t), *self.event), noise.normal(), torch.full_like(t, self.level)
        x, z, u = x_t[:, :-1].reshape(shape), normals[:, :-1].reshape(shape), uniform(normals[:, -1])
        lam, memory = self.kernel.size(sde, at, carry["count"]), {"count": carry["count"] + (s < t)}

        def score(where: State) -> State:
            return model(where, at).score

        if not isinstance(self.kernel, MALA):
            return self._step(moved(x, score(x), lam, z), x_t[:, -1] + 1, memory)
        # The first turn goes nowhere and finds the score there.
        lam, known = lam * (s < t), carry["score"].reshape(shape)
        x, found, taken = self.kernel.move(score, x, known, at, lam, z, u)
        return self._step(x, x_t[:, -1] + (taken & (s < t)), memory | {"score": found.flatten(1)})

    @staticmethod
    def _step(x: State, moves: Tensor, memory: Carry) -> Step:
        return Step(torch.cat([x.flatten(1), moves[:, None]], 1), memory)
