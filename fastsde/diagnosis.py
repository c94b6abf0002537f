"""`diagnose`: does this reading fit this network?"""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastsde.api import sample
from fastsde.arguments import as_model, resolve_cond, resolve_device
from fastsde.batching import expand_like
from fastsde.checks import check_count, check_states
from fastsde.noise import FreshNoise
from fastsde.result import DataRangeWarning, SamplingError, Status
from fastsde.score.base import PREDICTIONS, Prediction, ScoreModel, Wrapper, check_shape, innermost
from fastsde.sde.base import SDE
from fastsde.sde.discrete import DiscreteVPSDE
from fastsde.sde.edm import EDM
from fastsde.sde.ve import VESDE
from fastsde.types import Cond, ScoreFn, State, Time

_Range = tuple[float, float]
_Named = tuple[str, Callable[[Time], Time] | None]
"""A time of the network by its formula; None for the one that it has."""
_AS_GIVEN: _Named = ("as given", None)
_RANGES = ((-1.0, 1.0), (0.0, 1.0), (0.0, 255.0))
_LEVELS, _PILOT, _CALLS, _MOST_DATA = 6, 16, 10, 64
_LEAST, _MOST = 0.05, 20.0
"""Levels lie between these multiples of the data's standard deviation, in sigma / alpha."""
_FITS = 1.5
"""Error over that of the best linear prediction that passes at every level. A right reading has at most 1, but for the
network's own errors and chance."""
_BETTER, _CLEAR = 0.9, 0.8
"""Geometric means: of another reading's error over the given one's, below which the other is better; of the given one's
over the linear one's, below which it is clearly better and times and ranges need not be tried."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """One way to read a network.

    Attributes:
        prediction: as for `ScoreModel`.
        sign: 1, or -1 for a network that returns the negative.
        time: what the network gets: "as given", or a formula in t, the SDE's time.
        data_range: that of the data it was trained on.
    """

    prediction: str
    sign: int
    time: str
    data_range: tuple[float, float]

    def __str__(self) -> str:
        low, high = self.data_range
        minus = "" if self.sign == 1 else "the negative of "
        return f"{minus}{self.prediction}, time {self.time}, data in {low:g} .. {high:g}"


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found. `print` shows the table and the advice.

    Attributes:
        fits: whether the model as given fits its network.
        advice: what to do, in some sentences.
        given: the reading that the model has.
        best: the reading that fits best. It is `given` if that fits, and None if no reading fits.
        model: a score model with the best reading; None if there is none. If the given reading does not fit, wrappers
            such as guidance or clipping are left out.
        level: sigma / alpha of the tested levels, with shape (k,), decreasing.
        error: mean squared error of the denoised prediction, divided by that of the best linear prediction, at each
            level. For a right reading it is at most 1, apart from the network's own errors and chance.
        magnitude: root mean square of the denoised prediction, at each level; grows as noise falls.
        best_error: `error` of the best reading.
        calls: network calls, each of one batch.
        from_data: whether data were given. If not, the model's own samples were used.
    """

    fits: bool
    advice: str
    given: Reading
    best: Reading | None
    model: ScoreModel | None
    level: Tensor
    error: Tensor
    magnitude: Tensor
    best_error: Tensor | None
    calls: int
    from_data: bool

    def __str__(self) -> str:
        what = "data" if self.from_data else "its own samples"
        lines = [
            f"{'fits' if self.fits else 'does not fit'}: {self.given} ({self.calls} calls, from {what})",
            "",
            "  sigma / alpha   error / linear   size of D" + ("" if self.best_error is None else "   best reading"),
        ]
        for k, (level, error, size) in enumerate(zip(self.level, self.error, self.magnitude, strict=True)):
            best = "" if self.best_error is None else f"{float(self.best_error[k]):15.3g}"
            lines.append(f"  {float(level):13.3g}   {float(error):14.3g}   {float(size):9.3g}{best}")
        return "\n".join([*lines, "", self.advice])

    def plot(self, path: str | Path) -> None:
        """Draws the errors over the levels as PNG; needs matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("the picture needs matplotlib: pip install matplotlib.") from error
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot(
            xlabel="noise, sigma / alpha", ylabel="squared error / best linear prediction", xscale="log", yscale="log"
        )
        axes.axhline(1.0, color="0.6", linewidth=1, label="best linear prediction")
        axes.plot(self.level, self.error, marker="o", label=f"as given: {self.given}")
        if self.best_error is not None and self.best is not None and self.best != self.given:
            axes.plot(self.level, self.best_error, marker="s", label=f"best: {self.best}")
        axes.legend(fontsize="small")
        figure.savefig(path, dpi=120)


def diagnose(
    score_fn: ScoreModel | ScoreFn,
    sde: SDE | None = None,
    *,
    data: Tensor | None = None,
    shape: tuple[int, ...] | None = None,
    cond: Cond | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Diagnosis:
    r"""Says whether a network is read as it was trained, and if not, which reading fits.

    With the right reading a network gives D(x_t) = E[x_0 | x_t]. This has the smallest squared error of all predictions
    of x_0, at each level of noise. So it is at least as good as the best linear prediction m + c (x_t - alpha m), c =
    alpha s^2 / (alpha^2 s^2 + sigma^2), with m the mean of the data and s^2 their variance. This is tested on data with
    noise of six levels. A wrong reading fails at some level, or another reading has a smaller error. Other predictions
    and signs are always compared. If the given reading is not clearly better than the linear prediction, the usual
    times and three ranges of the data are compared, too.

    Without data, each reading draws 16 samples with 10 calls and is tested on them. They must also stay in the range of
    the data. With data more wrong readings are found.

    It costs 14 calls with data if the model fits, and 24 without data. If other readings are tried, it costs about 140
    calls with data and some hundreds without.

    Args:
        score_fn: as for `sample`, like sde.
        data: about 16 data, at least 4, with shape (n, *event), in the model's `data_range`. At most 64 are used.
        shape: shape of one sample, (C, H, W), if neither the model nor the data say it.
        cond: keyword arguments of the network, each with the leading axis of `data` (or 16).
        seed: that of the noise.
        device: that of the network by default.
        progress: show a bar over the times tried in a search.

    Returns:
        A `Diagnosis`: the verdict, a table of levels, the reading that fits and a score model with it.

    Raises:
        ValueError, TypeError: before the first network call, naming the argument.
    """
    model = as_model(score_fn, sde)
    if data is not None:
        check_states("data", data)
        if len(data) < 4:
            raise ValueError(f"data must have at least 4 rows, better 16; got {len(data)}.")
        if cond is not None and isinstance(cond, Mapping):
            cond = {k: v[:_MOST_DATA] if isinstance(v, Tensor) and len(v) == len(data) else v for k, v in cond.items()}
        data = data[:_MOST_DATA]
    event = check_shape("shape", shape) or model.event_shape if data is None else tuple(data.shape[1:])
    if event is None:
        raise ValueError("the model does not know its event shape; give shape=(C, H, W), or data=.")
    if model.event_shape is not None and event != tuple(model.event_shape):
        raise ValueError(f"the model's samples have shape {model.event_shape}; got {event}.")
    n = _PILOT if data is None else len(data)
    place = resolve_device(model, device, None)
    data = None if data is None else data.to(place, torch.float32)
    bench = _Bench(model, data, (n, *event), resolve_cond(model, cond, n, place), check_count("seed", seed, 0), place)
    with torch.no_grad(), model.sampling():
        return bench.run(progress=progress)


@dataclasses.dataclass
class _Trial:
    """What came of one reading."""

    reading: Reading
    model: ScoreModel
    level: Tensor
    error: Tensor
    magnitude: Tensor
    data: Tensor
    inside: bool = True

    @property
    def score(self) -> float:
        """Mean of the logarithm of the error: what the right reading makes smallest."""
        return float(self.error.clamp(1e-6, 1e12).log().mean())

    @property
    def passes(self) -> bool:
        return self.inside and bool((self.error <= _FITS).all())


@dataclasses.dataclass
class _Noised:
    """Data, and at each level their states, times, and the squared error of the best linear prediction."""

    data: Tensor
    level: Tensor
    at: list[tuple[State, Time, float]]


def _range_of(trial: _Trial) -> str:
    """A remark if the data seem to lie in half of the range."""
    low, high = trial.model.data_range
    least, most = float(trial.data.min()), float(trial.data.max())
    if not (low < 0 < high <= 1 and least > -0.1 * high and most > 0.5 * high):
        return ""
    return f" But values lie in {least:.2g} .. {most:.2g}: is data_range (0, {high:g}), not ({low:g}, {high:g})?"


def _judged(model: ScoreModel, reading: Reading, noised: _Noised, outputs: list[State]) -> _Trial:
    """Errors of a reading, from the network's outputs on noised data."""
    errors, sizes = [], []
    for out, (x_t, t, least) in zip(outputs, noised.at, strict=True):
        x_0 = Prediction(model.prediction, out, x_t, model.sde.alpha(t), model.sde.sigma(t)).x_0.double()
        errors.append(float((x_0 - noised.data).square().mean()) / least)
        sizes.append(float(x_0.square().mean().sqrt()))
    error = torch.tensor(errors, dtype=torch.float64).nan_to_num(math.inf)
    return _Trial(reading, model, noised.level, error, torch.tensor(sizes, dtype=torch.float64), noised.data)


