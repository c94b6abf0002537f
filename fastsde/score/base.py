r"""Reading a network: every form of its prediction from one call, and the one counter of calls.

With x_t = alpha x_0 + sigma eps, whatever the network predicts is one linear view of the pair (x_0, eps), so each
of the five usual outputs determines all the others:

    score = -eps / sigma,    v = alpha eps - sigma x_0,    flow velocity = eps - x_0

(Tweedie's formula, Efron 2011, https://doi.org/10.1198/jasa.2011.tm11181, for the score; Salimans and Ho,
https://arxiv.org/abs/2202.00512, for v; Lipman et al., https://arxiv.org/abs/2210.02747, for the velocity).
"""

from __future__ import annotations

import functools
import inspect
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from fastsde.batching import expand_like
from fastsde.checks import check_choice, check_instance, check_kind
from fastsde.files import sha256
from fastsde.score.network import (
    check_output,
    evaluation_mode,
    explained,
    modules_behind,
    tensor_of,
    tensors_hash,
    unwrap,
)
from fastsde.sde.base import SDE
from fastsde.types import Coef, Cond, Index, Mask, ScoreFn, State, Time

_Reading = Callable[[Tensor, Tensor], tuple[Any, Any]]

# (a, b) of x_0 = a x_t + b out and (c, d) of eps = c x_t + d out, as functions of (alpha, sigma).
_READ: dict[str, tuple[_Reading, _Reading]] = {
    "score": (lambda a, s: (1 / a, s**2 / a), lambda a, s: (0.0, -s)),
    "epsilon": (lambda a, s: (a.reciprocal(), -s / a), lambda a, s: (0.0, 1.0)),
    "sample": (lambda a, s: (0.0, 1.0), lambda a, s: (1 / s, -a / s)),
    "v_prediction": (
        lambda a, s: (a / (a**2 + s**2), -s / (a**2 + s**2)),
        lambda a, s: (s / (a**2 + s**2), a / (a**2 + s**2)),
    ),
    "flow_prediction": (lambda a, s: (1 / (a + s), -s / (a + s)), lambda a, s: (1 / (a + s), a / (a + s))),
}

PREDICTIONS = tuple(_READ)
"""What a network may predict."""


class Prediction:
    """One network call, readable in every form. Tensors have shape (B, *event). `x_0` and `epsilon` are computed once.

    Args:
        kind: what the network predicts, a key of diffusers' `prediction_type` or "score".
        out: the network's output.
        x_t: the state it was called on.
        alpha: signal scale per row, with shape (B,).
        sigma: noise scale per row, with shape (B,).
    """

    def __init__(self, kind: str, out: State, x_t: State, alpha: Coef, sigma: Coef) -> None:
        self.out, self.x_t, self.alpha, self.sigma = out, x_t, alpha, sigma
        self._x_0, self._epsilon = _READ[kind]

    def _linear(self, of_x_t: Coef | float, of_out: Coef | float) -> State:
        """of_x_t x_t + of_out out, never `out` itself: a compiled network may write its next output there."""
        a, b = (c if isinstance(c, float) else expand_like(c, self.x_t) for c in (of_x_t, of_out))
        if isinstance(a, float) and a == 0:
            return b * self.out
        return torch.addcmul(a * self.x_t, b, self.out)  # type: ignore[arg-type] # both are tensors

    def _combine(self, of_x_0: Coef | float, of_eps: Coef | float) -> State:
        (a, b), (c, d) = self._x_0(self.alpha, self.sigma), self._epsilon(self.alpha, self.sigma)
        # Merged in float64, so that 1 / sigma and sigma cancel before rounding to the state's dtype.
        return self._linear(of_x_0 * a + of_eps * c, of_x_0 * b + of_eps * d)

    @functools.cached_property
    def x_0(self) -> State:
        """The expected denoised sample E[x_0 | x_t] = (x_t + sigma^2 score) / alpha."""
        return self._linear(*self._x_0(self.alpha, self.sigma))

    @functools.cached_property
    def epsilon(self) -> State:
        """The expected noise E[eps | x_t] = -sigma score."""
        return self._linear(*self._epsilon(self.alpha, self.sigma))

    @property
    def score(self) -> State:
        """The gradient of log p_t at x_t."""
        return self._combine(0.0, -1 / self.sigma)

    @property
    def v(self) -> State:
        """alpha eps - sigma x_0."""
        return self._combine(-self.sigma, self.alpha)

    @property
    def velocity(self) -> State:
        """eps - x_0, the velocity of a rectified flow."""
        return self._combine(-1.0, 1.0)


