r"""`fit`: times and weights for one network and one number of calls, from a few samples.

A multistep method on a grid is a few numbers: the levels, and at each step the weights of the state and of the
predictions so far (`FittedSolver`). They are fitted to an accurate solution of the pilot samples, at the end of the
walk and a little on the way, by Gauss-Newton steps: the Jacobian comes from finite differences, a walk from the changed
step on for each number, so that no gradient goes through the network and any function can be fitted. Every walk is the
student's own.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastsde.api import warn_of_range
from fastsde.arguments import as_model, resolve_samples, warn
from fastsde.batching import select_rows
from fastsde.checks import check_count, check_flags, check_kind, check_number
from fastsde.control import Grid
from fastsde.files import ArrayFile, json_hash, write_whole
from fastsde.job import Samples, noise_of
from fastsde.noise import StepNoise
from fastsde.score.base import BoundModel, ScoreModel, check_shape, reading_hash
from fastsde.score.network import tensors_hash, weights_hash
from fastsde.sde.base import SDE
from fastsde.solvers import ExponentialPC
from fastsde.solvers.fitted import FittedSolver, Row, standard_weights
from fastsde.steps import own_grid
from fastsde.types import Carry, Cond, ScoreFn, State

PRICE = 8_000
"""Network calls of a fit for up to six calls a sample; more in proportion to their square."""
_TEACHER, _FOR_RTOL = 32, 128
"""Calls of the accurate solution: at least, else four for each level; and where levels are looked for."""
_ON = 5
"""Its steps from where the default's grid ends to t_min."""
_SCOUTS = 8
"""Pilots on which the grids are compared first, at most; a quarter of them all."""
_GRIDS = 20
"""How many grids there are, about."""
_GUESSED_AT, _AGREE, _LARGEST_GUESS = -2.0, 1.6, 1 << 18
"""Where the mean of the data is looked for beside t_max, in half the log-SNR for data of variance 1; the share of the
data's variance in which predictions there may differ, times the calls of a sample, as a guess saves one of them; and
the elements of a sample up to which it is kept."""
FEWEST = 6
"""Pilots at least."""
_LEAST, _MOST = 16, 64
"""Pilots, where nobody says how many."""
_ITERATIONS, _PLANNED = 10, 3
"""Gauss-Newton steps at most, and those that a number of pilots is chosen for."""
_STARTS = 2
"""Grids from which a first step is tried: the best, and that of the default."""
_LEAST_GAIN = 0.01
"""A step that mends a smaller share of the error is the last."""
_ENERGY = 10.0
"""Weight of the samples' variance, which least squares alone makes too small."""
_POWER, _OUTLIER, _FEW = 1.5, 4.0, 3
"""Power of the errors whose mean is lowered. Pilots beyond this many times the median error count less; in the mean
only those that have a larger error than the last of this many."""
_ON_PATH, _SEEN = 0.2, 2048
"""Weight of the distance of the states from the accurate ones, in units of the samples' size; and of how many elements
it is taken, at most, over all levels of a sample."""
_DAMPING, _CHANGE, _FARTHEST, _APART = 1e-3, 0.02, 0.4, 0.05
"""Of Gauss-Newton; the change for a difference, in units of the noise or of half the log-SNR; the longest move of a
level, and the least distance of two, in half the log-SNR."""
_BUDGETS = (3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48)
"""Numbers of calls that `rtol` tries."""
_HOPE = 8.0
"""How many times the error of the default a fit may mend: budgets whose default is farther off are not tried."""