class _Bench:
    """Tries readings of one network, on data or on samples of the given shape (n, *event)."""

    def __init__(
        self,
        model: ScoreModel,
        data: Tensor | None,
        shape: tuple[int, ...],
        cond: dict[str, Tensor],
        seed: int,
        device: torch.device,
    ) -> None:
        self.model, self.data, self.shape, self.cond, self.device = model, data, shape, cond, device
        self.noise, self.calls, self.seed = FreshNoise(seed, shape[1:], torch.float32), 0, seed
        self.own_cond = cond  # what the innermost model sees of it
        while isinstance(model, Wrapper):
            self.own_cond, model = model.inner_cond(self.own_cond), model.model
        self.index = torch.arange(shape[0], device=device)

    def run(self, *, progress: bool) -> Diagnosis:
        """Tries the given reading and, if it is not clearly right, the others."""
        inside, data, (low, high) = innermost(self.model), self.data, self.model.data_range
        given = Reading(inside.prediction, 1, "as given", self.model.data_range)
        first = self._tried(self.model, given, data)
        if data is not None and ((data - (low + high) / 2).abs() <= high - low).float().mean() <= 0.99:
            advice = (
                f"The data lie in {float(data.min()):g} .. {float(data.max()):g}, data_range is ({low:g}, {high:g}): "
                "one of the two is wrong. Say which range the network was trained on, and give data in it."
            )
            return self._diagnosis(first, None, advice, fits=False)
        timeless = self._ignores_time(first)
        # Other predictions and signs at the given time: some wrong ones pass by themselves.
        rivals: list[_Trial] = []
        if first.passes and not inside.preconditioned:
            noised = self._noised(inside.sde, first.data)
            rivals = list(self._tried_all(inside, _AS_GIVEN, inside.data_range, noised))
        beaten = any(rival.passes and rival.score < first.score + math.log(_BETTER) for rival in rivals)
        if first.passes and not beaten and first.score < math.log(_CLEAR) and not timeless:
            return self._diagnosis(first, first, self._fitting(first), fits=True)
        trials = list(self._others(inside, progress)) if not inside.preconditioned else []
        passing = [trial for trial in trials if trial.passes]
        # Of readings that are as good as each other, the one with the least to change.
        best = min(passing, key=lambda trial: trial.score + 0.01 * len(_changes(given, trial.reading)), default=None)
        if first.passes and (best is None or best.score > first.score + math.log(_BETTER)):
            note = " The network gives the same at any time: check that it gets one." if timeless else ""
            return self._diagnosis(first, first, self._fitting(first) + note, fits=True)
        if best is None:
            more = "" if data is not None else " Give data=, 16 of them: with data more readings can be told apart."
            advice = f"No usual reading fits.{self._symptom(first)}{self._start(first)}{_range_of(first)}{more}"
            return self._diagnosis(first, None, advice, fits=False)
        if best.reading == given:  # the network fits; guidance or clipping around it is meant to change predictions
            advice = self._fitting(best) + " What is wrapped around it, guidance or clipping, changes its predictions."
            return self._diagnosis(first, first, advice, fits=True)
        # Times that differ little fit alike, too: only other outputs are named.
        alike = {
            (trial.reading.prediction, trial.reading.sign): trial.reading
            for trial in passing[::-1]
            if trial.score < best.score - math.log(_BETTER)
        }
        alike.pop((best.reading.prediction, best.reading.sign), None)
        return self._diagnosis(first, best, self._advice(given, best.reading, list(alike.values())), fits=False)

    def _diagnosis(self, first: _Trial, best: _Trial | None, advice: str, *, fits: bool) -> Diagnosis:
        return Diagnosis(
            fits=fits,
            advice=advice,
            given=first.reading,
            best=None if best is None else best.reading,
            model=None if best is None else best.model,
            level=first.level,
            error=first.error,
            magnitude=first.magnitude,
            best_error=None if best is None or best is first else best.error,
            calls=self.calls,
            from_data=self.data is not None,
        )

    def _fitting(self, trial: _Trial) -> str:
        """The verdict on a reading that fits, with what else was seen."""
        return "The reading fits the network." + self._start(trial) + _range_of(trial)

    def _start(self, trial: _Trial) -> str:
        """A remark if the start is no noise alone."""
        sde, spread = trial.model.sde, float(trial.data.std())
        noise = math.exp(-0.5 * float(sde.log_snr(torch.tensor([sde.t_max], dtype=torch.float64))))
        if noise >= 5 * spread:
            return ""
        return (
            f" But sampling starts where sigma / alpha is {noise:.3g}, which is not large beside data with a standard "
            f"deviation of {spread:.3g}: the start, noise alone, is not the law there."
        )

    def _advice(self, given: Reading, best: Reading, alike: list[Reading]) -> str:
        """How to build the score model of the best reading, and which others could be it."""
        inside = innermost(self.model)
        network = "network" if best.sign == 1 else "lambda x, t, **cond: -network(x, t, **cond)"
        time = "" if best.time == "as given" else f", timestep=lambda t: {best.time}"
        if not time and inside.timestep is not None:
            time = ", timestep=timestep"
        cond = ", default_cond=default_cond" if inside.default_cond else ""
        event = "" if inside.event_shape is None else f", event_shape={tuple(inside.event_shape)}"
        low, high = best.data_range
        text = (
            f"Another reading fits ({', '.join(_changes(given, best))}): fastsde.ScoreModel({network}, sde, "
            f"{best.prediction!r}{time}{event}{cond}, data_range=({low:g}, {high:g})). The names are those of what you "
            "gave. It is the `.model` of this diagnosis."
        )
        if alike:
            others = "; ".join(map(str, alike))
            text += f" These fit about as well: {others}. Take the one that the network was trained with."
        return text

    def _symptom(self, trial: _Trial) -> str:
        """What is seen of a model that does not fit."""
        sde, span = self.model.sde, self.model.data_range[1] - self.model.data_range[0]
        if not torch.isfinite(trial.error).all():
            return " The network gives NaN or infinity."
        if not trial.inside:
            return f" Its samples leave the data range: predictions of data have size {trial.magnitude.max():.3g}."
        if float(trial.magnitude[0]) > span:
            return f" Where noise is high, predictions of data have size {trial.magnitude[0]:.3g}, as no data have."
        worst = int(trial.error.argmax())
        return (
            f" At sigma / alpha = {float(trial.level[worst]):.3g} its error is {float(trial.error[worst]):.3g} times "
            f"that of a linear prediction; the process is {sde}."
        )

    def _others(self, inside: ScoreModel, progress: bool) -> Iterator[_Trial]:
        """All readings but the given one; without data, those whose prediction at high noise has the size of data."""
        noised: dict[_Range, _Noised | None] = {inside.data_range: None}
        if self.data is not None:
            ranges = dict.fromkeys((inside.data_range, *_RANGES))
            noised = {r: self._noised(inside.sde, _framed(self.data, inside.data_range, r)) for r in ranges}
        for time in tqdm(_times(inside), desc="readings", unit="time", disable=not progress):
            for data_range, framed in noised.items():
                yield from self._tried_all(inside, time, data_range, framed)

    def _tried_all(self, inside: ScoreModel, time: _Named, span: _Range, noised: _Noised | None) -> Iterator[_Trial]:
        """All predictions and signs of a network with this time, from the same calls where data are given."""
        readings = [Reading(p, sign, time[0], span) for p in PREDICTIONS for sign in (1, -1)]
        models = [self._read(inside, reading, time[1]) for reading in readings]
        try:
            if noised is not None:
                outputs = [self._output(models[0], x_t, t) for x_t, t, _ in noised.at]
                for model, reading in zip(models, readings, strict=True):
                    yield _judged(model, reading, noised, [reading.sign * out for out in outputs])
                return
            for model, reading in zip(models, readings, strict=True):
                if self._starts_inside(model):
                    yield self._tried(model, reading, None)
        except (RuntimeError, IndexError, SamplingError):
            return  # a time that the network cannot take

    def _read(self, inside: ScoreModel, reading: Reading, time: Callable[[Time], Time] | None) -> ScoreModel:
        model = copy.copy(inside)
        model.prediction, model.data_range, model.knows_range = reading.prediction, reading.data_range, True
        if reading.time != "as given":
            model.timestep = time
        return model if reading.sign == 1 else _Negative(model)

    def _tried(self, model: ScoreModel, reading: Reading, data: Tensor | None) -> _Trial:
        """The model on data, or on its own samples."""
        inside = True
        if data is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DataRangeWarning)
                r = sample(
                    model, shape=self.shape, nfe=max(_CALLS, 2 * model.calls), cond=self._cond(model),
                    seed=self.seed, device=self.device,
                )  # fmt: skip
            self.calls += int(r.nfe.max())
            inside = bool((r.status == Status.SUCCESS).all()) and r.outside is not None and not r.outside.any()
            data = r.samples.nan_to_num(0.0)
            low, high = model.data_range
            # Samples that are all the same are none, however well they are denoised.
            inside = inside and float(data.std(0).mean()) > 0.01 * (high - low)
        noised = self._noised(model.sde, data)
        outputs = [self._output(model, x_t, t) for x_t, t, _ in noised.at]
        return dataclasses.replace(_judged(model, reading, noised, outputs), inside=inside)

    def _noised(self, sde: SDE, data: Tensor) -> _Noised:
        """The data at each level, from most noise to least, and how well a linear prediction does there."""
        ends = torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)
        most, least = (-0.5 * sde.log_snr(ends)).exp().tolist()
        spread = max(float(data.std()), 1e-12)
        high, low = min(most, _MOST * spread), max(least, _LEAST * spread)
        if not low < high:
            high, low = most, least
        noised = _Noised(data, torch.logspace(math.log10(high), math.log10(low), _LEVELS, dtype=torch.float64), [])
        mean = (data.sum(0, keepdim=True) - data) / (len(data) - 1)  # of the others: a datum does not predict itself
        variance = float(data.var(0).mean())
        for k, rho in enumerate(noised.level.tolist()):
            t = sde.t_of_log_snr(torch.full((len(data),), -2 * math.log(rho), dtype=torch.float64, device=self.device))
            t = t.clamp(sde.t_min, sde.t_max)
            x_t = sde.marginal(data, t, self.noise.normal(self.index, torch.full_like(self.index, k), 0))
            alpha, sigma = sde.alpha(t), sde.sigma(t)
            shrink = alpha * variance / (alpha**2 * variance + sigma**2)
            linear = mean + expand_like(shrink, x_t) * (x_t - expand_like(alpha, x_t) * mean)
            noised.at.append((x_t, t, max(float((linear - data).double().square().mean()), 1e-30)))
        return noised

    def _output(self, model: ScoreModel, x_t: State, t: Time) -> State:
        self.calls += model.calls
        return model.output(x_t, t, self._cond(model))

    def _cond(self, model: ScoreModel) -> dict[str, Tensor]:
        """What the model sees of the conditioning: all of it, or what wrappers leave."""
        return self.cond if model is self.model else self.own_cond

    def _starts_inside(self, model: ScoreModel) -> bool:
        """Whether predictions from noise alone, where it is high, have the size of data."""
        low, high = model.data_range
        t = torch.full(self.shape[:1], model.sde.t_max, dtype=torch.float64, device=self.device)
        x = model.sde.prior(self.noise.prior(self.index))
        prediction = Prediction(model.prediction, self._output(model, x, t), x, model.sde.alpha(t), model.sde.sigma(t))
        # Twice the range, and what an error of a tenth in epsilon makes of it.
        room = 2 * (high - low) + 0.1 * float(model.sde.sigma(t)[0] / model.sde.alpha(t)[0])
        return float((prediction.x_0 - (low + high) / 2).double().square().mean().sqrt()) < room

    def _ignores_time(self, trial: _Trial) -> bool:
        """Whether the network gives the same whatever its time, as far as one state can tell."""
        sde = trial.model.sde
        x = self.noise.prior(self.index)
        ends = torch.tensor([[sde.t_min], [sde.t_max]], dtype=torch.float64, device=self.device)
        early, late = (self._output(trial.model, x, t) for t in ends.expand(2, len(x)))
        return float((early - late).abs().max()) <= 1e-6 * float(early.abs().max())


