"""A scheduler's configuration, read as a process: the noise levels, the network's time and its prediction.

Only keys of the configuration are read, never the scheduler's class, because users exchange classes and the keys go
along. How a scheduler spaces its steps is not read: the path is the same, and steps are this library's business.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastsde.sde.base import SDE
from fastsde.sde.discrete import DiscreteVPSDE
from fastsde.sde.edm import EDM
from fastsde.sde.flow import RectifiedFlow
from fastsde.sde.ve import VESDE
from fastsde.types import Coef, Time

Config = Mapping[str, Any]

_PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")
_OTHER_PROCESSES = ("Cosine", "VQDiffusion", "Amused", "UnCLIP", "Wuerstchen", "ConsistencyDecoder")
"""Schedulers whose keys are those of another process: refusing them by name is the one use of a class name."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """How to read a network that was trained under a scheduler's configuration.

    Attributes:
        sde: its process.
        timestep: maps the process's time to the network's, both with shape (B,).
        time: its inverse.
        prediction: what the network predicts, in diffusers' names, or "score".
        sigma_data: the constant of EDM's preconditioning; None for networks without it.
        limit: largest magnitude of a denoised prediction, where the configuration clips it; None where it does not.
        ratio: quantile of dynamic thresholding, or None.
        levels: number of training timesteps.
        unshifted: whether a flow's schedule has no shift.
    """

    sde: SDE
    timestep: Callable[[Time], Time]
    time: Callable[[Time], Time]
    prediction: str
    sigma_data: float | None = None
    limit: float | None = None
    ratio: float | None = None
    levels: int = 1000
    unshifted: bool = False

    @property
    def start_std(self) -> float:
        """Standard deviation of the start for data of variance 1, as diffusers' pipelines scale their latents."""
        t = torch.tensor([self.sde.t_max], dtype=torch.float64)
        return float((self.sde.alpha(t) ** 2 + self.sde.sigma(t) ** 2).sqrt())

    def c_in(self, t: Time) -> Coef:
        """EDM's factor on the network's input, (sigma^2 + sigma_data^2)^(-1/2); 1 without preconditioning. (B,)."""
        if self.sigma_data is None:
            return torch.ones_like(t)
        return (self.sde.sigma(t) ** 2 + self.sigma_data**2) ** -0.5


def read_schedule(config: Config) -> Reading:
    """The process, the network's time and its prediction, from a scheduler's configuration.

    Five kinds are told apart by their keys: flow matching (`shift`, `flow_shift`, `prediction_type="flow_prediction"`),
    variance exploding (`sigma_min`, `sigma_max`, `snr`), EDM (`sigma_data`), the continuous form of EDM with v
    (`timestep_type="continuous"`) and tables of betas (`beta_schedule`, `trained_betas`).

    Args:
        config: `scheduler.config`, or a dict with the same keys. Keys that are missing have no effect: give the
            object's configuration where defaults of its class matter, such as `clip_sample`.

    Raises:
        ValueError: for a configuration that describes no process we know, or one that has no score, with the reason.
    """
    config = {key: value for key, value in config.items() if value is not None}
    name = str(config.get("_class_name", "the scheduler"))
    if "original_inference_steps" in config or "clip_denoised" in config:
        raise ValueError(
            f"{name} is for distilled few-step models (LCM, TCD, consistency), whose output is no score: no SDE or ODE "
            "leads through it. Give the scheduler of the model it was distilled from, with that model's weights."
        )
    if any(other in name for other in _OTHER_PROCESSES):
        raise ValueError(f"{name} belongs to a process that is not among fastsde's SDEs.")
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in _PREDICTIONS:
        raise ValueError(f"prediction_type must be one of {', '.join(_PREDICTIONS)}; {name} has {prediction!r}.")
    flow = prediction == "flow_prediction" or config.get("use_flow_sigmas")
    betas = "beta_schedule" in config or "trained_betas" in config
    if flow or ("shift" in config and not betas):
        reading = _flow(config, name, given="prediction_type" in config)
    elif "sigma_data" in config:
        reading = _edm(config, _number(config, "sigma_data", 0.5))
    elif "snr" in config and "sigma_max" in config and not betas:
        low, high = _number(config, "sigma_min", 0.01), _number(config, "sigma_max", 1348.0)
        sde = VESDE(low, high, t_min=_number(config, "sampling_eps", 1e-5))
        reading = Reading(sde, sde.sigma, lambda k: sde.t_of_log_snr(-2 * k.log()), "score", levels=_levels(config))
    elif not betas:
        raise ValueError(f"{name} describes no process that fastsde can read; its keys are {sorted(config)}.")
    elif config.get("timestep_type") == "continuous" and prediction == "v_prediction":
        reading = _edm(_with_range(config), 1.0)
    else:
        reading = _table(config, name)
    if config.get("thresholding"):
        limit, ratio = _number(config, "sample_max_value", 1.0), _number(config, "dynamic_thresholding_ratio", 0.995)
        return dataclasses.replace(reading, limit=limit, ratio=ratio)
    if config.get("clip_sample"):
        return dataclasses.replace(reading, limit=_number(config, "clip_sample_range", 1.0))
    return reading


