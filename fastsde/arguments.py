"""Checks of arguments, before the first network call: what came, and what is allowed."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import os
import warnings
import weakref
from collections.abc import Mapping, Sequence
from numbers import Integral

import torch
from torch import Tensor, nn

from fastsde.checks import check_count, check_kind, check_number, check_positive, check_tensor
from fastsde.control import Adaptive, AdaptiveGrid, Controller, Grid
from fastsde.noise import ALL_NOISE
from fastsde.score.base import ScoreModel, innermost
from fastsde.sde.base import SDE
from fastsde.sde.discrete import DiscreteVPSDE
from fastsde.sde.edm import EDM
from fastsde.sde.flow import RectifiedFlow
from fastsde.solvers import Solver
from fastsde.types import Cond, ScoreFn

DEFAULT_RTOL = 0.05
"""Relative tolerance when nothing is said: the thesis's setting for fast results."""
_FLOW_WIDTH, _TABLE_WIDTH = 1.2, 100.0
"""Widths of `Grid.central` for flows and, as good as equal steps in log-SNR, for short tables."""
_SHORT_TABLE = 250
"""Levels of a table up to which it counts as short; 100 were measured, 1000 do not."""
_MOST_GRID = 1_000_000
"""Steps of a grid that is asked for: more would take days, and memory before the first call."""
_MOST_STEPS = 4096
"""Steps beyond which a tolerance is refused: single precision cannot tell such steps apart."""


def as_model(score_fn: ScoreModel | ScoreFn, sde: SDE | None) -> ScoreModel:
    """The score model that the caller means.

    Raises:
        TypeError, ValueError: if there is no process, or another than the model's, or the weights are not finite.
    """
    if isinstance(score_fn, (str, os.PathLike)):
        raise TypeError(
            f"score_fn must be a score model or a function; got {score_fn!r}. Open it first: "
            "sample(*fastsde.pretrained(...)) or, for models of diffusers, sample(*fastsde.from_diffusers(...))."
        )
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
        _check_weights(model.network)
    _check_time(model)
    return model


def _check_time(model: ScoreModel) -> None:
    """Warns of a network that reads a table of levels and would get times from 0 to 1."""
    inside = innermost(model)
    if type(inside) is not ScoreModel or inside.timestep is not None or inside.prediction == "score":
        return
    if isinstance(inside.sde, DiscreteVPSDE):
        n = inside.sde.levels
        warn(
            f"the network gets the time of {inside.sde}, from 0 to 1. One that was trained on levels 0 .. {n - 1} "
            f"needs ScoreModel(..., timestep=lambda t: {n} * t - 1); timestep=lambda t: t says that this one does not.",
            UserWarning,
        )


