"""`integrate`: any forward SDE, by Algorithm 9 of the thesis."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fastsde.arguments import resolve_samples
from fastsde.batching import expand_like
from fastsde.checks import check_flags, check_instance, check_kind, check_real, check_states, check_steps
from fastsde.control import Adaptive, Controller, Grid
from fastsde.engine import Engine
from fastsde.job import Options, make_job
from fastsde.noise import StepNoise
from fastsde.result import SampleResult
from fastsde.score.base import BoundModel, ScoreModel
from fastsde.sde.base import SDE
from fastsde.sde.edm import EDM
from fastsde.solvers.base import Solver, Step
from fastsde.types import Carry, State, Time

_PROCESS = EDM()
"""The engine wants a process; the solver below reads none of it."""
_ROUNDING = 2.0**-52
"""Relative rounding of a time in float64."""
_LEAST_RTOL = 4
"""Smallest rtol, in machine epsilons of the state: two roundings of x, in x' and in x'', and the error is noise."""


def integrate(
    drift: Callable[[Tensor, Tensor], Tensor],
    diffusion: Callable[[Tensor, Tensor], Tensor | float] | None,
    x0: Tensor,
    t0: float,
    t1: float,
    *,
    ito: bool = True,
    additive: bool = False,
    rtol: float = 0.05,
    atol: float = 0.01,
    steps: int | None = None,
    extrapolate: bool = True,
    save_at: Iterable[float] | Tensor | None = None,
    dense: bool = False,
    seed: int = 0,
    index: Sequence[int] | Tensor | None = None,
    batch_size: int | None = None,
    max_nfe: int = 100_000,
    progress: bool = False,
) -> SampleResult:
    r"""Solves dx = drift(x, t) dt + diffusion(x, t) dw from t0 up to t1, with a step size for each sample.

        x'  = x + h f(x, t)      + g(x, t)      (dW - S sqrt(h))
        x~  = x + h f(x', t + h) + g(x', t + h) (dW + S sqrt(h))
        x'' = (x' + x~) / 2,    error = x' + S sqrt(h) g(x, t) - x''

    The diffusion is diagonal: each element of x has its own Brownian motion. For an Ito SDE each element draws S = +1
    or -1. S = 0 for a Stratonovich SDE, and for additive noise, where both kinds agree. Strong order 1, weak order 1 (2
    for additive noise). The Brownian path is a function of (seed, sample, time). So runs at other tolerances see the
    same path. Source: Roberts, https://arxiv.org/abs/1210.0933; thesis algorithm 9, with the changes that
    docs/explanation/sources.md lists.

    For an SDE a step is rejected only if its error is above ten tolerances. Its error decides the size of the next
    step, at most 1.5 times as long. The reason: in few dimensions the rejections of Algorithm 9 bias the samples, with
    kept and with new noise. After a rejection the step size depends on the noise (compare Gaines and Lyons,
    https://doi.org/10.1137/S0036139995286515). The bias that is left falls with the step size. Equal steps have less
    bias, because their size does not vary. So if you know a good step size, `steps` is better. For an ODE steps are
    rejected as usual. docs/explanation/sources.md has the measurements.

    Args:
        drift: `drift(x, t)`, with x of shape (B, *event) and t of shape (B,), returning the shape of x.
        diffusion: `diffusion(x, t)`, returning the shape of x, (B, 1, .., 1) or a number; None for an ODE.
        x0: start states, with shape (n, *event), floating.
        t0: start, finite.
        t1: end, above t0. The difference must be more than 2^-32 of max(|t0|, |t1|).
        ito: True for an SDE in the sense of Ito, False for Stratonovich.
        additive: True if the diffusion does not depend on x.
        rtol: relative tolerance, at least 4 machine epsilons of x0's dtype.
        atol: absolute tolerance in units of x, positive.
        steps: this many equal steps, instead of adaptive ones.
        extrapolate: True: return x''. False: return Euler-Maruyama's x, with x'' only for the error estimate (Ito:
            strong order 1/2, 1 for additive noise).
        save_at: times in [t0, t1] at which to keep the state: `.trajectory[i].x` of the result, with shape (k, *event).
        dense: keep every accepted state of every sample instead.
        seed, index, batch_size, progress: as for `sample`; the noise of a sample depends on (seed, number, time) alone.
        max_nfe: a sample that would need more evaluations of the drift stops there, with `Status.MAX_NFE`.

    Returns:
        A `SampleResult`: states at t1, evaluations of the drift, steps and status of each sample.

    Raises:
        ValueError, TypeError: before the first evaluation, naming the argument, what came and what is allowed.
        SamplingError: if drift or diffusion fails after the first sample was finished.
    """
    check_instance("drift", drift, Callable, "callable as drift(x, t)")
    check_kind("diffusion", diffusion, Callable, "callable as diffusion(x, t)")
    check_states("x0", x0)
    for name, t in (("t0", t0), ("t1", t1)):
        check_real(name, t)
    if not -math.inf < t0 < t1 < math.inf:
        raise ValueError(f"t0 and t1 must be finite with t0 < t1; got {t0} and {t1}.")
    size = max(abs(t0), abs(t1)) / (t1 - t0)
    if size > 1 << 32:
        raise ValueError(f"t0 and t1 must differ by more than 2^-32 of their size; got {t0} and {t1}.")
    check_flags(ito=ito, additive=additive, extrapolate=extrapolate, dense=dense)
    if not extrapolate and not ito and not additive:
        raise ValueError("extrapolate=False is Euler-Maruyama, which solves Ito SDEs; this one is Stratonovich.")
    if dense and save_at is not None:
        raise ValueError("give either save_at= or dense=True, not both.")
    model = ScoreModel(drift, _PROCESS, timestep=torch.neg)  # in the place of a network; the clock is u = -t
    model.role = "drift"
    samples = resolve_samples(model, given=x0, name="x0", index=index, seed=seed, dtype=x0.dtype)
    solver = _ImprovedEuler(diffusion, diffusion is not None and ito and not additive, extrapolate)
    check_steps(steps)
    controller: Controller
    if steps is None:
        controller = _rule(solver, rtol, atol, size, x0.dtype)
    else:
        controller = Grid(torch.linspace(-t0, -t1, steps + 1, dtype=torch.float64))
    kept = dense if save_at is None else save_at
    options = Options(batch_size, max_nfe, kept, progress, saved_by="save_at")
    return Engine(make_job(model, _PROCESS, solver, controller, (float(t0), float(t1)), samples, options)).run()


