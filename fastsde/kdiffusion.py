r"""Samplers in k-diffusion's signature, for hosts with a loop of their own: ComfyUI, Forge, scripts.

A host calls `sampler(model, x, sigmas, extra_args=, callback=, disable=)`. Its `model(x, sigma, **extra_args)`, with x
of shape (B, *event) and sigma of shape (B,), returns the denoised sample E[x_0 | x]. Two conventions share that:

    x = x_0 + sigma eps                     k-diffusion, and every host's models of Stable Diffusion 1, 2 and XL
    x = (1 - sigma) x_0 + sigma eps         flows (Flux, SD3, Wan ..) in ComfyUI and Forge, sigma in [0, 1]

`sigmas`, with shape (n + 1,), falls from the level of x, as a rule to 0. Source of the signature: Karras et al.,
https://arxiv.org/abs/2206.00364, as k-diffusion implements it.

The model is always called with the whole batch, at one level: a host binds its prompts, masks and control images to the
batch, and ComfyUI reads the level of the first item for all. So every item walks the same levels.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastsde.arguments import resolve_samples
from fastsde.batching import expand_like
from fastsde.checks import (
    check_count,
    check_instance,
    check_kind,
    check_number,
    check_positive,
    check_states,
    check_tensor,
)
from fastsde.control import Grid
from fastsde.engine import Engine
from fastsde.job import Options, make_job
from fastsde.noise import Noise
from fastsde.result import SamplingError
from fastsde.score.base import ScoreModel
from fastsde.score.network import check_output
from fastsde.sde.edm import EDM
from fastsde.sde.flow import RectifiedFlow
from fastsde.solvers import ExponentialPC, FittedSolver
from fastsde.steps import resolve_controller
from fastsde.types import Carry, Coef, Cond, Index, State, Time

Model = Callable[..., Tensor]
"""`model(x, sigma, **extra_args)`: the denoised sample."""
NoiseSampler = Callable[[Tensor, Tensor], Tensor]
"""`noise_sampler(sigma, sigma_next)`: standard normals with the shape of x."""
Callback = Callable[[dict[str, Any]], object]
"""Is given "x", "i", "sigma", "sigma_hat" and "denoised" after each call of the model."""

_LEAST, _MOST = 1e-4, 1e6
"""sigma / alpha at the ends of the Brownian paths: the same for all runs, so that noise belongs to a level and two runs
that split a range between them do not see the same noise twice."""
_ALL_NOISE = 1 - 1 / _MOST
"""Where a flow that starts at sigma = 1 is taken to start: there the log-SNR is finite, and the difference is below
single precision."""
_PLANNED = RectifiedFlow().t_max
"""Where the steps of a flow that rtol plans begin to count: above it nothing is decided."""
_MOST_ETA = 2.0
"""With more noise the paths at high levels are below what single precision holds."""
_SAME_START = 2e-3
"""Share by which the first level of a fitted solver may differ from the host's: flows start at 0.999 or at 1."""