class Model(ABC):
    """A network with its conditioning and its calls: what the engine knows of any model.

    Args:
        network: a function of the state, the time and the conditioning, or a torch module.
        event_shape: shape of one sample, if it is known.
        default_cond: conditioning of each row if `cond` has none: a dict of tensors without batch axis.

    Raises:
        ValueError, TypeError: naming the argument that is out of range or of the wrong kind.
    """

    calls = 1
    """The most network calls that an evaluation costs a row; guidance that doubles the batch says 2."""
    role = "the network"
    """What the network is called in messages."""
    per_row = False
    """Whether each row is evaluated by itself, so that rows of samples that have ended do not stay in the batch."""
    edit: Tensor | None = None
    """What the last evaluation added to the states it was given before the network saw them, with shape (B, *event)."""
    inputs: tuple[str, ...] = ("x", "t")
    """What the network is called on, besides its conditioning."""

    def __init__(
        self,
        network: Callable[..., Any],
        event_shape: tuple[int, ...] | None = None,
        default_cond: Mapping[str, Tensor | float] | None = None,
    ) -> None:
        if not callable(network) or isinstance(network, type):
            came = f"the class {network.__name__}" if isinstance(network, type) else type(network).__name__
            raise TypeError(f"network must be callable as network(x, t); got {came}.")
        self.network, self.event_shape = network, check_shape("event_shape", event_shape)
        self.default_cond = _checked_default(default_cond)

    @abstractmethod
    def bind(self, cond: Cond, active: Mask, nfe: Index | None = None) -> Any:
        """What the steps of its solvers are given: the model bound to rows; arguments as for `Calls`."""

    @property
    def parameter(self) -> Tensor | None:
        """A floating-point parameter of the network, which tells its dtype and device; None for a plain function."""
        if not isinstance(self.network, nn.Module):
            return None
        return next((p for p in self.network.parameters() if p.is_floating_point()), None)

    @property
    def device(self) -> torch.device:
        """Where the network computes: the device of its parameters, or of a module that a function names; else CPU."""
        found = (p for module in modules_behind(self.network) for p in module.parameters() if p.is_floating_point())
        return next((p.device for p in found), torch.device("cpu"))

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """What the network computes in: the dtype of its parameters; that of the state for a plain function, None."""
        parameter = self.parameter
        return None if parameter is None else parameter.dtype

    def sampling(self) -> AbstractContextManager[None]:
        """The state of the network while samples are drawn, and not before and after: in evaluation mode."""
        return evaluation_mode(self.network)

    def cost(self, t: Time, cond: Cond) -> Index | int:
        """Network calls that an evaluation costs each row, at most `calls`, with shape (B,); a number if all alike.

        It is asked after the evaluation.
        """
        return self.calls

    def check_cond(self, cond: Cond) -> None:
        """Refuses, with a ValueError, conditioning of all samples, defaults included, that the network cannot take."""
        inside = unwrap(self.network)
        try:
            signature = inspect.signature(inside.forward if isinstance(inside, nn.Module) else inside)
        except (TypeError, ValueError):  # some callables have none
            return
        try:
            signature.bind(*self.inputs, **cond)
        except TypeError as error:
            raise ValueError(
                f"{self.role} cannot be called as network({', '.join(self.inputs)}, **cond): its signature is "
                f"{signature}, and cond has {', '.join(cond) or 'nothing'} ({error})."
            ) from error