def fit(
    score_fn: ScoreModel | ScoreFn,
    sde: SDE | None = None,
    *,
    nfe: int | None = None,
    rtol: float | None = None,
    eta: float = 0.0,
    shape: Sequence[int] | None = None,
    cond: Cond | None = None,
    calls: int | None = None,
    pilots: int | None = None,
    times: Sequence[float] | None = None,
    history: int = 4,
    guess: bool = True,
    seed: int = 0,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> FittedSolver:
    r"""Fits the times and weights of a multistep solver to one network, with about 30 samples of it.

        fitted = fastsde.fit(model, nfe=6)
        r = fastsde.sample(model, n=50_000, solver=fitted)

    A few pilot samples are solved accurately. Call their solutions x*. Then the times and weights of a `FittedSolver`
    are chosen such that its samples x, from the same start and with few calls, are close to x*:

    1. In pure noise the best prediction is the mean of the data, whatever the noise. If the network's predictions at
       t_max, or at a little less noise, agree over the pilots, their mean is the `guess` of `FittedSolver`: it takes
       the place of the first call. The fewer calls there are, the less they must agree.
    2. About 20 grids are tried with the weights of `ExponentialPC`: equal steps in the log-SNR between several ends,
       equal steps in t, Karras's grid, the default. The best one and the default are the starts.
    3. Gauss-Newton steps on levels, step weights and output weights together reduce

           sqrt(E^2 + 10 s^2 v^2 + (s / 5)^2 u),    E = (mean_i r_i^1.5)^(2/3),
           r_i^2 = || x_i - x*_i ||^2 / d + (s / 80)^2,    v = (Var x / Var x* - 1) / 2,
           u = mean_ik || y_ik - y*_i(rho_k) ||^2 / d / (rho_k^2 + s^2),

       with s^2 = Var x*, y = x_t / alpha_t and rho = sigma_t / alpha_t. This is least squares of x - x* with weights
       r_i^-0.5, so one sample with a large error has less weight. u is how far the states are from the accurate y*, in
       at most 2,048 numbers of each pilot; 0 with noise. Where x - x* is small already, it keeps the states near y*,
       and so samples that are not among the pilots in the right mode. A pilot that ends in another mode cannot be
       mended. So with M = 4 median_i r_i, a pilot with r > M counts (M / r)^1.5 in v and u. In E, r^1.5 is replaced by
       L^1.5 (1 + 1.5 log(r / L)) beyond L, which is M or the third largest r, if that is larger: where many pilots are
       far off, all but two count in full. Derivatives are finite differences. A third of the pilots is held out of
       this step. Of all steps, the one with the smallest mean r on the held-out pilots is kept. The default is kept if
       its own is lower, or lower for a typical sample (in the geometric mean).

    The model is fitted with its guidance and clipping, and with the conditioning of the pilots. `sample` refuses the
    solver for a model with other weights, another reading or other guidance. Source: Duan et al.,
    https://arxiv.org/abs/2305.14677 (OLSS), for least squares on the outputs of the accurate solver; Shaul et al.,
    https://arxiv.org/abs/2403.01329 (BNS), for a fit with gradients.

    Args:
        score_fn: as for `sample`.
        sde: as for `sample`.
        nfe: network calls of a sample, at least 2 evaluations of the model.
        rtol: instead of `nfe`: the error allowed, in (0, 1). The error is the median of || x - x* || / || x* || over
            the held-out pilots. The smallest of 3, 4, 5, 6, 8, 10, .. 48 evaluations with at most this error is taken.
            If none has, the best is taken, with a warning.
        eta: noise of the sampler, 0 to 5. The accurate solution uses the same noise.
        shape: shape of one sample, if the model does not know it.
        cond: conditioning of the pilot samples, each with leading axis `pilots`.
        calls: about how many network calls the fit may make. By default 8,000 for up to 6 evaluations; for more it
            grows as the square. The minimum is what 16 pilots need, about 2,000 for 5 calls.
        pilots: number of pilot samples, at least 6. By default the length of `cond`, or 16 to 64, depending on `calls`.
        times: the times of the network calls, decreasing from t_max, instead of `nfe`. Then only weights are fitted.
        history: how many predictions a step uses, 0 to 8. With 0 only times are fitted, and the weights are those of
            `ExponentialPC`.
        guess: False to call the network at t_max, too. With a guess the solver is for one shape of samples, of at most
            262,144 elements. If `calls` is too few for it, there is none.
        seed: of the pilot samples. They differ from the samples that `sample` draws by default.
        batch_size: rows evaluated at a time.
        device: as for `sample`.
        cache: a JSON file for the solver. If it exists and was made for these weights and settings, its solver is
            returned without any call. If it was made for others, it is replaced. An interrupted fit goes on from the
            file CACHE.part.
        progress: show a bar over the calls.

    Raises:
        ValueError, TypeError: before the first network call, naming the argument, what came and what is allowed.
        RuntimeError: if a pilot sample fails.

    Warns:
        DataRangeWarning: if pilot samples leave the range of the data, as `sample` does.
        UserWarning: if no fit meets `rtol`.
    """
    model = as_model(score_fn, sde)
    process = model.sde if sde is None else sde
    check_kind("cond", cond, Mapping, "a dict of tensors")
    wanted, given = _wanted(model, process, nfe, rtol, times)
    history = check_count("history", history, 0)
    if history > 8 or (given is not None and history == 0):
        raise ValueError(f"history must be from 0 to 8, and at least 1 if times are given; got {history}.")
    eta = check_number("eta", eta, 0.0, 5.0)
    check_flags(guess=guess)
    event = model.event_shape if shape is None else check_shape("shape", shape)
    if event is None:
        raise ValueError("the shape of a sample is missing: give shape=, for example shape=(3, 32, 32).")
    if pilots is None:
        pilots = next((len(value) for value in (cond or {}).values() if isinstance(value, Tensor) and value.ndim), None)
    calls = None if calls is None else check_count("calls", calls, 500)
    accurate = round((_FOR_RTOL if rtol is not None else max(_TEACHER, 4 * wanted[0])) * (1 + eta))
    guess = guess and given is None and history > 0 and math.prod(event) <= _LARGEST_GUESS
    plan = _planned(wanted[0], accurate, calls, model.calls, pilots, history, guess=guess, moving=given is None)
    count, guess = plan.pilots, plan.guess
    # The last numbers of the stream, which no run from 0 on reaches.
    numbers = torch.arange((1 << 32) - count, 1 << 32)
    samples = resolve_samples(model, shape=(count, *event), index=numbers, seed=seed, cond=cond, device=device)
    settings = {
        "asked": dict(evaluations=list(wanted), rtol=rtol, eta=eta, calls=calls, history=history, guess=guess),
        "times": None if given is None else given.times.tolist(),
        "pilots": count,
        "seed": samples.seed,
        "sde": repr(process),
        "log_snr": process.log_snr(torch.linspace(process.t_min, process.t_max, 5, dtype=torch.float64)).tolist(),
        "shape": list(event),
        "cond_sha256": tensors_hash(samples.cond),
        "weights_sha256": weights_hash(model.network),
        "reading_sha256": reading_hash(model),
    }
    kept = None if cache is None else _Kept(Path(cache), settings)
    if kept is not None and (found := kept.finished()) is not None:
        return found
    pilot = _Pilot(model, process, samples, eta, check_count("batch_size", batch_size, 1), given, history, accurate)
    with tqdm(total=round(plan.price), desc=f"fit, {count} pilots", unit="call", disable=not progress) as bar:
        pilot.bar = bar
        with torch.no_grad(), model.sampling():
            pilot.solve(kept)
            if guess:
                pilot.agree()
            fitted = _search(pilot, wanted, rtol, plan.price, calls is not None, settings, kept)
        bar.total = pilot.cost
        bar.refresh()
    if kept is not None:
        kept.finish(fitted)
    return fitted


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a fit will cost: how many pilots, whether a guess is looked for, and about how many network calls."""

    pilots: int
    guess: bool
    price: float


def _planned(
    evaluations: int,
    accurate: int,
    calls: int | None,
    each: int,
    pilots: int | None,
    history: int,
    *,
    guess: bool,
    moving: bool,
) -> _Plan:
    """The plan of a fit; without a guess if `calls` does not pay for one.

    Args:
        evaluations: of a sample, the fewest that are tried.
        accurate: evaluations of the accurate solution of a pilot.
        calls: what the fit may cost in network calls; None for the usual price.
        each: network calls of an evaluation.
        pilots: their number, if it is said.
        history, guess: as for `fit`.
        moving: whether levels are fitted, too.

    Raises:
        ValueError: if `calls` is too few for a single step.
    """
    price = PRICE * max(1.0, (evaluations / 6) ** 2) if calls is None else calls / each
    least = 0
    for with_guess in (True, False) if guess else (False,):
        levels, before = evaluations + with_guess, accurate + 2 * with_guess
        count = _pilots_for(price, levels, before) if pilots is None else check_count("pilots", pilots, FEWEST)
        least = count * before + _cost(levels, count, history, moving=moving, steps=1, starts=1)
        if calls is None:
            price = max(price, float(count * before + _cost(levels, count, history, moving=moving)))
        if calls is None or calls >= least * each:
            return _Plan(count, with_guess, price * each)
    raise ValueError(
        f"calls must be at least {least * each:,} for {evaluations} evaluations a sample and {count} pilot samples; "
        f"got {calls:,}."
    )


def _wanted(
    model: ScoreModel, sde: SDE, nfe: int | None, rtol: float | None, times: Sequence[float] | None
) -> tuple[tuple[int, ...], Grid | None]:
    """The numbers of evaluations to try, and the levels if they are given.

    Raises:
        ValueError: if not one of the three says it, or it is out of range.
    """
    if sum(value is not None for value in (nfe, rtol, times)) != 1:
        raise ValueError(f"give one of nfe=, rtol= and times=; got nfe={nfe}, rtol={rtol}, times={times}.")
    if nfe is not None:
        return (check_count("nfe", nfe, 2 * model.calls) // model.calls,), None
    if rtol is not None:
        check_number("rtol", rtol, 0.0, 1.0, ends="()")
        return _BUDGETS, None
    given = Grid(times)  # type: ignore[arg-type] # which says what it takes
    first, _ = given.span(sde.t_min, sde.t_max)
    if not math.isclose(first, sde.t_max, rel_tol=1e-6):
        raise ValueError(f"times must start at t_max={sde.t_max}; got {first}.")
    return (given.steps + 1,), given


def _search(
    pilot: _Pilot,
    wanted: tuple[int, ...],
    rtol: float | None,
    price: float,
    fixed: bool,
    settings: Mapping[str, Any],
    kept: _Kept | None,
) -> FittedSolver:
    """The fit for the first of the wanted numbers of calls, or for the smallest that meets `rtol`."""
    found: _Fit | None = None
    for levels in wanted:
        default = pilot.default(levels)
        if rtol is not None and pilot.relative(default.x) > _HOPE * rtol and levels < wanted[-1]:
            continue
        scaled = pilot.cost + price * max(1.0, (levels / 6) ** 2)
        tried = _Fit(pilot, levels, default, price if fixed or rtol is None else scaled, kept).run()
        if found is None or tried.error < found.error:
            found = tried
        if rtol is None or found.error <= rtol or (fixed and pilot.cost > price):
            break
    assert found is not None
    if rtol is not None and found.error > rtol:
        warn(
            f"rtol={rtol:g} was not met: the best fit has an error of {found.error:.2g} with {found.levels} calls.",
            UserWarning,
        )
    record = {
        **settings,
        "model": repr(pilot.model),
        "cost": pilot.cost,
        "error": _finite(found.error),
        "default_error": _finite(found.default_error),
        "ratio": _finite(found.ratio),
        "ratio_interval": [_finite(v) for v in found.interval],
        "default_log_snr": list(found.default.solver.log_snr),
        "start": found.name,
        "path": [{"cost": p["cost"], "error": _finite(p["error"])} for p in found.path],
    }
    hashes = {key: settings[key] for key in ("weights_sha256", "reading_sha256")}
    return dataclasses.replace(found.best.solver, record=record, **hashes)


def _finite(value: float) -> float | None:
    """A number, or None, which JSON has for what is none."""
    return value if math.isfinite(value) else None


def _numbers(levels: int, history: int = 4, *, moving: bool = True) -> list[tuple[str, int, int]]:
    """What is fitted: (kind, step, which) of levels, step weights and output weights."""
    steps = [(k, min(k, history)) for k in range(1, levels)]
    moved = [("level", k, 0) for k, _ in steps] if moving else []
    if history == 0:
        return moved
    return (
        moved
        + [("weight", k, j) for k, q in steps for j in range(1 + q)]
        + [("output", 0, j) for j in range(min(levels, history))]
    )


def _cost(
    levels: int,
    pilots: int,
    history: int = 4,
    *,
    moving: bool = True,
    steps: int = _PLANNED,
    starts: int = _STARTS,
) -> int:
    """Calls of so many Gauss-Newton steps, the first from each of the starts, and of the grids that are tried."""
    starts = starts if moving else 1
    scouts = _GRIDS * _scouts(pilots) * levels if moving else 0
    numbers = _numbers(levels, history, moving=moving)
    jacobian = sum(levels - k for kind, k, _ in numbers if kind != "output")
    step = 2 / 3 * jacobian + 1.3 * levels  # two thirds of the pilots are not held out; some moves are tried again
    return round(scouts + pilots * ((steps + starts - 1) * step + (starts + 0.7) * levels))


def _pilots_for(price: float, levels: int, teacher: int) -> int:
    """As many pilots as a price pays for."""
    fixed = _GRIDS * _SCOUTS * levels
    each = (_cost(levels, 1000) - fixed) / 1000 + teacher
    return int(min(_MOST, max(_LEAST, (price - fixed) / each)))


def _scouts(pilots: int) -> int:
    return min(_SCOUTS, max(3, pilots // 4))


@dataclasses.dataclass
class _Walked:
    """A solver, the samples that it gives, and what is needed to go on from each of its levels, by chunk of rows."""

    solver: FittedSolver
    x: Tensor
    states: list[list[Carry]]


class _Pilot:
    """The pilot samples: their start, their accurate solution, and walks of a solver from one to the other."""

    def __init__(
        self,
        model: ScoreModel,
        sde: SDE,
        samples: Samples,
        eta: float,
        batch_size: int,
        given: Grid | None,
        history: int,
        teacher: int,
    ) -> None:
        self.given, self.history, self.teacher_calls = given, history, teacher
        self.model, self.sde, self.samples, self.eta, self.batch_size = model, sde, samples, eta, batch_size
        self.index, self.device, self.count = samples.index, samples.device, len(samples.index)
        count, seed = self.count, samples.seed
        # Conditioning may come in order.
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed % (1 << 63)))
        held = max(2, count // 3)
        self.held = torch.zeros(count, dtype=torch.bool)
        self.held[order[:held]] = True
        self.scouts = order[held : held + _scouts(count)].sort().values
        self.cost, self.bar = 0, tqdm(disable=True)
        self.guess, self.spread = tuple[float, ...](), math.inf
        self.noise = noise_of(samples, ExponentialPC(eta=eta), sde, (sde.t_min, sde.t_max))
        size = math.prod(samples.event)
        # None with noise: the path between two levels is not known then.
        seen = 0 if eta else _SEEN // 3
        self.seen = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:seen].to(self.device)
        self.start = sde.prior(self.noise.prior(self.index), sde.t_max)
        self.lams = [v / 2 for v in sde.log_snr(torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)).tolist()]

    def paid(self, calls: int) -> None:
        self.cost += calls
        self.bar.update(calls)

    def solve(self, kept: _Kept | None) -> None:
        """The accurate solution, from the file if it is there."""
        found = None if kept is None else kept.solution()
        teacher = self._at(self._fine(self.teacher_calls - 1).times)
        self.rho = [math.exp(-v / 2) for v in teacher.log_snr]
        if found is None:
            target, course = found = self._solved(teacher)
            if kept is not None:
                kept.keep(target.cpu().numpy(), course.cpu().numpy(), self.cost)
        elif kept is not None:
            self.cost = kept.cost
        self.target, self.course = (part.to(self.device).float() for part in found)
        centred = (self.target - self.target.mean(0)).double()
        self.variance = max(float(centred.square().mean()), 1e-12)
        self.floor = self.variance / 6400  # of a squared error: an 80th of the samples' size

    def _solved(self, teacher: FittedSolver) -> tuple[Tensor, Tensor]:
        """Samples of a fine grid; and y at its levels, with shape (levels, pilots, elements seen)."""
        ends, courses = list[Tensor](), list[Tensor]()
        alpha = self.sde.alpha(torch.tensor(teacher.times, dtype=torch.float64)).tolist()
        for part in self.chunks(torch.arange(self.count)):
            course = list[Tensor]()
            for state in self._states(teacher, part):
                course.append(state["x"].flatten(1)[:, self.seen] / alpha[len(course)])
            ends.append(state["x_0"])
            courses.append(torch.stack(course))
        found = torch.cat(ends)
        failed = int((~torch.isfinite(found).flatten(1).all(1)).sum())
        if failed:
            raise RuntimeError(f"pilot samples failed: {failed} of {self.count} are not finite.")
        warn_of_range(found, self.model)
        return found, torch.cat(courses, 1)

    def agree(self) -> None:
        """Looks for the mean of the data in the network's predictions in noise, where these agree best."""
        rows = torch.arange(self.count)
        mean, noise = self.target.mean(0), self.start / self.sde.prior_std
        lams = [self.lams[0], max(self.lams[0], _GUESSED_AT - 0.5 * math.log(self.variance))]
        found = None
        times = self.sde.t_of_log_snr(2 * torch.tensor(lams, dtype=torch.float64))
        times[0] = self.sde.t_max
        for t in times.tolist():
            time = torch.full((self.count,), t, dtype=torch.float64, device=self.device)
            x = self.sde.marginal(mean.expand_as(noise), time, noise)
            predicted = []
            for part in self.chunks(rows.to(self.device)):
                active = torch.ones(len(part), dtype=torch.bool, device=self.device)
                model = BoundModel(self.model, select_rows(part, self.samples.cond), active)
                predicted.append(model(x[part], time[part]).x_0)
                self.paid(int(model.nfe.sum()))
            d = torch.cat(predicted).double()
            spread = float((d - d.mean(0)).square().mean()) / self.variance
            if spread < self.spread:
                self.spread, found = spread, d.mean(0)
        if found is not None:
            self.guess = tuple(round(v, 6) for v in found.flatten().tolist())

    def _fine(self, steps: int) -> Grid:
        """The default's grid, and on to t_min in equal steps of the log-SNR where it ends before."""
        times = own_grid(self.sde, ExponentialPC(), steps - _ON).times
        if float(times[-1]) == self.sde.t_min:
            return own_grid(self.sde, ExponentialPC(), steps)
        first, last = self.sde.log_snr(torch.tensor([float(times[-1]), self.sde.t_min], dtype=torch.float64)).tolist()
        rest = self.sde.t_of_log_snr(torch.linspace(first, last, _ON + 1, dtype=torch.float64)[1:])
        rest[-1] = self.sde.t_min
        return Grid(torch.cat([times, rest]))

    def root_errors(self, x: Tensor, rows: Tensor) -> Tensor:
        """Root of the squared error of each of these samples, with a floor, with shape (rows,)."""
        square = (x - self.target[rows.to(x.device)]).double().flatten(1).square().mean(1)
        return (square + self.floor).sqrt().cpu().nan_to_num(nan=math.inf)

    def held_errors(self, x: Tensor) -> Tensor:
        """The same of the held-out pilots, from the samples of all."""
        return self.root_errors(x[self.held.to(x.device)], self.held)

    def relative(self, x: Tensor) -> float:
        """Median over the held-out samples of the error over the sample's size."""
        held = self.held.to(x.device)
        error, size = (v[held].double().flatten(1).norm(dim=1) for v in (x - self.target, self.target))
        return float((error / size.clamp(min=1e-12)).nan_to_num(nan=math.inf).median())

    def objective(self, walked: _Walked) -> float:
        """What is lowered, on the samples that are fitted."""
        error, _, counted = self.counted(walked.x)
        parts = zip(self.chunks(torch.arange(self.count)), walked.states, strict=True)
        off = torch.cat([self.off(walked.solver, chain, part).square().sum((0, 2)) for part, chain in parts])
        u = float(counted @ off.cpu()[~self.held].double() / counted.sum()) / self.compared(walked.solver)
        more = _ENERGY * self.energy(walked.x)[0] ** 2 + _ON_PATH**2 * u
        value = math.sqrt(error**2 + self.variance * more)
        return value if math.isfinite(value) else math.inf

    def counted(self, x: Tensor) -> tuple[float, Tensor, Tensor]:
        """Of the samples that are fitted: their mean error, the weights of its derivative, and how much each counts."""
        errors = self.root_errors(x[~self.held.to(x.device)], ~self.held)
        far = _OUTLIER * errors.median()
        limit = max(far, errors.topk(_FEW).values[-1])
        beyond = limit**_POWER * (1 + _POWER * (errors / limit).log())
        mean = torch.where(errors <= limit, errors**_POWER, beyond).mean() ** (1 / _POWER)
        weight = (limit / errors).clamp(max=1.0) ** _POWER * (mean / errors) ** (2 - _POWER)
        return float(mean), weight, (far / errors).clamp(max=1.0) ** _POWER

    def energy(self, x: Tensor) -> tuple[float, Tensor, float]:
        """v of the objective; the weighted centred samples and the sum of squares of the target, of which v is made."""
        own = ~self.held.to(x.device)
        weight = self.counted(x)[2].to(x.device)
        centred, wanted = (
            rows - weight @ rows / weight.sum() for rows in (v[own].double().flatten(1) for v in (x, self.target))
        )
        total = max(float((weight @ wanted.square()).sum()), 1e-12)
        weighted = weight[:, None] * centred
        return (float((weighted * centred).sum()) / total - 1) / 2, weighted, total

    def off(self, solver: FittedSolver, states: list[Carry], rows: Tensor, first: int = 0) -> Tensor:
        """How far y is from the accurate one at each level from number `first` on, over sqrt(rho^2 + s^2).

        With shape (levels - first, rows, elements). The accurate y is taken as straight in rho between its levels.
        """
        alpha = self.sde.alpha(torch.tensor(solver.times, dtype=torch.float64)).tolist()
        rows, seen = rows.to(self.device), self.seen[: _SEEN // len(solver.times)]
        found = list[Tensor]()
        for k, state in enumerate(states, first):
            rho = math.exp(-solver.log_snr[k] / 2)
            after = min(max(1, sum(there > rho for there in self.rho)), len(self.rho) - 1)
            a, b = self.rho[after - 1 : after + 1]
            before, behind = (self.course[j, rows, : len(seen)] for j in (after - 1, after))
            accurate = torch.lerp(before, behind, (a - rho) / (a - b))
            found.append((state["x"].flatten(1)[:, seen] / alpha[k] - accurate) / math.sqrt(rho**2 + self.variance))
        return torch.stack(found)

    def compared(self, solver: FittedSolver) -> int:
        """How many elements `off` has for each row, at least 1."""
        return max(1, len(solver.times) * min(len(self.seen), _SEEN // len(solver.times)))

    def chunks(self, rows: Tensor) -> list[Tensor]:
        return list(rows.split(self.batch_size))

    def normals(self, times: Tensor, rows: Tensor) -> list[State | None]:
        """The noise of each step along the path, in variance 1, with shape (rows, *event)."""
        if self.eta == 0:
            return [None] * len(times)
        index, zero = self.index[rows], torch.zeros(len(rows), dtype=torch.int64, device=self.device)
        at = [t.expand(len(rows)).to(self.device) for t in times]
        carry, found = self.noise.start(index, at[0]), list[State | None]([None])
        for t, s in itertools.pairwise(at):
            step = StepNoise(self.noise, index, zero, zero, t, s, carry)
            found.append(step.z)
            carry = step.carry
        return found

    def walk(self, solver: FittedSolver, rows: Tensor, first: int = 0, state: Carry | None = None) -> list[Carry]:
        """States after each level from number `first` on, from the state before it, or from the start."""
        return list(self._states(solver, rows, first, state))

    def _states(
        self, solver: FittedSolver, rows: Tensor, first: int = 0, state: Carry | None = None
    ) -> Iterator[Carry]:
        times = torch.tensor(solver.times, dtype=torch.float64)
        plan = solver.plan(self.sde, times).map(lambda v: v.float() if v.is_floating_point() else v)
        active = torch.ones(len(rows), dtype=torch.bool, device=self.device)
        model = BoundModel(self.model, select_rows(rows.to(self.device), self.samples.cond), active)
        normals = self.normals(times, rows.to(self.device))
        if state is None:
            x = self.start[rows.to(self.device)]
            state = {"x": x, **solver.init(x)}
            if solver.guesses:  # its first level is the start
                first = 1
                yield state
        for k in range(first, len(times)):
            c = plan.rows(torch.full((len(rows),), k)).map(lambda value: value.to(self.device))
            ahead = solver.predict(state["x"], c, state, normals[k])
            prediction = model(ahead.x, times[k].expand(len(rows)).to(self.device))
            x, carry = solver.correct(ahead, prediction, c, state)
            state = {**carry, "x": x}
            yield state
        self.paid(int(model.nfe.sum()))

    def walked(self, solver: FittedSolver, rows: Tensor | None = None) -> _Walked:
        """A solver's samples, of some of the pilots or of all."""
        rows = torch.arange(self.count) if rows is None else rows
        states = [self.walk(solver, part) for part in self.chunks(rows)]
        return _Walked(solver, torch.cat([chain[-1]["x_0"] for chain in states]), states)

    def solver(
        self,
        lams: Sequence[float],
        weights: tuple[Row, ...] | None,
        output: Sequence[float],
        guess: tuple[float, ...] = (),
    ) -> FittedSolver:
        """With given levels in half the log-SNR, the first of which is that of t_max; standard weights if None."""
        log_snr = 2 * torch.tensor(list(lams), dtype=torch.float64)
        times = self.sde.t_of_log_snr(log_snr).clamp(self.sde.t_min, self.sde.t_max)
        times[0] = self.sde.t_max
        if self.given is not None:
            times = self.given.times
        if weights is None:
            # Of as high an order as the history allows.
            order = 3 if self.history == 0 else max(1, min(3, self.history - 1))
            weights = standard_weights(self.sde, times.tolist(), self.eta, order)
            if self.history:
                weights = tuple((*row, *[0.0] * k)[: 1 + min(k, self.history)] for k, row in enumerate(weights, 1))
                output = [*output, *[0.0] * len(times)][: min(len(times), self.history)]
        return FittedSolver(
            eta=self.eta,
            times=tuple(times.tolist()),
            log_snr=tuple(self.sde.log_snr(times).tolist()),
            weights=weights,
            output=tuple(output),
            guess=guess,
        )

    def own_times(self, levels: int) -> Tensor:
        """The times of `sample(nfe=...)`, or those that are given."""
        if self.given is not None:
            return self.given.times
        return own_grid(self.sde, ExponentialPC(eta=self.eta), levels - 1).times

    def default(self, levels: int) -> _Walked:
        """What `sample(nfe=...)` does."""
        return self.walked(self._at(self.own_times(levels)))

    def _at(self, times: Tensor) -> FittedSolver:
        """`ExponentialPC` at these times."""
        log_snr = tuple(self.sde.log_snr(times).tolist())
        return FittedSolver(eta=self.eta, times=tuple(times.tolist()), log_snr=log_snr)

    def starts(self, calls: int) -> dict[str, FittedSolver]:
        """Where a fit may start, by name: those of `grids`, with the guess for its first call if it is good enough."""
        found = {name: self.solver(lams, None, (1.0,)) for name, lams in self.grids(calls).items()}
        if self.spread * calls <= _AGREE:
            # The default and Karras's grid begin where noise is all there is; the others are better without that call.
            found = {name: solver for name, solver in found.items() if name.startswith(("default", "Karras"))}
            for name, lams in self.grids(calls + 1).items():
                found[f"{name}, with a guess"] = self.solver(lams, None, (1.0,), self.guess)
        return found

    def grids(self, levels: int) -> dict[str, list[float]]:
        """Levels in half the log-SNR, by name."""
        low, high = self.lams
        # Where data of this size are decided.
        middle = -0.5 * math.log(self.variance)
        if self.given is not None:
            return {"given": (self.sde.log_snr(self.given.times) / 2).tolist()}
        found = {"default": (self.sde.log_snr(self.own_times(levels)) / 2).tolist()}
        if levels > 2:
            for first in (-3.0, -2.2, -1.6):
                for last in (0.4, 1.2, 2.0, 4.0):
                    inner = torch.linspace(middle + first, min(middle + last, high), levels - 1, dtype=torch.float64)
                    found[f"log-SNR, {first:g} to {last:g}"] = [low, *inner.tolist()]
            for rho in (3.0, 7.0):
                times = Grid.karras(self.sde, levels - 1, rho).times
                found[f"Karras, rho {rho:g}"] = (self.sde.log_snr(times) / 2).tolist()
        for share in (0.0, 0.5):
            end = self.sde.t_min + (self.sde.t_max - self.sde.t_min) * share / levels
            times = torch.linspace(self.sde.t_max, end, levels + 1, dtype=torch.float64)[:-1]
            found[f"uniform t, {share:g}"] = (self.sde.log_snr(times) / 2).tolist()
        if levels == 2:
            found |= {f"jump to {last:g}": [low, middle + last] for last in (-1.0, -0.5, 0.0, 0.5)}
        apart = {name: lams for name, lams in found.items() if _walkable(lams, high)}
        return apart or {"default": found["default"]}


def _walkable(lams: Sequence[float], high: float) -> bool:
    return all(b - a >= _APART for a, b in itertools.pairwise(lams)) and lams[-1] <= high + 1e-9


class _Fit:
    """The fit for one number of levels."""

    def __init__(self, pilot: _Pilot, levels: int, default: _Walked, until: float, kept: _Kept | None) -> None:
        self.pilot, self.levels, self.default, self.until, self.kept = pilot, levels, default, until, kept
        self.path, self.last = list[dict[str, float]](), 0

    def run(self) -> _Fit:
        """Finds the best start, steps from there, and leaves in `best` what is best on the held-out pilots."""
        pilot = self.pilot
        resumed = None if self.kept is None else self.kept.solver(self.levels)
        if resumed is None:
            now, value, mu = self._start()
        else:
            now, self.name = pilot.walked(resumed), "resumed"
            value, mu = pilot.objective(now), _DAMPING
        best, held = now, float(pilot.held_errors(now.x).mean())
        last = self.last
        for turn in range(_ITERATIONS):
            self.path.append({"cost": pilot.cost, "error": pilot.relative(now.x)})
            if pilot.cost + last > self.until:
                break
            before = pilot.cost
            stepped = self._step(now, value, mu)
            last = pilot.cost - before
            if stepped is None:
                break
            gained, (now, value, mu) = 1 - stepped[1] / value, stepped
            error = float(pilot.held_errors(now.x).mean())
            if error < held:
                best, held = now, error
            if self.kept is not None:
                self.kept.keep_solver(now.solver, pilot.cost)
            if gained < _LEAST_GAIN and turn:
                break
        self._judge(best)
        return self

    def _start(self) -> tuple[_Walked, float, float]:
        """A step on all pilots from the grid that is best on a few, or from that of the default: the better one."""
        pilot = self.pilot
        solvers = pilot.starts(self.levels)
        first = {
            name: float(pilot.root_errors(pilot.walked(solver, pilot.scouts).x, pilot.scouts).mean())
            for name, solver in solvers.items()
        }
        found, before = list[tuple[str, _Walked, float, float]](), pilot.cost
        ranked = sorted(first, key=lambda name: first[name])
        # Few pilots say nothing of rare hard samples. For these the default's grid is not much worse. So it is a start:
        # the last of that name, which has a guess if there is one.
        own = [name for name in solvers if name.startswith("default")][-1:]
        for name in list(dict.fromkeys([ranked[0], *own, *ranked]))[:_STARTS]:
            if found and pilot.cost + (pilot.cost - before) > self.until:
                break
            before = pilot.cost
            walked = pilot.walked(solvers[name])
            value = pilot.objective(walked)
            stepped = self._step(walked, value, _DAMPING) if math.isfinite(value) else None
            found.append((name, *(stepped or (walked, value, _DAMPING))))
            self.last = pilot.cost - before
        self.name, walked, value, mu = min(found, key=lambda entry: entry[2])
        if not math.isfinite(value):
            raise RuntimeError("pilot samples are not finite at the levels of any grid: the network returned NaN.")
        return walked, value, mu

    def _step(self, now: _Walked, value: float, mu: float) -> tuple[_Walked, float, float] | None:
        """A Gauss-Newton step that lowers the objective, with its damping; None if none does."""
        matrix, vector, scale = self._normal_equations(now)
        for _ in range(6):
            move = torch.linalg.solve(matrix + mu * torch.eye(len(matrix), dtype=torch.float64), vector) / scale
            moved = self._moved(now.solver, move.tolist())
            if moved is not None:
                after = self.pilot.walked(moved)
                better = self.pilot.objective(after)
                if better < value:
                    return after, better, max(mu / 10, 1e-6)
            mu *= 10
        return None

    def _moved(self, solver: FittedSolver, move: Sequence[float]) -> FittedSolver | None:
        """The solver with its numbers moved; None if they are not finite, or levels out of order."""
        if not all(math.isfinite(v) for v in move):
            return None
        high = self.pilot.lams[1]
        lams = [v / 2 for v in solver.log_snr]
        weights = [list(row) for row in solver.weights]
        output = list(solver.output)
        for (kind, k, j), by in zip(self._numbers(solver), move, strict=True):
            if kind == "level":
                lams[k] = min(lams[k] + max(-_FARTHEST, min(_FARTHEST, by)), high)
            elif kind == "weight":
                weights[k - 1][j] += by
            else:
                output[j] += by
        finite = all(math.isfinite(v) for row in (lams, output, *weights) for v in row)
        if not finite or (self.pilot.given is None and not _walkable(lams, high)):
            return None
        return self.pilot.solver(lams, self._rows(weights), output, solver.guess)

    def _numbers(self, solver: FittedSolver) -> list[tuple[str, int, int]]:
        return _numbers(len(solver.times), self.pilot.history, moving=self.pilot.given is None)

    def _rows(self, weights: list[list[float]]) -> tuple[Row, ...] | None:
        """The weights, or None for the standard ones, which move with the levels."""
        return tuple(tuple(row) for row in weights) if self.pilot.history else None

    def _normal_equations(self, now: _Walked) -> tuple[Tensor, Tensor, Tensor]:
        """Matrix and right-hand side for the move of all numbers, each in units of its effect, and these units."""
        pilot, size = self.pilot, len(self._numbers(now.solver))
        own, done = ~pilot.held, 0
        matrix, vector = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
        slope = torch.zeros(size, dtype=torch.float64)
        v, centred, total = pilot.energy(now.x)
        _, weight, counted = pilot.counted(now.x)
        ends = (weight / (len(weight) * now.x[0].numel())).sqrt()
        on_path = _ON_PATH * (pilot.variance * counted / (counted.sum() * pilot.compared(now.solver))).sqrt()
        for rows, chain in zip(pilot.chunks(torch.arange(pilot.count)), now.states, strict=True):
            mine = own[rows].nonzero().flatten()
            if not len(mine):
                continue
            part, these = rows[mine], slice(done, done + len(mine))
            done += len(mine)
            states = [select_rows(mine.to(pilot.device), state) for state in chain]
            columns, moved = self._columns(now.solver, part, states)
            residual = (pilot.target[part.to(pilot.device)] - states[-1]["x_0"]).flatten(1)
            slope += (columns.flatten(1).double() @ centred[these].flatten()).cpu() / total
            off = pilot.off(now.solver, states, part)
            for change, wanted, weights in ((columns, residual, ends), (moved, -off, on_path)):
                by = weights[these].float().to(pilot.device)[:, None]
                scaled = (change * by).flatten(1).double()
                matrix += (scaled @ scaled.T).cpu()
                vector += (scaled @ (wanted * by).flatten().double()).cpu()
        unit = matrix.diagonal().sqrt().clamp(min=1e-12)
        share = _ENERGY * pilot.variance
        matrix = (matrix + share * torch.outer(slope, slope)) / torch.outer(unit, unit)
        return matrix, (vector - share * v * slope) / unit, unit

    def _columns(self, solver: FittedSolver, rows: Tensor, states: list[Carry]) -> tuple[Tensor, Tensor]:
        """Derivatives after each number: of the samples, with shape (numbers, rows, elements), and of `off`."""
        pilot, last, off = self.pilot, states[-1], self.pilot.off(solver, states, rows)
        found, moves = list[Tensor](), list[Tensor]()
        for kind, k, j in self._numbers(solver):
            if kind == "output":
                found.append(last[f"past_{j}"].flatten(1))
                moves.append(torch.zeros_like(off))
                continue
            before = states[k - 1]
            change = _CHANGE
            if kind == "weight":  # in y, the state that it multiplies, and the noise of the level
                alpha = float(pilot.sde.alpha(torch.tensor([solver.times[k - 1]], dtype=torch.float64)))
                size = float((before["x"] / alpha if j == 0 else before[f"past_{j - 1}"]).square().mean().sqrt())
                change *= min(math.sqrt(pilot.variance), math.exp(-solver.log_snr[k] / 2)) / max(size, 1e-6)
            elif solver.log_snr[k] / 2 + change > pilot.lams[1]:
                change = -change
            moved = self._changed(solver, kind, k, j, change)
            chain = pilot.walk(moved, rows, k, before)
            by = torch.cat([torch.zeros_like(off[:k]), pilot.off(moved, chain, rows, k) - off[k:]]) / change
            # What leaves the numbers says nothing of where to go.
            found.append(((chain[-1]["x_0"] - last["x_0"]) / change).flatten(1).nan_to_num(0.0, 0.0, 0.0))
            moves.append(by.nan_to_num(0.0, 0.0, 0.0))
        return torch.stack(found), torch.stack(moves)

    def _changed(self, solver: FittedSolver, kind: str, k: int, j: int, change: float) -> FittedSolver:
        """The solver with one number changed, however near its levels come to each other."""
        lams, weights = [v / 2 for v in solver.log_snr], [list(row) for row in solver.weights]
        if kind == "level":
            lams[k] += change
        else:
            weights[k - 1][j] += change
        return self.pilot.solver(lams, self._rows(weights), solver.output, solver.guess)

    def _judge(self, found: _Walked) -> None:
        """Keeps what was found, or the default if that is nearer, and notes both errors."""
        pilot = self.pilot
        self.error, self.default_error = pilot.relative(found.x), pilot.relative(self.default.x)
        ours, theirs = (pilot.held_errors(walked.x) for walked in (found, self.default))
        logs = (ours / theirs).log()
        middle, spread = float(logs.mean()), 2 * float(logs.std()) / math.sqrt(len(logs))
        self.ratio, self.interval = math.exp(middle), (math.exp(middle - spread), math.exp(middle + spread))
        self.best = found
        if not (float(ours.mean()) < float(theirs.mean()) and self.ratio < 1.0):
            self.best, self.error, self.ratio, self.interval = self.default, self.default_error, 1.0, (1.0, 1.0)


class _Kept:
    """The file of a finished fit, and beside it CACHE.part, the state of one that is not."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        if not path.absolute().parent.is_dir() or path.is_dir():
            raise ValueError(f"cache= must be a file in a folder that exists; got {path}.")
        if settings["weights_sha256"] is None:
            raise ValueError("cache= needs a network with weights to know it by; got a plain function.")
        self.path, self.settings = path, settings
        self.part = path.with_name(f"{path.name}.part")
        self.cost = 0
        self.found: tuple[np.ndarray, np.ndarray] | None = None
        self.fitted: FittedSolver | None = None
        if self.part.is_file():
            self._read()

    def finished(self) -> FittedSolver | None:
        """The solver in the file, if it was made for the same settings."""
        if not self.path.exists():
            return None
        solver = FittedSolver.load(self.path)
        same = all(solver.record.get(key) == value for key, value in self.settings.items())
        return solver if same else None

    def _read(self) -> None:
        try:
            with ArrayFile(self.part) as file:
                record = bytes(file.read("record")).decode()
                target, course = file.read("target"), file.read("course")
            content = json.loads(record)
            if content["settings"] != json_hash(dict(self.settings)):
                return
            fitted = None if content["solver"] is None else FittedSolver.from_json(content["solver"])
            self.cost, self.found, self.fitted = int(content["cost"]), (target, course), fitted
        except (OSError, ValueError, KeyError, TypeError):
            return  # damaged: begun again

    def solution(self) -> tuple[Tensor, Tensor] | None:
        """The accurate solution of an interrupted fit: the samples, and states on the way."""
        return None if self.found is None else (torch.as_tensor(self.found[0]), torch.as_tensor(self.found[1]))

    def solver(self, levels: int) -> FittedSolver | None:
        """The last step of an interrupted fit for so many levels."""
        return self.fitted if self.fitted is not None and self.fitted.nfe == levels else None

    def keep(self, target: np.ndarray, course: np.ndarray, cost: int) -> None:
        """Writes the accurate solution."""
        self.found, self.cost = (target, course), cost
        self._write(None)

    def keep_solver(self, solver: FittedSolver, cost: int) -> None:
        """Writes the last step beside it."""
        self.cost = cost
        self._write(solver)

    def _write(self, solver: FittedSolver | None) -> None:
        content = {
            "settings": json_hash(dict(self.settings)),
            "cost": self.cost,
            "solver": None if solver is None else solver.as_json(),
        }
        text = np.frombuffer(json.dumps(content).encode(), dtype=np.uint8)
        assert self.found is not None  # `keep` comes first
        write_whole(self.part, {"target": self.found[0], "course": self.found[1], "record": text})

    def finish(self, solver: FittedSolver) -> None:
        """Writes the solver, and removes what was kept on the way."""
        solver.save(self.path)
        self.part.unlink(missing_ok=True)
