"""`sample`: check the arguments, choose the defaults, build the parts, run the engine."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import SupportsIndex

import torch
from torch import Tensor, nn

from fastsde.control import Adaptive, Controller, Grid
from fastsde.engine import Engine, EngineState, Job
from fastsde.noise import BrownianPath, FreshNoise
from fastsde.result import SampleResult
from fastsde.score.base import ScoreModel
from fastsde.sde.base import SDE
from fastsde.solvers import ExtrapolatedEM, Solver
from fastsde.types import Cond, ScoreFn

DEFAULT_RTOL = 0.05
"""Relative tolerance when nothing is said: the thesis's setting for fast results."""


def sample(
    score_fn: ScoreModel | ScoreFn,
    sde: SDE | None = None,
    *,
    n: int | None = None,
    shape: Sequence[int] | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    solver: Solver | None = None,
    controller: Controller | None = None,
    seed: int = 0,
    index: Sequence[int] | Tensor | None = None,
    batch_size: int | None = None,
    cond: Cond | None = None,
    x_init: Tensor | None = None,
    denoise: bool = True,
    max_nfe: int = 10_000,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    callback: Callable[[EngineState], None] | None = None,
) -> SampleResult:
    r"""Draws samples by solving the reverse-time SDE from `sde.t_max` to `sde.t_min`.

    By default the adaptive extrapolating solver (Algorithm 6 of "Gotta Go Fast") chooses a step size for each sample
    from `rtol` and `atol`. Sample i depends on (seed, i) and on nothing else: not on n, the batch size or its
    neighbours. At `t_min` the sample is denoised, E[x_0 | x_t] = (x_t + sigma^2 score) / alpha, with one more call.

    Args:
        score_fn: `score_fn(x, t)`, with x of shape (B, *event) and t of shape (B,), returning the score with the shape
            of x; or a `ScoreModel`, which reads other kinds of networks. A torch module runs in evaluation mode.
        sde: the forward process the score belongs to; a `ScoreModel` brings its own.
        n: number of samples, if the model knows its event shape (or with `shape` or `index`, which must then agree).
        shape: (n, *event).
        rtol: relative tolerance, positive; 0.05 by default. For adaptive solvers.
        atol: absolute tolerance in units of the data; by default one 8-bit level of the model's data range, that is
            (high - low) / 256: 1/128 for a plain function, taken to be for data in [-1, 1].
        solver: the stepping method, `ExtrapolatedEM()` by default.
        controller: overrides what rtol, atol and the solver's `steps` say: `Adaptive(...)` or `Grid(...)`.
        seed: in [0, 2^64).
        index: draw these sample numbers of the seed, rather than 0 .. n - 1.
        batch_size: rows evaluated at a time; at most 64 by default.
        cond: keyword arguments of the network, each with leading axis n; they travel with their sample.
        x_init: start states with shape (n, *event), rather than draws from the prior.
        denoise: whether to return the denoised sample rather than the state at `t_min`.
        max_nfe: a sample that would need more calls ends with `Status.MAX_NFE`.
        dtype: floating dtype of the state; that of `x_init`, or float32.
        device: that of `x_init` or of the network by default.
        progress: show a bar over finished samples, with their mean NFE.
        callback: called with an `EngineState` after every turn of the engine.

    Returns:
        A `SampleResult` with samples of shape (n, *event) and the cost of each. A failure of single samples is data:
        their `status` says so and the others finish. Ctrl-C returns what is finished.

    Raises:
        ValueError, TypeError: before the first network call, naming the argument, what came and what is allowed.
        SamplingError: if the network fails after the first sample was finished; the finished ones are in `.result`.
    """
    for name, value, fits, kind in (
        ("x_init", x_init, isinstance(x_init, Tensor), "a tensor"),
        ("cond", cond, isinstance(cond, Mapping), "a dict of tensors"),
        ("callback", callback, callable(callback), "callable"),
    ):
        if value is not None and not fits:
            raise TypeError(f"{name} must be {kind}; got {type(value).__name__}.")
    model = _as_model(score_fn, sde)
    process = model.sde if sde is None else sde
    count, event, numbers = _resolve_shape(model, n, shape, x_init, index)
    dtype = _resolve_dtype(dtype, x_init)
    target = _resolve_device(model, device, x_init)
    solver = ExtrapolatedEM() if solver is None else solver
    controller = _resolve_controller(model, process, solver, controller, rtol, atol)
    controller.check(process.t_min, process.t_max)
    if not isinstance(denoise, bool):
        raise TypeError(f"denoise must be True or False; got {denoise!r}.")
    seed = _check_count("seed", seed, 0)
    max_nfe = _check_count("max_nfe", max_nfe, model.calls * (solver.calls_per_step + (denoise or solver.warm_up)))
    batch = min(count, 64) if batch_size is None else _check_count("batch_size", batch_size, 1)
    noise = (
        BrownianPath(seed, event, dtype, t_min=process.t_min, t_max=process.t_max)
        if solver.keep_path
        else FreshNoise(seed, event, dtype)
    )
    job = Job(
        model=model,
        sde=process,
        solver=solver,
        controller=controller,
        noise=noise,
        index=numbers.to(target),
        cond=_resolve_cond(model, cond, count, target),
        x_init=None if x_init is None else x_init.to(target, dtype),
        denoise=denoise,
        max_nfe=max_nfe,
        batch_size=min(batch, count),
        progress=progress,
        callback=callback,
        lag=1 if target.type == "cuda" else 0,
    )
    with torch.no_grad(), _evaluation_mode(model.network):
        return Engine(job).run()