def sample_exponential_pc(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    *,
    eta: float = 0.0,
    noise_sampler: NoiseSampler | None = None,
    fitted: FittedSolver | str | os.PathLike[str] | None = None,
    flow: bool | None = None,
    seed: int | None = None,
    index: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """`ExponentialPC` on the host's levels, or a fitted solver on its own: one call of the model a level.

    Args:
        model: `model(x, sigma, **extra_args)`, which returns the denoised sample.
        x: the host's start state at sigmas[0], with shape (B, *event).
        sigmas: falling levels, with shape (n + 1,); equal neighbours count once. With fewer than two x is returned.
        extra_args: keyword arguments of every call of the model, as they are.
        callback: called after each call of the model with a dict: "x", the state that it was called on; "i", the number
            of the call from 0; "sigma" and "sigma_hat", its level; "denoised". Where `sigmas` ends above 0, the call at
            its last level is not told of: hosts count n of them.
        disable: whether to hide the progress bar; None hides it where there is no terminal.
        eta: noise from 0 (probability flow) to 2, 1 for the reverse-time SDE. Of a fitted solver it is its own.
        noise_sampler: `noise_sampler(sigma, sigma_next)`, which returns standard normals with the shape of x. By
            default noise is a function of the seed, an item's index and the level, and so the same in any batch.
        fitted: a solver that `fastsde.fit` made for this network, or its file. It walks its own levels, which must
            start at sigmas[0], and those of `sigmas` but the first are not read. Its network cannot be compared with
            the host's: that they are the same is for the caller to know.
        flow: whether x = (1 - sigma) x_0 + sigma eps rather than x_0 + sigma eps. Not needed where the host's model
            tells (ComfyUI, Forge, k-diffusion's wrappers) or sigmas[0] is above 1, which no flow is.
        seed: in [0, 2^64); by default `extra_args["seed"]`, which ComfyUI gives; else drawn from torch's generator.
        index: an item's number in the seed's stream, B of them; by default its place in the batch.

    Returns:
        The denoised sample at the last level above 0 if `sigmas` ends in 0; else the state at the last level, for which
        the model is called there as well. With the shape and the dtype of x; NaN for an item whose model gave it.

    Raises:
        TypeError, ValueError: before the first call of the model, naming the argument, what came and what is allowed.
    """
    levels = _levels(sigmas)
    check_number("eta", eta, 0.0, _MOST_ETA)
    solver = ExponentialPC(eta=eta) if fitted is None else _fitted(fitted, eta)
    if len(levels) < 2:
        return x
    host = _Host(model, x, sigmas, levels, extra_args, callback, flow)
    if isinstance(solver, FittedSolver):
        solver = host.refitted(solver)
        levels = [*solver.times, 0.0]
    return host.walk(solver, levels, disable, noise_sampler, seed, index)


def sample_adaptive(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    *,
    rtol: float = 0.05,
    eta: float = 0.0,
    noise_sampler: NoiseSampler | None = None,
    flow: bool | None = None,
    seed: int | None = None,
    index: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """`ExponentialPC` on levels of its own, as many as `rtol` asks for, from sigmas[0] to the last one above 0.

    They are those of `fastsde.sample(rtol=)`. Of `sigmas` only its ends are read.

    Args:
        model, x, sigmas, extra_args, callback, disable: as for `sample_exponential_pc`.
        rtol: relative tolerance, positive.
        eta, noise_sampler, flow, seed, index: as for `sample_exponential_pc`.

    Returns, raises:
        As `sample_exponential_pc`.
    """
    levels = _levels(sigmas)
    check_number("eta", eta, 0.0, _MOST_ETA)
    check_positive("rtol", rtol)
    solver = ExponentialPC(eta=eta)
    if len(levels) < 2:
        return x
    host = _Host(model, x, sigmas, levels, extra_args, callback, flow)
    return host.walk(solver, host.planned(solver, rtol), disable, noise_sampler, seed, index)


class _Host(ScoreModel):
    """The host's model as a score model, and the walks that it can be taken on; `levels` are `sigmas` as numbers."""

    role = "the model"

    def __init__(
        self,
        model: Model,
        x: Tensor,
        sigmas: Tensor,
        levels: list[float],
        extra_args: Mapping[str, Any] | None,
        callback: Callback | None,
        flow: bool | None,
    ) -> None:
        check_states("x", x)
        check_kind("extra_args", extra_args, Mapping, "a dict of keyword arguments of the model")
        check_instance("model", model, Callable, "callable")
        check_kind("callback", callback, Callable, "callable")
        self.flow = _is_flow(model, levels[0], flow)
        low = min([_LEAST, *(v for v in levels if v > 0)])
        sde = RectifiedFlow(t_min=low, t_max=_ALL_NOISE) if self.flow else EDM(t_min=low, t_max=max(_MOST, levels[0]))
        super().__init__(model, sde, "sample")
        self.x, self.sigmas, self.levels, self.scale = x, sigmas, levels, 1.0
        self.extra_args, self.tell = dict(extra_args or {}), callback
        self.start, self.calls_made, self.told, self.bar = sde.t_max, 0, 0, tqdm(disable=True)

    def check_cond(self, cond: Cond) -> None:
        """Nothing: which rows are in flight is not the model's to know."""

    def level_at(self, t: Time) -> Tensor:
        """The host's level at the times of the rows, without axes; items that have failed stay behind, above it."""
        now = t.min()
        return torch.where(now >= self.start, self.levels[0], now).to(self.sigmas)

    def output(self, x_t: State, t: Time, cond: Cond | None = None) -> State:
        rows, sigma = (cond or {})["row"], self.level_at(t)
        whole = x_t.to(self.x.dtype, copy=True)
        missing = len(rows) < len(self.x)
        if missing:  # of items that have failed, which the model's prompts and masks still count
            whole = whole[:1].repeat(len(self.x), *[1] * (x_t.ndim - 1)).index_copy(0, rows, whole)
        denoised = self.network(whole, sigma.to(whole).repeat(len(whole)), **self.extra_args)
        denoised = check_output(denoised, whole, self.role)
        if self.tell is not None and self.calls_made < self.told:
            self.tell({"x": whole, "i": self.calls_made, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        self.calls_made += 1
        self.bar.update()
        return (denoised.index_select(0, rows) if missing else denoised).to(x_t.dtype)

    def planned(self, solver: ExponentialPC, rtol: float) -> list[float]:
        """Levels as `sample(rtol=)` chooses them, between the host's first and its last above 0."""
        first, last = self.levels[0], self.levels[-1]
        low = last or self.levels[-2]
        if low == first:
            return self.levels
        top = min(first, _PLANNED) if self.flow and low < _PLANNED else first
        part = RectifiedFlow(t_min=low, t_max=min(top, _ALL_NOISE)) if self.flow else EDM(t_min=low, t_max=top)
        controller = resolve_controller(self, part, solver, None, rtol, None, denoise=last == 0)
        return [first, *controller.all_grids()[0].times[1:].tolist(), *([0.0] if last == 0 else [])]

    def refitted(self, solver: FittedSolver) -> FittedSolver:
        """The solver at its log-SNR in the host's process, in which its weights, of x / alpha and x_0, are the same.

        One that starts elsewhere than the host, or a host that does not end at 0, is refused.
        """
        if self.levels[-1] > 0:
            raise ValueError(f"fitted ends with the denoised sample: sigmas must end in 0; got {self.levels[-1]:g}.")
        times = self.sde.t_of_log_snr(torch.tensor(solver.log_snr, dtype=torch.float64)).tolist()
        if not math.isclose(times[0], self.levels[0], rel_tol=_SAME_START):
            raise ValueError(
                f"fitted starts at sigma = {times[0]:g} in the host's process, x is at sigmas[0] = {self.levels[0]:g}: "
                f"it was fitted to another process or range, {solver.record.get('sde', 'unknown')}."
            )
        self.scale = times[0] / self.levels[0]
        return dataclasses.replace(solver.for_any_model(), times=tuple(times))

    def walk(
        self,
        solver: ExponentialPC,
        levels: Sequence[float],
        disable: bool | None,
        noise_sampler: NoiseSampler | None,
        seed: int | None,
        index: Sequence[int] | Tensor | None,
    ) -> Tensor:
        """What the two samplers return, for the given solver and levels; arguments are theirs."""
        check_kind("noise_sampler", noise_sampler, Callable, "a function of two levels")
        stochastic = not solver.deterministic
        denoise, items = levels[-1] == 0, torch.arange(len(self.x), device=self.x.device)
        number = self._seed(seed, needed=noise_sampler is None and stochastic)
        samples = resolve_samples(self, given=self.x, name="x", index=index, seed=number, cond={"row": items})
        x = self.x * self.scale
        samples = dataclasses.replace(samples, start=x)
        if noise_sampler is not None and stochastic:
            noise = _HostNoise(noise_sampler, self.level_at, samples.event, samples.dtype)
            samples = dataclasses.replace(samples, noise=noise, index=items)
        # One start for every level that the process does not tell from pure noise.
        times = list(dict.fromkeys(min(v, self.sde.t_max) for v in levels if v > 0))
        self.start = times[0] if levels[0] == self.levels[0] else math.inf
        self.told = len(times) if denoise else len(times) - 1
        with tqdm(total=len(times), disable=disable) as self.bar:
            if len(times) == 1:
                with torch.no_grad():
                    return self.output(x, torch.full((len(x),), times[0], dtype=torch.float64), {"row": items})
            span, options = (times[0], times[-1]), Options(batch_size=len(x))
            try:
                job = make_job(self, self.sde, solver, Grid(times), span, samples, options, denoise=denoise)
                result = Engine(job).run()
            except SamplingError as error:  # hosts know their own exceptions, such as for a stop
                raise (error.__cause__ or error) from None
        return result.samples.to(x.dtype)

    def _seed(self, seed: int | None, *, needed: bool) -> int:
        if seed is not None:
            return check_count("seed", seed, 0)
        if not needed:
            return 0
        given = self.extra_args.get("seed")
        return int(torch.randint(2**63 - 1, ())) if given is None else check_count("seed", given, 0)


class _HostNoise(Noise):
    """Increments of variance t - s from a host's noise sampler, which draws for the whole batch."""

    def __init__(
        self, draw: NoiseSampler, level_at: Callable[[Time], Tensor], event: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        super().__init__(0, event, dtype)
        self.draw, self.level_at = draw, level_at

    def increment(self, index: Index, attempt: Index, t: Time, s: Time, carry: Carry) -> tuple[State, Coef, Carry]:
        if torch.equal(t, s):  # before the first step
            return torch.zeros(len(t), *self.event_shape, dtype=self.dtype, device=t.device), t - s, {}
        z = self.draw(self.level_at(t), self.level_at(s))
        if not isinstance(z, Tensor) or z.shape[1:] != self.event_shape or len(z) < len(index):
            came = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise ValueError(f"noise_sampler must return normals with the shape of x; got {came}.")
        z = z.to(t.device, self.dtype).index_select(0, index)
        return expand_like((t - s).sqrt(), z) * z, t - s, {}


def _levels(sigmas: Tensor) -> list[float]:
    """The host's levels as numbers, each once; what is no falling vector is refused."""
    check_tensor("sigmas", sigmas)
    if sigmas.ndim != 1 or not sigmas.is_floating_point():
        raise ValueError(f"sigmas must be a vector of levels; got {tuple(sigmas.shape)} of {sigmas.dtype}.")
    values = sigmas.detach().double().cpu().unique_consecutive()
    if not torch.isfinite(values).all() or (values < 0).any() or (values.diff() > 0).any():
        raise ValueError(f"sigmas must fall, from the level of x to 0 or above; got {str(values.tolist())[:80]}.")
    return values.tolist()


def _fitted(given: object, eta: float) -> FittedSolver:
    solver = FittedSolver.load(given) if isinstance(given, (str, os.PathLike)) else given
    if not isinstance(solver, FittedSolver):
        raise TypeError(f"fitted must be a fastsde.FittedSolver or the file of one; got {type(given).__name__}.")
    if eta not in (0.0, solver.eta):
        raise ValueError(f"eta is fitted's own, {solver.eta:g}: leave it out; got {eta:g}.")
    return solver


def _is_flow(model: object, first: float, said: bool | None) -> bool:
    """Whether the model is a flow: as it tells itself, else by a level above 1, which no flow has, else as said.

    Where nothing tells, or two disagree, it is refused.
    """
    check_kind("flow", said, bool, "True, False or None")
    known = _told_by(model)
    if first > 1:
        if known or said:
            raise ValueError(f"sigmas of a flow are at most 1, with x = (1 - sigma) x_0 + sigma eps; got {first:g}.")
        return False
    if known is None and said is None:
        raise ValueError(
            f"flow must be said for this model, since sigmas[0] is {first:g}, at most 1: flow=True if x = (1 - sigma) "
            "x_0 + sigma eps, flow=False if x = x_0 + sigma eps."
        )
    if known is not None and said is not None and known != said:
        raise ValueError(f"flow={said}, but the host's model says that it is {'a' if known else 'no'} flow.")
    return bool(said if known is None else known)


def _told_by(model: object) -> bool | None:
    """What a host's model tells of its process, itself or inside: whether it is a flow; None if it does not say."""
    while model is not None:
        # ComfyUI: the class of the model's sampling, patches of the workflow included.
        patcher = getattr(model, "model_patcher", None)
        get = getattr(patcher, "get_model_object", None)
        sampling = getattr(model, "model_sampling", None) if get is None else get("model_sampling")
        if sampling is not None:
            return "CONST" in [kind.__name__ for kind in type(sampling).__mro__]
        # Forge.
        kind = getattr(getattr(model, "predictor", None), "prediction_type", None)
        if kind is not None:
            return kind == "const"
        # k-diffusion's wrappers of models with a table of levels.
        most = getattr(model, "sigma_max", None)
        if isinstance(most, (float, Tensor)) and float(most) > 1:
            return False
        model = getattr(model, "inner_model", None)
    return None