class ScoreModel(Model):
    """A network and its reading: what it predicts, and for which time.

    Calling it gives a `Prediction`. The network gets the state in its own dtype, and the time as a float32 vector with
    shape (B,). The time is float64 if the state is and the network has no lower precision. It is never a Python number,
    because diffusers' UNets round that to an integer.

    Args:
        network: `network(x, t, **cond)`, with x of shape (B, *event) and t of shape (B,); returns a tensor of the
            shape of x, an object with such a tensor under `.sample`, or a tuple that begins with it.
        sde: the forward process it was trained for.
        prediction: "score", "epsilon", "sample", "v_prediction" or "flow_prediction" (diffusers' names).
        event_shape: shape of one sample. With it, `sample(n=...)` is enough.
        data_range: (low, high) of the data; (-1, 1) by default. One 8-bit level of it is the default absolute
            tolerance. There is a warning if samples leave it.
        timestep: maps the SDE's time, float64 with shape (B,), to the network's time, with shape (B,); the identity by
            default. For a network of levels 0 .. N - 1: `timestep=lambda t: N * t - 1`. If it returns another dtype
            than float64, such as integers for an embedding, the network gets that dtype.
        default_cond: conditioning of each row if `cond` has none: a dict of tensors without batch axis.

    Raises:
        ValueError: naming the argument that is unknown or out of range.
        TypeError: if `network` cannot be called or `sde` is no SDE.
    """

    role = "the score function"
    preconditioned = False
    """Whether the network's output is read with more than `prediction` says, so that no other reading can be tried."""

    def __init__(
        self,
        network: ScoreFn,
        sde: SDE,
        prediction: str = "score",
        *,
        event_shape: tuple[int, ...] | None = None,
        data_range: tuple[float, float] | None = None,
        timestep: Callable[[Time], Tensor] | None = None,
        default_cond: Mapping[str, Tensor | float] | None = None,
    ) -> None:
        super().__init__(network, event_shape, default_cond)
        check_instance("sde", sde, SDE, "an SDE such as fastsde.VPSDE()")
        check_choice("prediction", prediction, _READ)
        check_kind("timestep", timestep, Callable, "a function of the SDE's time")
        self.sde, self.prediction, self.knows_range = sde, prediction, data_range is not None
        self.data_range = _checked_range((-1.0, 1.0) if data_range is None else data_range)
        self.timestep = timestep

    def __iter__(self) -> Iterator[Any]:
        """The model and its process, for `model, sde = ..`."""
        yield from (self, self.sde)

    def __repr__(self) -> str:
        name = getattr(self.network, "__name__", type(self.network).__name__)
        return f"{type(self).__name__}({name}, {self.sde}, {self.prediction!r}, event_shape={self.event_shape})"

    def bind(self, cond: Cond, active: Mask, nfe: Index | None = None) -> BoundModel:
        return BoundModel(self, cond, active, nfe)

    def call(self, x: State, time: Tensor, cond: Cond) -> object:
        """Calls the network on inputs in its own dtype: the one place that knows its signature."""
        return self.network(x, time, **cond)

    def output(self, x_t: State, t: Time, cond: Cond | None = None) -> State:
        """What the network itself returns; arguments and errors as for a call."""
        dtype = self.compute_dtype or x_t.dtype
        time = t if self.timestep is None else self.timestep(t)
        if not isinstance(time, Tensor) or time.shape != t.shape:
            came = tuple(time.shape) if isinstance(time, Tensor) else type(time).__name__
            raise ValueError(f"timestep must map times with shape (B,) to a tensor of that shape; it returned {came}.")
        # Copies, because a network may work in place. Another dtype is the caller's wish.
        wanted = time.dtype if time.dtype != torch.float64 or dtype == torch.float64 else torch.float32
        time = time.to(wanted, copy=True)
        given = {key: value.clone() for key, value in (cond or {}).items()}
        with explained(self.role, len(t), dtype, time.dtype):
            out = self.call(x_t.to(dtype, copy=True), time, given)
        return check_output(tensor_of(out), x_t, self.role).to(x_t.dtype)

    def __call__(self, x_t: State, t: Time, cond: Cond | None = None) -> Prediction:
        """Evaluates the network once on every row.

        Args:
            x_t: with shape (B, *event).
            t: the SDE's time, with shape (B,).
            cond: keyword arguments of the network, each with leading axis B.

        Raises:
            ValueError: if the network returns another shape or device than it was given.
            TypeError: if it returns no floating-point tensor.
        """
        level = self.sde.level(t)
        return Prediction(self.prediction, self.output(x_t, t, cond), x_t, level.alpha, level.sigma)