def _as_model(score_fn: ScoreModel | ScoreFn, sde: SDE | None) -> ScoreModel:
    if isinstance(score_fn, ScoreModel) and (sde is None or isinstance(sde, SDE)):
        model = score_fn
        if sde is not None and sde is not model.sde:
            t = torch.linspace(max(sde.t_min, model.sde.t_min), min(sde.t_max, model.sde.t_max), 5, dtype=torch.float64)
            pairs = ((sde.log_snr(t), model.sde.log_snr(t)), (sde.log_alpha(t), model.sde.log_alpha(t)))
            if not all(torch.allclose(a, b) for a, b in pairs):
                raise ValueError(f"sde is {sde}, but the score model was built for {model.sde}: leave sde out.")
    elif not isinstance(sde, SDE):
        raise TypeError(f"sde must be an SDE such as fastsde.VPSDE(); got {sde!r}.")
    else:
        model = ScoreModel(score_fn, sde)
    if isinstance(model.network, nn.Module):
        for name, parameter in model.network.named_parameters():
            if parameter.is_floating_point() and not torch.isfinite(parameter).all():
                raise ValueError(f"the network's weights are not finite: {name} holds NaN or infinity.")
    return model


def _resolve_shape(
    model: ScoreModel,
    n: int | None,
    shape: Sequence[int] | None,
    x_init: Tensor | None,
    index: Sequence[int] | Tensor | None,
) -> tuple[int, tuple[int, ...], Tensor]:
    """Number of samples, event shape and sample numbers, from whichever arguments say so."""
    if n is not None:
        n = _check_count("n", n, 1)
    numbers = None if index is None else torch.as_tensor(index)
    if numbers is not None and (numbers.ndim != 1 or numbers.dtype not in (torch.int64, torch.int32)):
        raise ValueError(f"index must be a vector of sample numbers; got {tuple(numbers.shape)} of {numbers.dtype}.")
    if numbers is not None and len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < 1 << 32:
        raise ValueError(f"index must be in [0, 2^32); got {int(numbers.min())} .. {int(numbers.max())}.")
    if shape is None and x_init is not None:
        shape = tuple(x_init.shape)
    if shape is None:
        count = n if numbers is None or n is not None else len(numbers)
        if model.event_shape is None or count is None:
            hint = "shape=(n, *event)" if model.event_shape is None else "n= or shape=(n, *event)"
            raise ValueError(f"how many samples of which shape? Give {hint}, for example shape=(64, 3, 32, 32).")
        shape = (count, *model.event_shape)
    if not isinstance(shape, Sequence):
        raise TypeError(f"shape must be (n, *event), for example (64, 3, 32, 32); got {shape!r}.")
    shape = tuple(shape)
    if not shape or any(not isinstance(k, int) or isinstance(k, bool) for k in shape) or min(shape) < 1:
        raise ValueError(f"shape must be (n, *event) with positive integers; got {shape}.")
    counts = {"n": n, "shape": shape[0], "index": None if numbers is None else len(numbers)}
    said = {name: count for name, count in counts.items() if count is not None}
    if len(set(said.values())) > 1:
        raise ValueError(f"the number of samples disagrees: {', '.join(f'{k} says {c}' for k, c in said.items())}.")
    if model.event_shape is not None and shape[1:] != tuple(model.event_shape):
        raise ValueError(
            f"the model's samples have shape {tuple(model.event_shape)}; got {shape[1:]} in shape={shape}."
        )
    if x_init is not None and tuple(x_init.shape) != shape:
        raise ValueError(f"x_init must have shape {shape}; got {tuple(x_init.shape)}.")
    if x_init is not None and not torch.isfinite(x_init).all():
        raise ValueError("x_init holds NaN or infinity.")
    return shape[0], shape[1:], torch.arange(shape[0]) if numbers is None else numbers.long()


