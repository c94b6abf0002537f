"""`calibrate`: the shape of a grid for one model, from a short pilot."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsde.api import sample
from fastsde.arguments import as_model
from fastsde.checks import check_count
from fastsde.control import Grid
from fastsde.files import read_json, write_whole
from fastsde.result import SampleResult
from fastsde.score.base import Prediction, ScoreModel, Wrapper
from fastsde.sde.base import SDE, Level
from fastsde.solvers import ExponentialPC
from fastsde.types import Cond, ScoreFn, State, Time

PILOT = 6
"""Pilot samples: with two runs' worth for the reference and four candidates, 36 runs, 1.8 % of a job of 2,000."""
_LEAN = 0.6
"""How far a candidate leans towards the density that the pilot measures."""
_TO_KARRAS = 0.25
"""How far another leans towards `Grid.karras`, which a trained network likes (docs/solver.md)."""
_MARGIN = 0.8
"""A candidate must beat the default by this factor: six samples cannot tell smaller differences."""
_BLUR = 0.4
"""Width in half the log-SNR over which the measured density is smoothed."""


class Schedule(Grid):
    """A grid with the record of how it was found. Pass it to `sample` as `controller=`.

    Args:
        times: as for `Grid`.
        record: settings, cost and the candidates with their scores, as JSON can hold them.
    """

    def __init__(self, times: Tensor | list[float], record: dict[str, Any]) -> None:
        super().__init__(times)
        self.record = record

    @property
    def nfe(self) -> int:
        """Network calls of a sample on this grid, with a solver of one call a step."""
        return int(self.record["nfe"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes times and record as JSON, atomically."""
        text = json.dumps({"times": self.times.tolist()} | self.record, indent=2) + "\n"
        write_whole(Path(path), text.encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Schedule:
        """Reads what `save` wrote.

        Raises:
            ValueError: if the file is no schedule, naming it.
            FileNotFoundError: if it is not there.
        """
        try:
            record = read_json(Path(path))
            return cls(record.pop("times"), record | {"nfe": int(record["nfe"])})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a schedule written by Schedule.save: {error!r}") from error

    def plot(self, path: str | os.PathLike[str], sde: SDE) -> None:
        """Draws the lengths of the steps in log-SNR, beside equal ones; needs matplotlib."""
        from matplotlib.figure import Figure

        log_snr = sde.log_snr(self.times.cpu())
        figure = Figure(figsize=(6, 3), layout="constrained")
        axes = figure.subplots()
        axes.stairs(log_snr.diff().numpy(), log_snr.numpy(), label=str(self.record["chosen"]))
        axes.axhline(float(log_snr[-1] - log_snr[0]) / self.steps, color="gray", linestyle=":", label="log-SNR")
        axes.set(xlabel="log-SNR", ylabel="length of the step", ylim=(0, None), title=f"{self.nfe} calls")
        axes.legend()
        figure.savefig(path, dpi=120)

    def __str__(self) -> str:
        lines = [f"{self.nfe} calls; pilot: {self.record['cost']} calls, {self.record['pilot']} samples"]
        for name, scores in self.record["candidates"].items():
            mark = "*" if name == self.record["chosen"] else " "
            lines.append(
                f"{mark} {name:14} gain {scores['gain']:+.2e}  error {scores['error']:.2e}  score {scores['score']:.2e}"
            )
        return "\n".join(lines)


def calibrate(
    score_fn: ScoreModel | ScoreFn,
    sde: SDE | None = None,
    *,
    nfe: int | None = None,
    rtol: float | None = None,
    shape: Sequence[int] | None = None,
    cond: Cond | None = None,
    pilot: int = PILOT,
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
) -> Schedule:
    r"""The shape of a grid for this model, and for `rtol` its number of calls, from a few pilot samples.

        schedule = fastsde.calibrate(model, nfe=12)
        r = fastsde.sample(model, n=50_000, controller=schedule)

    `pilot` samples are drawn along the probability flow with twice the calls, as reference, and with each candidate:
    `Grid.tapered` (what `sample(nfe=...)` walks), `Grid.log_snr`, that moved a quarter of the way to `Grid.karras`, and
    one that leans towards the density (rms of d^3 D / dlam^3)^(1/4), with which all steps have equal errors of order 3.
    With X a reference sample less their mean and E the candidate's error,

        gain = median <E, X> / <X, X>,    error = median |E|^2 / mean |X|^2,    score = gain^2 + error / 10

    because a gain moves the law of the samples and errors of random sign hardly do. The lowest score wins, if it is a
    fifth below that of `Grid.tapered`. With `rtol` the number of calls is the first of 8, 12, 18, .. from which half
    as many again move a sample by less than rtol of its size, in the median.

    Args:
        score_fn: as for `sample`.
        sde: as for `sample`.
        nfe: network calls of a sample, at least 5.
        rtol: in place of `nfe`: the relative difference allowed, in (0, 1).
        shape: shape of one sample, if the model does not know it.
        cond: conditioning of the pilot samples, each with leading axis `pilot`.
        pilot: number of pilot samples, at least 3.
        seed: of the pilot samples, which are none of those that `sample` draws by default.
        cache: a JSON file to keep the schedule in. If it is there and was made for these weights and settings, it is
            returned without any call; made for others, it is replaced.

    Raises:
        ValueError, TypeError: before the first network call, naming the argument.
        RuntimeError: if a pilot sample fails.
    """
    model = as_model(score_fn, sde)
    process = model.sde if sde is None else sde
    if (nfe is None) == (rtol is None):
        raise ValueError(f"give either nfe= or rtol=; got nfe={nfe}, rtol={rtol}.")
    if nfe is not None:
        nfe = check_count("nfe", nfe, 5 * model.calls)
    elif not isinstance(rtol, (int, float)) or not 0 < rtol < 1:
        raise ValueError(f"rtol must be in (0, 1); got {rtol!r}.")
    event = model.event_shape if shape is None else tuple(shape)
    if event is None:
        raise ValueError("which shape has a sample? Give shape=, for example shape=(3, 32, 32).")
    settings = {
        "asked": {"nfe": nfe, "rtol": rtol},
        "pilot": check_count("pilot", pilot, 3),
        "seed": check_count("seed", seed, 0),
        "sde": repr(process),
        "shape": list(event),
        "model": repr(model),
        "cond_sha256": _digest({**(model.default_cond or {}), **(cond or {})}),
        "weights_sha256": fingerprint(model),
    }
    if cache is not None:
        if settings["weights_sha256"] is None:
            raise ValueError("cache= needs a network with weights to know it by; got a plain function.")
        if not Path(cache).parent.is_dir():
            raise ValueError(f"cache= must be a file in a folder that exists; got {cache}.")
        if Path(cache).exists():
            kept = Schedule.load(cache)
            if all(kept.record.get(key) == value for key, value in settings.items()):
                return kept
    schedule = _Pilot(model, process, event, cond, pilot, seed).schedule(nfe, rtol, settings)
    if cache is not None:
        schedule.save(cache)
    return schedule


def fingerprint(model: ScoreModel) -> str | None:
    """SHA-256 over names and values of the network's weights, in hexadecimal; None for a plain function."""
    if not isinstance(model.network, nn.Module):
        return None
    return _digest(model.network.state_dict())


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def to_karras(sde: SDE, steps: int) -> Grid:
    """Equal steps in log-SNR, each time moved a quarter of the way to that of `Grid.karras`."""
    equal, karras = Grid.log_snr(sde, steps).times, Grid.karras(sde, steps).times
    inner = torch.lerp(sde.log_snr(equal[1:-1]), sde.log_snr(karras[1:-1]), _TO_KARRAS)
    return Grid(torch.cat([equal[:1], sde.t_of_log_snr(inner), equal[-1:]]))


class _Watched(Wrapper):
    """The same model, keeping every prediction of the denoised sample."""

    def __init__(self, model: ScoreModel) -> None:
        super().__init__(model)
        self.seen = list[State]()

    def __call__(self, x_t: State, t: Time, cond: Cond | None = None, level: Level | None = None) -> Prediction:
        prediction = self.model(x_t, t, cond, level)
        self.seen.append(prediction.x_0)
        return prediction


class _Pilot:
    """Runs of the same few samples on one grid after another."""

    def __init__(
        self, model: ScoreModel, sde: SDE, event: tuple[int, ...], cond: Cond | None, count: int, seed: int
    ) -> None:
        self.model, self.sde, self.cost = model, sde, 0
        # The last numbers of the stream, which no run from 0 on reaches.
        index = torch.arange((1 << 32) - count, 1 << 32)
        self.options: dict[str, Any] = {"shape": (count, *event), "index": index, "seed": seed, "cond": cond}
        self.options["batch_size"] = count

    def run(self, grid: Grid, model: ScoreModel | None = None) -> Tensor:
        """The samples on a grid, in float64, with shape (count, d)."""
        r: SampleResult = sample(model or self.model, self.sde, solver=ExponentialPC(), controller=grid, **self.options)
        self.cost += int(r.nfe.sum())
        if not r.success.all():
            raise RuntimeError(f"pilot samples failed: {r.counts()}.")
        return r.samples.double().flatten(1).cpu()

    def schedule(self, nfe: int | None, rtol: float | None, settings: dict[str, Any]) -> Schedule:
        """The grid with the lowest score, and how it was found."""
        steps = self._steps_for(float(rtol or 0)) if nfe is None else nfe // self.model.calls - 1
        # The reference has no long first step, whose error it would share with the candidates that do.
        watched, fine = _Watched(self.model), Grid.tapered(self.sde, 2 * steps + 1, first=1.0)
        reference = self.run(fine, watched)
        candidates = {
            "tapered": Grid.tapered(self.sde, steps),
            "log-SNR": Grid.log_snr(self.sde, steps),
            "to Karras": to_karras(self.sde, steps),
            "measured": self._leaning(fine, torch.stack(watched.seen), steps),
        }
        scores = {name: _score(self.run(grid), reference) for name, grid in candidates.items()}
        chosen = min(scores, key=lambda name: scores[name]["score"])
        if scores[chosen]["score"] > _MARGIN * scores["tapered"]["score"]:
            chosen = "tapered"
        record = {"nfe": (steps + 1) * self.model.calls, "cost": self.cost, "chosen": chosen, "candidates": scores}
        return Schedule(candidates[chosen].times, settings | record)

    def _steps_for(self, rtol: float) -> int:
        calls, before = 8, self.run(Grid.tapered(self.sde, 7))
        while calls < 1000:
            after = self.run(Grid.tapered(self.sde, calls * 3 // 2 - 1))
            if float(((after - before).norm(dim=1) / after.norm(dim=1)).median()) <= rtol:
                break
            calls, before = calls * 3 // 2, after
        return calls - 1

    def _leaning(self, fine: Grid, x_0: Tensor, steps: int) -> Grid:
        """The tapered grid, warped part of the way to equal errors of its steps."""
        ends = self.sde.log_snr(fine.times.cpu()) / 2
        slopes, lam = x_0.double().flatten(2).cpu(), ends
        for _ in range(3):  # divided differences, each between the places of the one before
            slopes, lam = slopes.diff(dim=0) / lam.diff()[:, None, None], (lam[1:] + lam[:-1]) / 2
        size = slopes.square().mean(2).sqrt().median(1).values
        line = torch.linspace(float(ends[0]), float(ends[-1]), 1001, dtype=torch.float64)
        blur = (-0.5 * ((line[:, None] - lam) / _BLUR) ** 2).softmax(1)
        density = (blur @ size).clamp(min=1e-12) ** 0.25
        density = 1 - _LEAN + _LEAN * density / density.mean()
        reached = torch.cat([torch.zeros(1, dtype=torch.float64), ((density[1:] + density[:-1]) / 2).cumsum(0)])
        tapered = self.sde.log_snr(Grid.tapered(self.sde, steps).times) / 2
        share = (tapered - ends[0]) / (ends[-1] - ends[0]) * reached[-1]
        k = torch.searchsorted(reached, share[1:-1]).clamp(1, len(line) - 1)
        inner = torch.lerp(line[k - 1], line[k], (share[1:-1] - reached[k - 1]) / (reached[k] - reached[k - 1]))
        times = self.sde.t_of_log_snr(2 * inner)
        return Grid(torch.cat([fine.times[:1].cpu(), times, fine.times[-1:].cpu()]))


def _score(x: Tensor, reference: Tensor) -> dict[str, float]:
    centred, error = reference - reference.mean(0), x - reference
    gain = float(((error * centred).sum(1) / centred.square().sum(1)).median())
    relative = float(error.square().sum(1).median() / centred.square().sum(1).mean())
    return {"gain": gain, "error": relative, "score": gain**2 + relative / 10}