def filled(config: Config) -> Config:
    """The configuration with the defaults of its class, which files leave out, for what they do not say."""
    import diffusers

    kind = getattr(diffusers, str(config.get("_class_name")), None)
    # Marked as default, a value would be dropped on the way to another class.
    own = {key: value for key, value in config.items() if key != "_use_default_values"}
    full = own if kind is None else {**kind.from_config(own).config, **own}
    return {key: value for key, value in full.items() if key != "_use_default_values"}


def _number(config: Config, key: str, default: float) -> float:
    """A number of the configuration.

    Raises:
        ValueError: if it is none, naming the key.
    """
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{key} must be a finite number; got {value!r}.")
    return float(value)


def _levels(config: Config) -> int:
    levels = config.get("num_train_timesteps", 1000)
    if not isinstance(levels, int) or levels < 2:
        raise ValueError(f"num_train_timesteps must be an integer of at least 2; got {levels!r}.")
    return levels


def _flow(config: Config, name: str, *, given: bool) -> Reading:
    """A rectified flow. A shift spaces a scheduler's steps; here it only says where its last level is."""
    if config.get("invert_sigmas"):
        raise ValueError(f"{name} has invert_sigmas=True, a time that runs the other way; it is not supported.")
    if given and config.get("prediction_type") != "flow_prediction":
        raise ValueError(
            f"{name} has use_flow_sigmas=True with prediction_type={config['prediction_type']!r}; a flow's network "
            'predicts the velocity, "flow_prediction".'
        )
    n = _levels(config)
    shift = _number(config, "shift" if "shift" in config else "flow_shift", 1.0)
    if config.get("use_dynamic_shifting"):
        shift = math.exp(_number(config, "base_shift", 0.0))
    if not shift > 0:
        raise ValueError(f"shift must be positive; got {shift}.")
    # Its end t = 1 is singular: the start is one level below, where the data's share is 1 / n.
    sde = RectifiedFlow(t_min=shift / n / (1 + (shift - 1) / n), t_max=1 - 1 / n)
    return Reading(sde, lambda t: n * t, lambda k: k / n, "flow_prediction", levels=n, unshifted=shift == 1.0)


def _edm(config: Config, sigma_data: float) -> Reading:
    if sigma_data <= 0:
        raise ValueError(f"sigma_data must be positive; got {sigma_data}.")
    sde = EDM(t_min=_number(config, "sigma_min", 0.002), t_max=_number(config, "sigma_max", 80.0))
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(f"EDM's preconditioning is known for epsilon and v_prediction; got {prediction!r}.")
    return Reading(
        sde, lambda t: 0.25 * t.log(), lambda k: (4 * k).exp(), prediction, sigma_data, levels=_levels(config)
    )


def _with_range(config: Config) -> dict[str, Any]:
    """The configuration with the range of sigma / alpha of its table where it names none."""
    bars = alphas_cumprod(config)
    low, high = (((1 - bars) / bars).sqrt()[[0, -1]]).tolist()
    return {**config, "sigma_min": config.get("sigma_min") or low, "sigma_max": config.get("sigma_max") or high}