def warn(message: str, category: type[Warning]) -> None:
    """Warns, naming the line that called this package."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and str(frame.f_globals.get("__name__", "")).split(".")[0] == "fastsde":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level + 1)


_FINITE: weakref.WeakKeyDictionary[nn.Module, list[tuple[int, torch.dtype, int]]] = weakref.WeakKeyDictionary()
"""Networks whose weights were finite, and which tensors in which version those were: reading them all takes time."""


@torch.no_grad()
def _check_weights(network: nn.Module) -> None:
    """Refuses, with a ValueError that names the first, weights that hold NaN or infinity.

    They are read again after a cast, or a change that autograd would notice; writing through `.data` is none.
    """

    def wide(p: Tensor) -> Tensor:
        return p.float() if torch.finfo(p.dtype).bits == 8 else p  # such floats have no arithmetic

    weights = list(network.parameters())
    state = [(id(p), p.dtype, -1 if p.is_inference() else p._version) for p in weights]
    if _FINITE.get(network) == state and all(version >= 0 for *_, version in state):
        return
    # Offloaded weights are elsewhere.
    held = [p for p in weights if p.is_floating_point() and not p.is_meta]
    # Sums are many times faster than asking each weight, and a device is waited for once; but they may overflow.
    sums: dict[torch.device, list[Tensor]] = {}
    for p in held:
        sums.setdefault(p.device, []).append(wide(p).sum())
    if not all(bool(torch.stack(each).isfinite().all()) for each in sums.values()):
        for name, p in network.named_parameters():
            if p.is_floating_point() and not p.is_meta and not torch.isfinite(wide(p)).all():
                raise ValueError(f"the network's weights are not finite: {name} holds NaN or infinity.")
    _FINITE[network] = state


def resolve_shape(
    model: ScoreModel,
    n: int | None,
    shape: Sequence[int] | None,
    x_init: Tensor | None,
    index: Sequence[int] | Tensor | None,
    name: str = "x_init",
) -> tuple[int, tuple[int, ...], Tensor]:
    """Number of samples, event shape and sample numbers, from whichever arguments say so.

    `x_init` stands for any given states; `name` is what the caller calls them.

    Raises:
        TypeError, ValueError: if they say too little, disagree or hold numbers that are none.
    """
    if n is not None:
        n = check_count("n", n, 1)
    try:
        numbers = None if index is None else torch.as_tensor(index)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"index must be a vector of sample numbers; got {str(index)[:80]}.") from error
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
    shape = tuple(int(k) if isinstance(k, Integral) and not isinstance(k, bool) else k for k in shape)
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
        raise ValueError(f"{name} must have shape {shape}; got {tuple(x_init.shape)}.")
    most = _memory()
    if 8 * math.prod(shape) > most:
        raise ValueError(
            f"shape={str(shape)[:80]} is more numbers than this machine holds, {most / 1e9:.3g} GB. Draw the samples "
            "in parts: index=range(k, k + 1000) draws these numbers of the same seed."
        )
    return shape[0], shape[1:], torch.arange(shape[0]) if numbers is None else numbers.long()


def resolve_dtype(dtype: torch.dtype | None, x_init: Tensor | None) -> torch.dtype:
    """The dtype of the state: the one given, float64 for start states in float64, else float32.

    Raises:
        TypeError: if it is not real floating point.
    """
    if dtype is None:  # differences of neighbouring states are lost in half precision
        return torch.float64 if x_init is not None and x_init.dtype == torch.float64 else torch.float32
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise TypeError(f"dtype must be real floating point of 16 bits or more, such as torch.float32; got {dtype!r}.")
    return dtype


def _memory() -> float:
    """Bytes of main memory; infinity where the system does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return math.inf


def resolve_device(model: ScoreModel, device: torch.device | str | None, x_init: Tensor | None) -> torch.device:
    """The device of the run: the one given, that of the start states, or that of the network."""
    if device is not None:
        return usable_device(device)
    return model.device if x_init is None else x_init.device


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


def started(
    sde: SDE, given: Tensor | None, strength: float | None, t_start: float | None, controller: Controller | None
) -> SDE:
    """The process from where sampling starts: a copy with another t_max, if `strength` or `t_start` say so.

    Raises:
        ValueError: naming the argument and what is allowed.
    """
    said = {k: v for k, v in (("strength", strength), ("t_start", t_start)) if v is not None}
    if not said:
        return sde
    if len(said) == 2 or controller is not None:
        others = "strength and t_start" if len(said) == 2 else f"{next(iter(said))} and controller"
        raise ValueError(f"give {others} apart: both say where to start.")
    if given is None:
        raise ValueError(f"{next(iter(said))} starts in the middle: give x_data=, the data to edit, or x_init=.")
    if strength is not None:
        check_number("strength", strength, 0.0, 1.0, ends="(]")
        if isinstance(sde, EDM):
            raise ValueError("strength is a share of the time, which for EDM is the noise: give t_start=, its sigma.")
        # Rounding may end a little outside of the range.
        t_start = min(max(sde.t_min + strength * (sde.t_max - sde.t_min), math.nextafter(sde.t_min, 1e9)), sde.t_max)
    cut = copy.copy(sde)
    cut.t_max = check_number("t_start", t_start, sde.t_min, sde.t_max, ends="(]")
    return cut


def check_start(sde: SDE, t: float) -> None:
    """Refuses, with a ValueError, to draw the start from the prior where data are seen already."""
    noise = math.exp(-0.5 * float(sde.log_snr(torch.tensor([t], dtype=torch.float64))))
    if t < sde.t_max and noise < ALL_NOISE:
        raise ValueError(
            f"the grid starts at t = {t:g}, below t_max = {sde.t_max:g}, where sigma / alpha is {noise:.3g}: noise "
            "alone is not the law there. Give x_data=, the data to edit, or x_init=, states of that time; or let it "
            "start at t_max."
        )