def _resolve_dtype(dtype: torch.dtype | None, x_init: Tensor | None) -> torch.dtype:
    dtype = dtype or (torch.float32 if x_init is None else x_init.dtype)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"the state must be real floating point (dtype=torch.float32 or float64); got {dtype}.")
    return dtype


def _resolve_device(model: ScoreModel, device: torch.device | str | None, x_init: Tensor | None) -> torch.device:
    parameter = model.parameter
    if device is not None:
        return usable_device(device)
    if x_init is not None:
        return x_init.device
    return torch.device("cpu") if parameter is None else parameter.device


def usable_device(device: torch.device | str) -> torch.device:
    """The device of that name, if tensors can live there.

    Raises:
        ValueError: if this torch does not know it or cannot use it here.
    """
    try:
        probe = torch.empty(0, device=device)
        probe.cpu()  # fails on "meta", which holds no numbers
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be one this torch can use, such as 'cpu'; got {device!r} ({reason}).") from error
    return probe.device


def _resolve_controller(
    model: ScoreModel,
    sde: SDE,
    solver: Solver,
    controller: Controller | None,
    rtol: float | None,
    atol: float | None,
) -> Controller:
    """The controller asked for, after refusing pairs that cannot work."""
    if not isinstance(solver, Solver):
        raise TypeError(f"solver must be an object such as fastsde.EulerMaruyama(steps=1000); got {solver!r}.")
    name = type(solver).__name__
    tolerances = {k: v for k, v in (("rtol", rtol), ("atol", atol)) if v is not None}
    if controller is not None:
        if not isinstance(controller, Controller):
            raise TypeError(f"controller must be a fastsde.Grid or fastsde.Adaptive; got {controller!r}.")
        if tolerances or solver.steps is not None:
            said = ", ".join([*tolerances, *(["solver.steps"] if solver.steps is not None else [])])
            raise ValueError(f"give either controller= or {said}, not both.")
        if controller.adaptive and not solver.adaptive:
            raise ValueError(f"{name} has no error estimate, so it cannot be adaptive; use Grid or ExtrapolatedEM().")
        return controller
    if solver.adaptive:
        low, high = model.data_range
        level = (high - low) / 256 if atol is None else atol
        return Adaptive(DEFAULT_RTOL if rtol is None else rtol, level)
    if tolerances:
        raise ValueError(f"{name} walks a fixed grid and takes no {' or '.join(tolerances)}; use ExtrapolatedEM().")
    if solver.steps is None:
        raise ValueError(f"{name} needs its number of steps: {name}(steps=...), or controller=fastsde.Grid(...).")
    return (Grid.log_snr if solver.log_snr_steps else Grid.uniform)(sde, solver.steps)


def _resolve_cond(model: ScoreModel, cond: Cond | None, n: int, device: torch.device) -> dict[str, Tensor]:
    """The conditioning on the right device; the model's default repeated n times for what the caller left out."""
    default = {k: v.expand(n, *v.shape) for k, v in (model.default_cond or {}).items()}
    for key, value in (cond or {}).items():
        if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != n:
            came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"cond[{key!r}] must be a tensor with leading axis n={n}; got {came}.")
    return {k: v.to(device) for k, v in {**default, **(cond or {})}.items()}


def _check_count(name: str, value: SupportsIndex, least: int) -> int:
    """An integer of at least `least`, numpy's kinds included, and not too large for a tensor."""
    try:
        count = operator.index(value)
    except TypeError:
        count = least - 1
    if isinstance(value, bool) or count < least or (count >= 1 << 62 and name != "seed"):
        raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}.")
    return count


@contextlib.contextmanager
def _evaluation_mode(network: ScoreFn) -> Iterator[None]:
    """Switches dropout and batch statistics off for the time of sampling; each submodule gets its own mode back."""
    modules = list(network.modules()) if isinstance(network, nn.Module) else []
    modes = [module.training for module in modules]
    if isinstance(network, nn.Module):
        network.eval()
    try:
        yield
    finally:
        for module, training in zip(modules, modes, strict=True):
            module.training = training