def _table(config: Config, name: str) -> Reading:
    bars = alphas_cumprod(config)
    prediction = config.get("prediction_type", "epsilon")
    sde = DiscreteVPSDE(alphas_cumprod=bars)
    if config.get("rescale_betas_zero_snr"):
        if prediction == "epsilon":
            raise ValueError(
                f"{name} has zero terminal SNR (rescale_betas_zero_snr) with prediction_type='epsilon': where there is "
                "only noise, predicting it says nothing of the data. Such models predict v or the sample."
            )
        # Below the share of data that diffusers starts from, 2^-24, steps of the log-SNR would go to nothing at all.
        start = torch.tensor([-24 * math.log(2)], dtype=torch.float64)
        sde = DiscreteVPSDE(alphas_cumprod=bars, t_max=min(1.0, float(sde.t_of_log_snr(start))))
    n = sde.levels
    return Reading(sde, lambda t: (n * t - 1).clamp(min=0.0), lambda k: (k + 1) / n, prediction, levels=n)


def alphas_cumprod(config: Config) -> Tensor:
    r"""The table alpha_bar_k of a configuration, rebuilt in float64, with shape (N,).

    `linear`, `scaled_linear` (linear in sqrt beta), `squaredcos_cap_v2` (beta_k = min(1 - f((k + 1) / N) / f(k / N),
    0.999), f = cos^2(pi / 2 (t + 0.008) / 1.008); Nichol and Dhariwal, https://arxiv.org/abs/2102.09672, eq. 17),
    `laplace` (the same with sqrt(SNR / (1 + SNR)) of a Laplace density of the log-SNR), `sigmoid` (betas on a sigmoid
    from -6 to 6), or `trained_betas`. With `rescale_betas_zero_snr`, sqrt(alpha_bar) is shifted and scaled so that its
    last value is 0 and its first stays (Lin et al., https://arxiv.org/abs/2305.08891, alg. 1); for the 0 we put half of
    the value before it.

    Raises:
        ValueError: for a beta schedule that is unknown, or betas outside of (0, 1).
    """
    trained = config.get("trained_betas")
    if trained is not None:
        betas = torch.as_tensor(trained, dtype=torch.float64)
    else:
        schedule, n = config.get("beta_schedule", "linear"), _levels(config)
        if schedule not in _BETAS:
            raise ValueError(f"beta_schedule must be one of {', '.join(_BETAS)}; got {schedule!r}.")
        betas = _BETAS[schedule](n, _number(config, "beta_start", 1e-4), _number(config, "beta_end", 0.02))
    if betas.ndim != 1 or not ((betas > 0) & (betas < 1)).all():
        raise ValueError("the betas must be a list of numbers in (0, 1).")
    bars = torch.log1p(-betas).cumsum(0).exp()
    if config.get("rescale_betas_zero_snr"):
        roots = bars.sqrt()
        roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
        roots[-1] = roots[-2] / 2
        bars = roots**2
    return bars


def _from_alpha_bar(alpha_bar: Callable[[float], float], n: int) -> Tensor:
    values = [alpha_bar(k / n) for k in range(n + 1)]
    return torch.tensor([min(1 - b / a, 0.999) for a, b in itertools.pairwise(values)], dtype=torch.float64)


def _laplace(t: float) -> float:
    # The inverse distribution function, kept from infinity by 1e-6 at both ends.
    snr = math.exp(-0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6))
    return math.sqrt(snr / (1 + snr))


def _line(start: float, end: float, n: int) -> Tensor:
    return torch.linspace(start, end, n, dtype=torch.float64)


_BETAS: dict[str, Callable[[int, float, float], Tensor]] = {
    "linear": lambda n, start, end: _line(start, end, n),
    "scaled_linear": lambda n, start, end: _line(start**0.5, end**0.5, n) ** 2,
    "squaredcos_cap_v2": lambda n, *_: _from_alpha_bar(lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2, n),
    "laplace": lambda n, *_: _from_alpha_bar(_laplace, n),
    "sigmoid": lambda n, start, end: torch.sigmoid(_line(-6.0, 6.0, n)) * (end - start) + start,
}