def resolve_controller(
    model: ScoreModel,
    sde: SDE,
    solver: Solver,
    controller: Controller | None,
    rtol: float | None,
    atol: float | None,
    nfe: int | None = None,
    denoise: bool = True,
) -> Controller:
    """The controller asked for, after refusing pairs that cannot work.

    Raises:
        TypeError, ValueError: naming the argument and what to use instead.
    """
    if not isinstance(solver, Solver):
        raise TypeError(f"solver must be an object such as fastsde.EulerMaruyama(steps=1000); got {solver!r}.")
    name = type(solver).__name__
    tolerances = {k: v for k, v in (("rtol", rtol), ("atol", atol)) if v is not None}
    said = [*tolerances, *(["solver.steps"] if solver.steps is not None else [])]
    if solver.times is not None:
        said += [*(["nfe"] if nfe is not None else []), *(["controller"] if controller is not None else [])]
        if said:
            raise ValueError(f"{name} walks its own times and takes no {' or '.join(said)}.")
        return Grid(list(solver.times))
    if controller is not None:
        if not isinstance(controller, Controller):
            raise TypeError(f"controller must be a fastsde.Grid, AdaptiveGrid or Adaptive; got {controller!r}.")
        said += ["nfe"] * (nfe is not None)
        if said:
            raise ValueError(f"give either controller= or {', '.join(said)}, not both.")
        if controller.adaptive and not solver.adaptive:
            raise ValueError(f"{name} has no error estimate, so it cannot be adaptive; use Grid or ExponentialPC().")
        return controller
    if nfe is not None:
        if said:
            raise ValueError(f"give either nfe= or {', '.join(said)}, not both.")
        return own_grid(sde, solver, affordable(model, solver, check_count("nfe", nfe, 1), denoise), denoise)
    if solver.adaptive:
        low, high = model.data_range
        level = (high - low) / 256 if atol is None else atol
        return _adaptive(sde, solver, DEFAULT_RTOL if rtol is None else rtol, level, denoise)
    if tolerances:
        raise ValueError(f"{name} walks a fixed grid and takes no {' or '.join(tolerances)}; use ExponentialPC().")
    if solver.steps is None:
        raise ValueError(
            f"{name} needs its number of steps: {name}({solver.grid_hint}), or controller=fastsde.Grid(...)."
        )
    return own_grid(sde, solver, solver.steps, denoise)


def _adaptive(sde: SDE, solver: Solver, rtol: float, atol: float, denoise: bool) -> Controller:
    """The controller of an adaptive solver: a grid of as many steps as the tolerance asks for, or steps from errors.

    The grid is an `AdaptiveGrid` without finer ones: nobody starts again, and steps go through the times of a
    trajectory. Restarts are on request: on trained networks they cost more than they gave (docs/solver.md).
    """
    rtol, atol = check_positive("rtol", rtol), check_positive("atol", atol)
    rule = Adaptive(rtol, atol, r=solver.error_power, resolution=solver.resolution)
    step = solver.base_step(rtol)
    if step is not None:
        first, last = sde.log_snr(torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)).tolist()
        # The last two steps of a tapered grid are shorter, by 0.45 of a step in all; a longer first shortens the rest.
        steps = max(3, round((last - first) / 2 / step + 0.45))
        if steps > _MOST_STEPS:
            least = rtol * (steps / _MOST_STEPS) ** 2
            raise ValueError(
                f"rtol must be at least {least:.1g} for {type(solver).__name__}: {rtol} asks for {steps} steps. "
                "ProbabilityFlow() is of higher order."
            )
        if solver.keep_path and steps > 1 / solver.resolution:
            least = rtol * (steps * solver.resolution) ** 2
            raise ValueError(
                f"rtol must be at least {least:.1g} with noise, or steps fall below its path's; got {rtol}."
            )
        return AdaptiveGrid([own_grid(sde, solver, steps, denoise)], rtol, atol)
    if solver.log_snr_steps:
        # Steps there change slowly: a growth of 10 and a safety of 0.9 would only buy rejections.
        return dataclasses.replace(rule, clock=sde, h_init=1.0, growth=2.0, safety=0.8)
    return rule


