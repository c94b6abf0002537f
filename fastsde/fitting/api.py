r"""`fit`: times and weights for one network and one number of calls, from a few samples.

A multistep method on a grid is a few numbers: the levels, and at each step the weights of the state and of the
predictions so far (`FittedSolver`). They are fitted to an accurate solution of the pilot samples, at the end of the
walk and a little on the way.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastsde.arguments import as_model, resolve_samples, warn
from fastsde.checks import check_count, check_flags, check_kind, check_number
from fastsde.control import Grid
from fastsde.fitting.kept import Kept
from fastsde.fitting.pilots import Pilots
from fastsde.fitting.price import FEWEST, planned
from fastsde.fitting.steps import Fit
from fastsde.score.base import ScoreModel, check_shape, reading_hash
from fastsde.score.network import tensors_hash, weights_hash
from fastsde.sde.base import SDE
from fastsde.solvers.fitted import FittedSolver
from fastsde.types import Cond, ScoreFn

_TEACHER, _FOR_RTOL = 32, 128
"""Calls of the accurate solution: at least, else four for each level; and where levels are looked for."""
_LARGEST_GUESS = 1 << 18
"""Elements of a sample up to which a guess is kept."""
_BUDGETS = (3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48)
"""Numbers of calls that `rtol` tries."""
_FALL = 20.0
"""How many times smaller an error becomes from one of these numbers to the next, at most. What cannot meet `rtol` by
this is not tried."""


def fit(
    score_fn: ScoreModel | ScoreFn,
    sde: SDE | None = None,
    *,
    nfe: int | None = None,
    rtol: float | None = None,
    eta: float = 0.0,
    shape: Sequence[int] | None = None,
    cond: Cond | Callable[[int], Cond] | None = None,
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
       equal steps in t, Karras's grid, the default. The best one and the default are the starts: a step is made from
       each, and the one with the smaller E over all pilots goes on.
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
       these steps, and up to twelve if 14 are left. The step with the smallest E over all pilots is kept; the held-out
       ones alone are too few to choose.
       The default is kept if its E over all pilots is smaller, or its r for a typical held-out pilot (the geometric
       mean). With `eta` above 0 a fit must be better by more than chance.

    The model is fitted with its guidance and clipping, and with the conditioning of the pilots. `sample` refuses the
    solver for a model with other weights, another reading or other guidance. Source: Duan et al.,
    https://arxiv.org/abs/2305.14677 (OLSS), for least squares on the outputs of the accurate solver; Shaul et al.,
    https://arxiv.org/abs/2403.01329 (BNS), for a fit with gradients.

    Args:
        score_fn: as for `sample`.
        sde: as for `sample`.
        nfe: network calls of a sample, at least 2 evaluations of the model.
        rtol: instead of `nfe`: the error allowed, in (0, 1). The error is the median of || x - x* || / || x* || over
            the held-out pilots. Of 3, 4, 5, 6, 8, 10, .. 48 evaluations the first with at most this error is taken;
            numbers that are far from it are left out. If none has, the best is taken, with a warning. Without `calls`
            each number that is tried costs a fit; `calls` is for all of them together.
        eta: noise of the sampler, 0 to 5. The accurate solution uses the same noise.
        shape: shape of one sample, if the model does not know it.
        cond: conditioning of the pilot samples, each with leading axis `pilots`; or a function of their number that
            returns it, such as `lambda n: {"class_labels": torch.arange(n) % 10}`.
        calls: about how many network calls the fit may make. By default 8,000 for up to 6 evaluations; for more it
            grows as the square. The minimum is what 16 pilots need, about 1,600 for 5 calls.
        pilots: number of pilot samples, at least 8. By default the length of `cond`, or else as many as `calls` pays
            for: 16 to 64, and at least 22 where `calls` is not given.
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
            file CACHE.part, with the same `batch_size` to the same solver.
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
    if not callable(cond):
        check_kind("cond", cond, Mapping, "a dict of tensors, or a function of their number that returns one")
    wanted, given = _wanted(model, process, nfe, rtol, times)
    history = check_count("history", history, 0)
    if history > 8 or (given is not None and history == 0):
        raise ValueError(f"history must be from 0 to 8, and at least 1 if times are given; got {history}.")
    eta = check_number("eta", eta, 0.0, 5.0)
    check_flags(guess=guess)
    event = model.event_shape if shape is None else check_shape("shape", shape)
    if event is None:
        raise ValueError("the shape of a sample is missing: give shape=, for example shape=(3, 32, 32).")
    if pilots is None and cond and not callable(cond):
        pilots = next((len(value) for value in cond.values() if isinstance(value, Tensor) and value.ndim), None)
        if pilots is not None and pilots < FEWEST:
            raise ValueError(f"cond has too few rows ({pilots}): a fit needs at least {FEWEST} pilot samples.")
    calls = None if calls is None else check_count("calls", calls, 500)
    accurate = round((_FOR_RTOL if rtol is not None else max(_TEACHER, 4 * wanted[0])) * (1 + eta))
    guess = guess and given is None and history > 0 and math.prod(event) <= _LARGEST_GUESS
    plan = planned(wanted[0], accurate, calls, model.calls, pilots, history, guess=guess, moving=given is None)
    count, guess = plan.pilots, plan.guess
    if callable(cond):
        cond = cond(count)
        check_kind("what cond returns", cond, Mapping, "a dict of tensors")
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
    kept = None if cache is None else Kept(Path(cache), settings, model.network)
    if kept is not None and (found := kept.finished()) is not None:
        return found
    pilot = Pilots(model, process, samples, eta, check_count("batch_size", batch_size, 1), given, history, accurate)
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
    pilot: Pilots,
    wanted: tuple[int, ...],
    rtol: float | None,
    price: float,
    fixed: bool,
    settings: Mapping[str, Any],
    kept: Kept | None,
) -> FittedSolver:
    """The fit for the first of the wanted numbers of calls, or for the smallest that meets `rtol`."""
    found: Fit | None = None
    reach = 0.0
    for levels in wanted:
        reach /= _FALL
        if rtol is not None and reach > rtol and levels < wanted[-1]:
            continue
        default = pilot.default(levels)
        scaled = pilot.cost + price * max(1.0, (levels / 6) ** 2)
        tried = Fit(pilot, levels, default, price if fixed or rtol is None else scaled, kept).run()
        reach = tried.error if math.isfinite(tried.error) else 0.0  # else nothing is known of the next
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