class Wrapper(ScoreModel):
    """A score model made from another, which changes its prediction or takes part of the conditioning for itself.

    Args:
        model: the score model inside.
        prediction: what `output` returns; that of the model inside by default.
        default_cond: defaults of the conditioning that the wrapper takes, beside those of the model inside.

    Raises:
        TypeError: if `model` is no score model.
    """

    own_cond: tuple[str, ...] = ()
    """Keys of the conditioning that the model inside does not see."""

    def __init__(
        self,
        model: ScoreModel,
        prediction: str | None = None,
        *,
        default_cond: Mapping[str, Tensor | float] | None = None,
    ) -> None:
        check_instance("model", model, ScoreModel, "a fastsde.ScoreModel")
        super().__init__(
            model.network,
            model.sde,
            prediction or model.prediction,
            event_shape=model.event_shape,
            data_range=model.data_range if model.knows_range else None,
            default_cond={**(model.default_cond or {}), **(default_cond or {})} or None,
        )
        self.model, self.calls = model, model.calls

    def __repr__(self) -> str:
        own = {key: value for key, value in vars(self).items() if key != "model" and key not in vars(self.model)}
        return f"{type(self).__name__}({', '.join([repr(self.model), *(f'{k}={v!r}' for k, v in own.items())])})"

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def compute_dtype(self) -> torch.dtype | None:
        return self.model.compute_dtype

    def sampling(self) -> AbstractContextManager[None]:
        return self.model.sampling()

    def inner_cond(self, cond: Cond | None) -> dict[str, Tensor]:
        """The conditioning without the wrapper's own keys."""
        return {key: value for key, value in (cond or {}).items() if key not in self.own_cond}

    def cost(self, t: Time, cond: Cond) -> Index | int:
        return self.model.cost(t, self.inner_cond(cond))

    def check_cond(self, cond: Cond) -> None:
        self.model.check_cond(self.inner_cond(cond))


def reading_hash(model: ScoreModel) -> str:
    """SHA-256 of how a model reads its network, wrappers included, in hexadecimal; weights do not count.

    Of functions that belong to it their names count, of `timestep` its values at five times. The shape of a sample does
    not count, nor whether a range was given, nor what a configuration keeps for itself: diffusers writes
    `_use_default_values` in another order in each process.
    """
    plain = json.dumps(_reading_of(model), sort_keys=True, separators=(",", ":"), default=_shown)
    return sha256(plain.encode())


def _reading_of(model: ScoreModel) -> dict[str, Any]:
    sde = model.sde
    five = torch.linspace(sde.t_min, sde.t_max, 5, dtype=torch.float64)
    own: dict[str, Any] = {"class": type(model).__name__, "log_snr": [round(v, 6) for v in sde.log_snr(five).tolist()]}
    for key, value in vars(model).items():
        if isinstance(value, ScoreModel):
            own[key] = _reading_of(value)
        elif key == "timestep" and value is not None:
            own[key] = [round(v, 6) for v in value(five).double().tolist()]
        elif key == "config" and isinstance(value, Mapping):
            own[key] = {name: entry for name, entry in value.items() if not name.startswith("_")}
        elif key not in ("network", "sde", "event_shape", "knows_range"):
            own[key] = value
    return own


