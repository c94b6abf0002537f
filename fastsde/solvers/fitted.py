"""A solver whose times and weights were fitted to one network."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsde.files import json_hash, read_json, write_json
from fastsde.score.base import Prediction, ScoreModel, reading_hash
from fastsde.score.network import weights_hash
from fastsde.sde.base import SDE, Level
from fastsde.solvers.adams import AdamsPlan, Predicted
from fastsde.solvers.adams_weights import add_weighted, columns
from fastsde.solvers.exponential import ExponentialPC
from fastsde.types import Carry, Coef, State

Row = tuple[float, ...]
_SAME = 1e-5
"""Difference of the log-SNR up to which two processes are the same at a time."""


@dataclasses.dataclass(frozen=True)
class FittedPlan(AdamsPlan):
    """The plan of a solver with fitted weights; `output` combines the last predictions to the sample, a row a step."""

    output: Tensor


@dataclasses.dataclass(frozen=True, repr=False)
class FittedSolver(ExponentialPC):
    r"""A multistep method with its own time and weights for each step. `fit` finds them for one network.

    In y = x / alpha, with D_k the network's denoised prediction at level k, and h the step in half the log-SNR,

        y_k = a_k y_{k-1} + sum_j w_kj D_{k-1-j} + rho_k sqrt(1 - e^{-2 eta^2 h}) z,        x = sum_j v_j D_{N-j}

    Each level costs one call. So N steps cost N + 1 calls. The sample is a combination of the last predictions. With a
    `guess` the first level costs none: D_0 is the guess, the mean of the data as the network sees it in noise.
    `ExponentialPC` has this form, too, apart from its rule for a network's first value (`standard_weights`). Without
    weights this solver is `ExponentialPC` at these times.

    Args:
        eta: of the noise, as for `ExponentialPC`; a number.
        times: the levels, as decreasing times of the process. The network is called once at each of them; with a guess
            not at the first.
        log_snr: the log-SNR of the process at these times. It is compared with that of the process in `sample`.
        weights: for each step (a_k, w_k0, w_k1, ..); empty for those of `ExponentialPC`.
        output: (v_0, v_1, ..).
        guess: D_0, the elements of one sample in order; empty for a call of the network.
        weights_sha256: of the network that it was fitted to; None for a function that names no module.
        reading_sha256: of how that network was read (`score.base.reading_hash`); None for any model.
        record: how it was found, in types that JSON has.

    Raises:
        ValueError: if the numbers do not fit each other.
    """

    convergence = "none: it is for one number of calls"
    use = "a trained network, 3 to 20 calls: `fastsde.fit` makes it"

    times: Row = ()
    log_snr: Row = ()
    weights: tuple[Row, ...] = ()
    output: Row = (1.0,)
    guess: Row = ()
    weights_sha256: str | None = None
    reading_sha256: str | None = None
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("times", "log_snr", "output", "guess"):
            object.__setattr__(self, name, tuple(float(v) for v in getattr(self, name)))
        object.__setattr__(self, "weights", tuple(tuple(float(v) for v in row) for row in self.weights))
        levels = len(self.times)
        falling = all(s < t for t, s in zip(self.times, self.times[1:], strict=False))
        if levels < 2 or len(self.log_snr) != levels or not falling:
            raise ValueError(
                f"times must be at least 2, falling, with a log_snr each; got {self.times} and {self.log_snr}."
            )
        if callable(self.eta) or self.steps is not None:
            raise ValueError("a fitted solver has its own steps, and noise with a constant eta.")
        if self.weights and len(self.weights) != levels - 1:
            raise ValueError(f"weights must have a row for each of the {levels - 1} steps; got {len(self.weights)}.")
        for k, row in enumerate(self.weights, 1):
            if not 2 <= len(row) <= k + 1:
                raise ValueError(f"step {k} has 2 to {k + 1} weights: of the state and of predictions; got {len(row)}.")
        if not 1 <= len(self.output) <= levels:
            raise ValueError(f"output must have 1 to {levels} weights; got {len(self.output)}.")
        if self.guess and not self.weights:
            raise ValueError("a guess needs weights.")
        if not all(math.isfinite(v) for row in (self.times, self.output, self.guess, *self.weights) for v in row):
            raise ValueError("times, weights, output and guess must be finite.")

    @property
    def nfe(self) -> int:
        """Network calls of a sample of a model with one call an evaluation: one a level, but for a guess."""
        return len(self.times) - self.guesses

    @property
    def guesses(self) -> bool:
        """Whether a guess stands for the first prediction."""
        return bool(self.guess)

    @property
    def warm_up(self) -> bool:  # type: ignore[override]
        return not self.guesses

    @property
    def values(self) -> tuple[int, int]:
        if not self.weights:
            return super().values
        return max(len(self.output), *(len(row) - 1 for row in self.weights)), 0

    @property
    def adaptive(self) -> bool:
        return False

    def check(self, sde: SDE, times: Tensor | None) -> None:
        """Refuses other times than its own, and a process that is another one there.

        Raises:
            ValueError: saying what differs.
        """
        own = torch.tensor(self.times, dtype=torch.float64)
        if times is None or len(times) != len(own) or not torch.allclose(times.cpu(), own, rtol=1e-9, atol=0.0):
            raise ValueError("a fitted solver can only use its own times, from noise to data.")
        there = sde.log_snr(own)
        if not torch.allclose(there, torch.tensor(self.log_snr, dtype=torch.float64), rtol=0.0, atol=_SAME):
            fitted_to = self.record.get("sde", "its log-SNR differs")
            raise ValueError(f"this solver was fitted to another process: {fitted_to}; got {sde}.")

    def check_model(self, model: ScoreModel) -> None:
        """Refuses, with a ValueError, a model whose network has other weights, or that is read or guided otherwise."""
        if self.reading_sha256 is None:
            return
        how = "Fit again. Or use solver.for_any_model(), which takes any model."
        found = weights_hash(model.network)
        if found != self.weights_sha256:
            theirs, ours = (f"weights {v[:12]}" if v else "no weights" for v in (self.weights_sha256, found))
            raise ValueError(f"this solver was fitted to a network with {theirs}; this one has {ours}. {how}")
        if reading_hash(model) != self.reading_sha256:
            raise ValueError(
                "this solver was fitted to a model with another process, prediction, timestep, guidance or clipping: "
                f"{self.record.get('model')}; got {model!r}. {how}"
            )

    def for_any_model(self) -> FittedSolver:
        """The same solver, for any model: it refuses none."""
        return dataclasses.replace(self, weights_sha256=None, reading_sha256=None)

    def plan(self, sde: SDE, times: Tensor) -> AdamsPlan:
        if not self.weights:
            return super().plan(sde, times)
        at, history, levels = sde.level(times), self.values[0], len(times)
        before = (torch.arange(levels) - 1).clamp(min=0)
        h = (at.log_snr - at.log_snr[before]) / 2
        rows = torch.zeros(levels, 1 + history, dtype=torch.float64)
        rows[0, 0] = 1.0  # at the first level the state is as it is given
        for k, row in enumerate(self.weights, 1):
            rows[k, : len(row)] = torch.tensor(row, dtype=torch.float64)
        output = torch.zeros(levels, history, dtype=torch.float64)
        output[:, 0] = 1.0
        output[-1, : len(self.output)] = torch.tensor(self.output, dtype=torch.float64)
        eta = float(self.eta)  # type: ignore[arg-type] # a number, as checked
        return FittedPlan(
            keep=rows[:, 0] * at.alpha / at.alpha[before],
            std=at.sigma * (-torch.expm1(-2 * eta**2 * h)).sqrt(),
            weights=at.alpha[:, None, None] * rows[:, None, 1:],
            a=(1 + eta**2) * h,
            h=h,
            lam=at.log_snr / 2,
            alpha=at.alpha,
            count=torch.arange(levels),
            output=output,
        )

    def init(self, x_t: State) -> Carry:
        carry = super().init(x_t)
        return carry | {"past_0": self.first_prediction(x_t)} if self.guesses else carry

    def first_prediction(self, x_t: State) -> State:
        """The guess for each row, with shape (B, *event).

        Raises:
            ValueError: if it is for samples of another size.
        """
        if x_t[0].numel() != len(self.guess):
            raise ValueError(
                f"this solver was fitted to samples of {len(self.guess)} elements; got {tuple(x_t.shape[1:])}. Fit one "
                "for this shape, or without a guess: fit(..., guess=False)."
            )
        return torch.tensor(self.guess).to(x_t).reshape(x_t.shape[1:]).expand_as(x_t).clone()

    def correct(self, ahead: Predicted, prediction: Prediction, c: AdamsPlan, carry: Carry) -> tuple[State, Carry]:
        x_s, kept = super().correct(ahead, prediction, c, carry)
        if isinstance(c, FittedPlan):
            first, *rest = columns(c.output, x_s)
            new, *past = self._past(kept)
            kept = {**kept, "x_0": add_weighted(first * new, rest, past)}
        return x_s, kept

    def __repr__(self) -> str:
        return f"FittedSolver({self.nfe} calls, {json_hash(self.as_json())[:12]})"

    def as_json(self) -> dict[str, Any]:
        """Everything, as JSON can hold it; `from_json` reads it."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, "weights": [list(row) for row in self.weights], "record": dict(self.record)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], source: str = "the content") -> FittedSolver:
        """The solver that `as_json` describes.

        Raises:
            ValueError: if it describes none, naming `source`.
        """
        if not isinstance(content, Mapping):
            raise ValueError(f"{source} is no fitted solver: it is a {type(content).__name__}.")
        try:
            content = {"guess": (), **content}  # files of version 0.1 have none
            known = {field.name for field in dataclasses.fields(cls)}
            if set(content) != known:
                raise ValueError(f"it has the keys {sorted(content)}")
            rows = {name: tuple(content[name]) for name in ("times", "log_snr", "output", "guess")}
            return cls(**{**content, **rows, "weights": tuple(tuple(row) for row in content["weights"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{source} is no fitted solver as FittedSolver.save writes it: {error}.") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it as JSON, whole or not at all."""
        write_json(Path(path), self.as_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FittedSolver:
        """Reads what `save` wrote.

        Raises:
            ValueError: if the file is no fitted solver, naming it.
            FileNotFoundError: if it is not there.
        """
        return cls.from_json(read_json(Path(path)), str(path))

    def __str__(self) -> str:
        record, lams = self.record, [v / 2 for v in self.log_snr]
        lines = [f"{self.nfe} calls a sample" + (f", eta {self.eta:g}" if self.eta else "")]
        if "cost" in record:
            lines[0] += f"; the fit took {record['cost']:,} calls, {record['pilots']} pilot samples"
            own, theirs, ratio, low, high = (
                math.nan if v is None else v
                for v in (record["error"], record["default_error"], record["ratio"], *record["ratio_interval"])
            )
            lines.append(
                f"error on the held-out pilots: {own:.3g}; the default's: {theirs:.3g}; in the mean {ratio:.2f} times "
                f"({low:.2f} to {high:.2f})"
            )
            if not self.weights:
                lines.append("the default was as good: these are its times and weights")
        lines.append("half log-SNR   time       weights of the state; of the predictions, the newest first")
        for k, (lam, t) in enumerate(zip(lams, self.times, strict=True)):
            row = self.weights[k - 1] if k and self.weights else ()
            text = f"{row[0]:.4g}; " + ", ".join(f"{v:.4g}" for v in row[1:]) if row else ""
            text = "no call: the mean of the data" if k == 0 and self.guesses else text
            lines.append(f"{lam:12.3f}   {t:<8.5g}   {text}")
        if self.weights:
            lines.append("sample:                   " + ", ".join(f"{v:.4g}" for v in self.output))
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the levels beside those of the default, and the error against the price, as PNG; needs matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("the picture needs matplotlib: pip install matplotlib.") from error
        figure = Figure(figsize=(7, 3), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        rows = {"fitted": self.log_snr[self.guesses :], "default": self.record.get("default_log_snr", ())}
        for height, (name, levels) in enumerate(rows.items()):
            left.plot([v / 2 for v in levels], [height] * len(levels), "o-", label=name)
        left.set(yticks=range(len(rows)), yticklabels=list(rows), ylim=(-0.5, 1.5), title=f"{self.nfe} calls a sample")
        left.set(xlabel="half log-SNR of the calls")
        path_of = self.record.get("path", ())
        right.plot([p["cost"] for p in path_of], [p["error"] for p in path_of], "o-", label="held-out pilots")
        if "default_error" in self.record:
            right.axhline(self.record["default_error"], color="0.5", linestyle=":", label="default")
        right.set(xlabel="calls of the fit", ylabel="error, share of a sample's size", yscale="log")
        right.legend()
        figure.savefig(path, dpi=120)


def standard_weights(sde: SDE, times: Sequence[float], eta: float = 0.0, order: int = 3) -> tuple[Row, ...]:
    """The weights with which `FittedSolver` does what `ExponentialPC` does, but for its rule for a first value.

    A corrected state is the predicted one and a combination of predictions, so the next predicted state is one of the
    last predicted state and of up to four predictions. What is missing is the part of that rule that depends on norms.
    `times` are the falling levels; `eta` and `order` are those of `ExponentialPC`.
    """
    solver = ExponentialPC(eta=eta, order=order)
    at = sde.level(torch.tensor(list(times), dtype=torch.float64))
    # y = x / alpha is the state of the process with alpha 1 and the same log-SNR.
    scaled = Level(torch.ones_like(at.alpha), at.sigma / at.alpha)
    kept = max(*solver.values, 1)
    levels = len(at.alpha)
    count = torch.arange(levels)
    before = (count[:, None] - 1 - torch.arange(kept)).clamp(min=0)
    start: Coef = before[:, 0]
    c = solver.coefficients(Level(scaled.alpha[start], scaled.sigma[start]), scaled, scaled.log_snr[before] / 2, count)
    keep, weights = c.keep.tolist(), c.weights.tolist()
    rows, moved = list[Row](), dict[int, float]()  # what correction added to the last state, by the number of D
    for k in range(1, levels):
        row = {j: keep[k] * v for j, v in moved.items()}
        for j in range(min(k, kept)):
            row[k - 1 - j] = row.get(k - 1 - j, 0.0) + weights[k][0][j]
        moved = {}
        if solver.values[1]:
            newest = [k - 1, k, *(k - 2 - j for j in range(kept - 2))]
            for j, v in zip(newest, weights[k][1], strict=True):
                if j >= 0:
                    moved[j] = v
            for j in range(min(k, kept)):
                moved[k - 1 - j] = moved.get(k - 1 - j, 0.0) - weights[k][0][j]
        rows.append((keep[k], *(row.get(k - 1 - j, 0.0) for j in range(min(k, kept + 1)))))
    return tuple(rows)