def _rule(solver: _ImprovedEuler, rtol: float, atol: float, size: float, dtype: torch.dtype) -> Adaptive:
    """The adaptive steps of the given solver; `size` is that of the times, as a multiple of their range."""
    # Without noise no path has to be resolved, only the time.
    resolution = solver.resolution if solver.diffusion is not None else 4 * _ROUNDING * max(size, 1.0)
    rule = Adaptive(rtol, atol, resolution=resolution)
    least = _LEAST_RTOL * torch.finfo(dtype).eps
    if rtol < least:
        raise ValueError(f"rtol must be at least {least:.2g} for a state in {dtype}; got {rtol}.")
    # Ten tolerances are a step that blew up: with so little growth noise alone almost never makes them.
    return rule if solver.diffusion is None else dataclasses.replace(rule, limit=10.0, growth=1.5)


@dataclasses.dataclass(frozen=True)
class _ImprovedEuler(Solver):
    """The step of `integrate`, on the clock u = -t."""

    calls_per_step = 2
    adaptive = True
    keep_path = True

    diffusion: Callable[[Tensor, Tensor], Tensor | float] | None
    signs: bool
    extrapolate: bool

    def init(self, x_t: State) -> Carry:
        return {"previous": x_t.clone()}

    def _g(self, x: State, t: Time) -> Tensor:
        """The diffusion at (x, t), broadcastable against x."""
        g = 0.0 if self.diffusion is None else self.diffusion(x.clone(), -t.to(x.dtype))
        g = g if isinstance(g, Tensor) else torch.tensor(g, dtype=x.dtype, device=x.device)
        rows = (len(x), *(1,) * (x.ndim - 1))
        if tuple(g.shape) not in ((), rows, tuple(x.shape)) or g.is_complex():
            raise ValueError(
                f"diffusion was given x with shape {tuple(x.shape)} and must return that shape, {rows} or a number, "
                f"real; it returned {tuple(g.shape)} of {g.dtype}."
            )
        return g.to(x.dtype)

    def step(self, model: BoundModel, sde: SDE, x_t: State, t: Time, s: Time, noise: StepNoise, carry: Carry) -> Step:
        h, g = expand_like(t - s, x_t), self._g(x_t, t)
        dw = torch.zeros_like(x_t) if self.diffusion is None else noise.dw
        # The same signs again after a rejection, as the noise is.
        shift = h.sqrt() * noise.normal().sign() if self.signs else torch.zeros_like(h)
        low = x_t + h * model.output(x_t, t) + g * (dw - shift)
        high = (low + x_t + h * model.output(low, s) + self._g(low, s) * (dw + shift)) / 2
        euler = low + shift * g
        scale = torch.maximum(euler.abs(), carry["previous"].abs())
        return Step(high if self.extrapolate else euler, {"previous": euler}, euler - high, scale)