class _Negative(Wrapper):
    """The negative of what a network returns."""

    def output(self, x_t: State, t: Time, cond: Cond | None = None) -> State:
        return -self.model.output(x_t, t, cond)


def _changes(given: Reading, other: Reading) -> list[str]:
    """In what two readings differ."""
    return [f.name for f in dataclasses.fields(Reading) if getattr(given, f.name) != getattr(other, f.name)]


def _times(model: ScoreModel) -> list[_Named]:
    """The given time of the network, and the usual ones, by their formula."""
    sde = model.sde
    n = sde.levels if isinstance(sde, DiscreteVPSDE) else 1000
    times: list[_Named] = [
        _AS_GIVEN,
        ("t", lambda t: t),
        ("1 - t", lambda t: 1 - t),
        (f"{n} * t - 1", lambda t: n * t - 1),
        (f"{n} * (1 - t)", lambda t: n * (1 - t)),
    ]
    if isinstance(sde, (EDM, VESDE)):
        times += [("sde.sigma(t)", sde.sigma), ("0.25 * sde.sigma(t).log()", lambda t: 0.25 * sde.sigma(t).log())]
    return times


def _framed(data: Tensor, given: _Range, wanted: _Range) -> Tensor:
    """Data of one range in another one."""
    return (data - given[0]) * (wanted[1] - wanted[0]) / (given[1] - given[0]) + wanted[0]