def _shown(value: object) -> str:
    """What tells a value that JSON does not know from others."""
    if isinstance(value, Tensor):
        return tensors_hash({"": value})
    return getattr(value, "__qualname__", type(value).__qualname__)


def check_shape(name: str, shape: object) -> tuple[int, ...] | None:
    """The shape of one sample as a tuple, or None; anything else is refused with a ValueError."""
    if shape is None:
        return None
    sizes = tuple(shape) if isinstance(shape, (tuple, list)) else ()
    if not sizes or not all(isinstance(k, Integral) and not isinstance(k, bool) and int(k) > 0 for k in sizes):
        raise ValueError(f"{name} must be the shape of one sample, such as (3, 32, 32); got {shape!r}.")
    return tuple(int(k) for k in sizes)


def _checked_range(given: object) -> tuple[float, float]:
    low, high = given if isinstance(given, (tuple, list)) and len(given) == 2 else (None, None)
    numbers = all(isinstance(v, Real) and not isinstance(v, bool) and math.isfinite(v) for v in (low, high))
    if not numbers or not low < high:  # type: ignore[operator] # both are numbers
        raise ValueError(f"data_range must be (low, high), finite, with low < high; got {given!r}.")
    return float(low), float(high)  # type: ignore[arg-type]


def _checked_default(cond: Mapping[str, Any] | None) -> dict[str, Tensor] | None:
    if cond is None:
        return None
    check_kind("default_cond", cond, Mapping, "a dict of tensors without batch axis")
    values = {k: torch.tensor(v) if isinstance(v, (bool, int, float)) else v for k, v in cond.items()}
    for key, value in values.items():
        check_instance(f"the conditioning of one row, {key},", value, Tensor, "a tensor without batch axis")
    return values


def innermost(model: ScoreModel) -> ScoreModel:
    """The score model inside of all wrappers."""
    while isinstance(model, Wrapper):
        model = model.model
    return model


class Calls:
    """The only place where network calls are counted.

    Args:
        model: what is called.
        cond: conditioning of these rows, each tensor with leading axis B.
        active: rows whose calls count; a row that has already finished costs its sample nothing.
        nfe: calls so far, with shape (B,); none by default.
    """

    def __init__(self, model: Any, cond: Cond, active: Mask, nfe: Index | None = None) -> None:
        self.model, self.cond, self.active = model, cond, active
        self.nfe = torch.zeros_like(active, dtype=torch.int64) if nfe is None else nfe

    def count(self, cost: Index | int) -> None:
        """Adds calls to those of the active rows: a number, or one for each row."""
        each = cost * self.active if isinstance(cost, Tensor) else self.active
        self.nfe = torch.add(self.nfe, each, alpha=1 if isinstance(cost, Tensor) else cost)


class BoundModel(Calls):
    """A score model bound to the rows in flight; arguments as for `Calls`."""

    model: ScoreModel

    def __call__(self, x_t: State, t: Time) -> Prediction:
        """The prediction for every row, adding the calls it cost to `nfe`."""
        prediction = self.model(x_t, t, self.cond)
        if x_t.requires_grad and torch.is_grad_enabled() and not prediction.out.requires_grad:
            raise ValueError(
                f"{self.model.role} must be differentiable in x, and its output carries no gradient: no no_grad, "
                "no detach, no constant."
            )
        self.count(self.model.cost(t, self.cond))
        return prediction

    def output(self, x_t: State, t: Time) -> State:
        """What the network itself returns for every row, adding the calls it cost to `nfe`."""
        out = self.model.output(x_t, t, self.cond)
        self.count(self.model.cost(t, self.cond))
        return out