def affordable(model: ScoreModel, solver: Solver, nfe: int, denoise: bool) -> int:
    """The number of steps that `nfe` calls pay for, the first and the last call of a sample included."""
    least = fewest_calls(model, solver, denoise)
    if nfe < least:
        raise ValueError(f"nfe must be at least {least} for one step of {type(solver).__name__}; got {nfe}.")
    return 1 + (nfe - least) // (model.calls * solver.calls_per_step)


def fewest_calls(model: ScoreModel, solver: Solver, denoise: bool) -> int:
    """Network calls of a sample that takes one step, the first and the last call included."""
    return model.calls * (solver.calls_per_step * (1 + solver.warm_up) + (denoise and not solver.keeps_x_0))


def own_grid(sde: SDE, solver: Solver, steps: int, denoise: bool = True) -> Grid:
    """The grid that a solver walks when only the number of steps is said.

    Args:
        sde: the process.
        solver: the solver.
        steps: number of steps, at least 1.
        denoise: whether the result is the denoised sample; else it is the state at t_min, where the grid then ends.

    Raises:
        ValueError: for more steps than a run could take.
    """
    if steps > _MOST_GRID:
        raise ValueError(f"nfe and steps may say at most {_MOST_GRID:,} steps of a grid; got {steps:,}.")
    if solver.tapered_steps:
        grid = plain_grid(sde, steps) if denoise else Grid.tapered(sde, steps)
    else:
        # EDM's time is the noise, of which equal steps would leave nothing for where data are decided.
        equal = Grid.log_snr if solver.log_snr_steps or isinstance(sde, EDM) else Grid.uniform
        grid = equal(sde, steps)
    return grid if solver.clock_power is None or not solver.keep_path else _on_cells(grid, sde)


def plain_grid(sde: SDE, steps: int) -> Grid:
    """The grid of `ExponentialPC` for a process: `Grid.central` on flows and short tables, else `Grid.tapered`.

    The ends of a flow are no levels that somebody chose: beyond 1 / steps nothing is decided, and half of the steps in
    log-SNR would be spent there. Nor has the network of a short table learned what lies between its lowest levels,
    which are up to 0.7 apart in half the log-SNR.
    """
    if isinstance(sde, RectifiedFlow):
        return Grid.central(sde, steps, _FLOW_WIDTH)
    if isinstance(sde, DiscreteVPSDE) and sde.levels <= _SHORT_TABLE:
        return Grid.central(sde, steps, _TABLE_WIDTH, first=None)
    return Grid.tapered(sde, steps)


def _on_cells(grid: Grid, sde: SDE) -> Grid:
    """A grid with its times on borders of the cells of a `BrownianPath` over the process, in the log-SNR.

    There its value takes few normals. A border is a multiple of 2^-k of the range of the log-SNR; with
    k = 4 + ceil(log2 n) one is a 32nd of the mean of n steps away at most. n is the number of steps, or more where one
    is shorter than half of their mean, so that times stay apart. Ends of the process stay as they are.
    """
    start, end = sde.log_snr(torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)).tolist()
    share = (sde.log_snr(grid.times) - start) / (end - start)
    cells = 16 * 2.0 ** math.ceil(math.log2(max(grid.steps, 0.5 / float(share.diff().min()))))
    times = sde.t_of_log_snr(start + (share * cells).round() / cells * (end - start))
    times[0] = grid.times[0]
    if grid.times[-1] == sde.t_min:
        times[-1] = sde.t_min
    return Grid(times)


def resolve_cond(model: ScoreModel, cond: Cond | None, n: int, device: torch.device) -> dict[str, Tensor]:
    """The conditioning on the right device; the model's default repeated n times for what the caller left out.

    Raises:
        TypeError, ValueError: if it is no dict of tensors with leading axis n, or not what the network takes.
    """
    check_kind("cond", cond, Mapping, "a dict of tensors")
    default = {k: v.expand(n, *v.shape) for k, v in (model.default_cond or {}).items()}
    for key, value in (cond or {}).items():
        if not isinstance(key, str) or key == "self":
            raise ValueError(f"cond has the key {key!r}; keys are names of arguments of the network.")
        if isinstance(value, Tensor):
            check_tensor(f"cond[{key!r}]", value)
        if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != n:
            came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"cond[{key!r}] must be a tensor with leading axis n={n}; got {came}.")
    full = {k: v.to(device) for k, v in {**default, **(cond or {})}.items()}
    model.check_cond(full)
    return full
