"""A scheduler's configuration, read as a process: the noise levels, the network's time and its prediction.

The process is read from keys of the configuration, because users exchange classes and the keys go along. What is not
known is refused: a key that may change the process, a class whose keys may mean something else. How a scheduler spaces
its steps is not read: the path is the same, and steps are this library's business.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastsde.batching import expand_like
from fastsde.checks import check_choice, check_count, check_number, check_positive
from fastsde.score.base import Prediction
from fastsde.score.guidance import clip
from fastsde.sde.base import SDE, Level
from fastsde.sde.discrete import DiscreteVPSDE
from fastsde.sde.edm import EDM
from fastsde.sde.flow import RectifiedFlow
from fastsde.sde.ve import VESDE
from fastsde.types import Coef, State, Time

Config = Mapping[str, Any]

_PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")
CLASSES = frozenset(
    f"{name}Scheduler"
    for name in (
        *("CogVideoXDDIM", "CogVideoXDPM", "DDIM", "DDIMInverse", "DDIMParallel", "DDPM", "DDPMParallel"),
        *("DEISMultistep", "DPMSolverMultistep", "DPMSolverMultistepInverse", "DPMSolverSDE", "DPMSolverSinglestep"),
        *("EDMDPMSolverMultistep", "EDMEuler", "EulerAncestralDiscrete", "EulerDiscrete", "FastSDE"),
        *("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete"),
        *("LMSDiscrete", "PNDM", "RePaint", "SASolver", "ScoreSdeVe", "UnCLIP", "UniPCMultistep"),
    )
)
"""Schedulers whose keys say what their process is. Others have the same keys and mean something else by them."""
_PROCESS_KEYS = """
    num_train_timesteps beta_start beta_end beta_schedule trained_betas prediction_type rescale_betas_zero_snr
    snr_shift_scale clip_sample clip_sample_range thresholding dynamic_thresholding_ratio sample_max_value timestep_type
    sigma_min sigma_max sigma_data snr sampling_eps shift flow_shift use_flow_sigmas use_dynamic_shifting base_shift
    invert_sigmas original_inference_steps clip_denoised
"""
_STEP_KEYS = """
    algorithm_type args base_image_seq_len correct_steps corrector_order disable_corrector eta euler_at_final
    exponential_eta exponential_order final_sigmas_type fitted interpolation_type kwargs lambda_min_clipped
    lower_order_final max_image_seq_len max_shift noise_sampler_seed predict_x0 predictor_order rho set_alpha_to_one
    shift_terminal sigma_schedule skip_prk_steps solver_order solver_p solver_type steps_offset stochastic_sampling
    tau_func tensor_format time_shift_type timestep_spacing timestep_values use_beta_sigmas use_exponential_sigmas
    use_clipped_model_output use_karras_sigmas use_lu_lambdas variance_type
"""
_KEYS = frozenset((_PROCESS_KEYS + _STEP_KEYS).split())
"""What is read, and what says how a scheduler spaces and takes its steps, which is this library's business."""


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
        inverted: whether times and velocities run backwards (`invert_sigmas`), which only a loop's own calls may.
        exploding: whether states in a loop are x / alpha, as with schedulers of Karras et al. that scale what a network
            is given.
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
    inverted: bool = False
    exploding: bool = False

    @property
    def is_flow(self) -> bool:
        """Whether the process is a flow."""
        return isinstance(self.sde, RectifiedFlow)

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

    # In the terms of a pipeline's loop.

    @property
    def loop_std(self) -> float:
        """Standard deviation of a loop's start: 1 for a flow, whose pipelines start from the noise itself."""
        if self.is_flow or not self.exploding:
            return 1.0 if self.is_flow else self.start_std
        return self.start_std / float(self.sde.alpha(torch.tensor([self.sde.t_max], dtype=torch.float64)))

    @property
    def first_timestep(self) -> float | None:
        """The network's time at `t_max`; None for a flow, whose loops start at its end t = 1."""
        if self.is_flow:
            return None
        return float(self.timestep(torch.tensor([self.sde.t_max], dtype=torch.float64)))

    def time_of(self, timestep: Tensor | float) -> Time:
        """The process's time of a loop's timesteps, within its range; with shape (k,)."""
        k = torch.as_tensor(timestep).double().reshape(-1)
        return self.time(k).clamp(self.sde.t_min, 1.0 if self.is_flow else self.sde.t_max)

    def level_of(self, timestep: Tensor | float) -> Coef:
        """A scheduler's sigma at timesteps: t of a flow (1 - t inverted), sigma / alpha of others; with shape (k,)."""
        t = self.time(torch.as_tensor(timestep).double().reshape(-1))
        if self.is_flow:
            return 1 - t if self.inverted else t
        return (-0.5 * self.sde.log_snr(self.time_of(timestep))).exp()

    def scaled(self, x: Tensor, timestep: Tensor | float | None) -> Tensor:
        """What the network is given of a loop's state: c_in x for EDM's, alpha x where states are x / alpha, else x."""
        if timestep is None or (self.sigma_data is None and not self.exploding):
            return x
        t = self.time_of(timestep)
        return expand_like((self.sde.alpha(t) if self.sigma_data is None else self.c_in(t)).to(x.device), x) * x

    def noised(self, x_0: State, timestep: Tensor | float, noise: State) -> State:
        """A loop's state alpha x_0 + sigma noise at timesteps with shape (B,), or one for all."""
        t = self.time_of(timestep)
        t = (t.expand(len(x_0)) if len(t) == 1 else t).to(x_0.device)
        x_t = self.sde.marginal(x_0, t, noise)
        return x_t / expand_like(self.sde.alpha(t), x_t) if self.exploding else x_t

    def read(self, out: Tensor, x: State, level: Level) -> Prediction:
        """What a network said of a state, with shape (B, *event) like it, or with twice the channels."""
        out, kind = out[:, : x.shape[1]], self.prediction  # a learned variance is dropped
        if self.inverted:
            out = -out
        if (s := self.sigma_data) is not None:
            c_in = (level.sigma**2 + s**2) ** -0.5
            c_out = c_in * level.sigma * (-s if kind == "v_prediction" else s)
            kind, out = "sample", expand_like((s * c_in) ** 2, x) * x + expand_like(c_out, x) * out
        return Prediction(kind, out, x, level.alpha, level.sigma)

    def clip(self, x_0: State) -> State:
        """A denoised prediction, clipped where the configuration says so."""
        return x_0 if self.limit is None else clip(x_0, -self.limit, self.limit, self.ratio)


def read_loop(config: Config) -> Reading:
    """`read_schedule` for a loop that calls the network itself, so that more is known.

    With `invert_sigmas` (Mochi) times are n (1 - t), and the velocity runs with them. A flow's scheduler with levels
    above 1 (`sigma_max`; Cosmos 2) walks x_0 + sigma eps, whose derivative in sigma is eps.
    """
    if config.get("shift") is not None and _exceeds_one(config):
        n = _levels(config, least=1)
        sde = EDM(t_min=_number(config, "sigma_min", 0.002), t_max=_number(config, "sigma_max", 80.0))
        return Reading(sde, functools.partial(torch.mul, n), functools.partial(_share, n, 0), "epsilon", levels=n)
    if not config.get("invert_sigmas"):
        return read_schedule(config)
    reading = read_schedule({**config, "invert_sigmas": None})
    n = reading.levels
    rising, falling = functools.partial(_rising, n), functools.partial(_falling, n)
    return dataclasses.replace(reading, timestep=rising, time=falling, inverted=True)


def read_schedule(config: Config) -> Reading:
    """The process, the network's time and its prediction, from a scheduler's configuration.

    Five kinds are told apart by their keys: flow matching (`shift`, `flow_shift`, `prediction_type="flow_prediction"`),
    variance exploding (`sigma_min`, `sigma_max`, `snr`), EDM (`sigma_data`), the continuous form of EDM with v
    (`timestep_type="continuous"`) and tables of betas (`beta_schedule`, `trained_betas`).

    Args:
        config: `scheduler.config`, or a dict with the same keys. Keys that are missing have no effect: give the
            object's configuration where defaults of its class matter, such as `clip_sample`.

    Raises:
        ValueError: for a configuration that describes no process we know, or one that has no score, with the reason;
            for keys that are not known and a class that is not known, naming them.
    """
    config = {key: value for key, value in config.items() if value is not None}
    name = str(config.get("_class_name", "the scheduler"))
    if "original_inference_steps" in config or "clip_denoised" in config:
        raise ValueError(_DISTILLED.format(name))
    _check_known(config)
    prediction = config.get("prediction_type", "epsilon")
    check_choice("prediction_type", prediction, _PREDICTIONS)
    flow = prediction == "flow_prediction" or config.get("use_flow_sigmas")
    betas = "beta_schedule" in config or "trained_betas" in config
    if flow or ("shift" in config and not betas):
        reading = _flow(config, name)
    elif "sigma_data" in config:
        reading = _edm(config, _positive(config, "sigma_data", 0.5))
    elif "snr" in config and "sigma_max" in config and not betas:
        low, high = _number(config, "sigma_min", 0.01), _number(config, "sigma_max", 1348.0)
        sde = VESDE(low, high, t_min=_number(config, "sampling_eps", 1e-5))
        reading = Reading(sde, sde.sigma, functools.partial(_time_of_sigma, sde), "score", levels=_levels(config))
    elif not betas:
        raise ValueError(f"{name} describes no process that fastsde can read; its keys are {sorted(config)}.")
    elif config.get("timestep_type") == "continuous" and prediction == "v_prediction":
        # Where it names no range of sigma / alpha, it is that of its table.
        bars = alphas_cumprod(config)
        low, high = (((1 - bars) / bars).sqrt()[[0, -1]]).tolist()
        ends = {"sigma_min": config.get("sigma_min") or low, "sigma_max": config.get("sigma_max") or high}
        reading = _edm(config | ends, 1.0)
    else:
        reading = _table(config, name)
    if config.get("thresholding"):
        ratio = config.get("dynamic_thresholding_ratio", 0.995)
        check_number("dynamic_thresholding_ratio", ratio, 0.0, 1.0, ends="()")
        return dataclasses.replace(reading, limit=_positive(config, "sample_max_value"), ratio=ratio)
    # CogVideoX's schedulers have the key and never clip.
    if config.get("clip_sample") and "snr_shift_scale" not in config:
        return dataclasses.replace(reading, limit=_positive(config, "clip_sample_range"))
    return reading


_DISTILLED = (
    "{} is for distilled few-step models (LCM, TCD, consistency), whose output is no score: no SDE or ODE leads "
    "through it. Give the scheduler of the model it was distilled from, with that model's weights."
)


def _check_known(config: Config) -> None:
    """Refuses, with a ValueError, a configuration of which something that may change the process would not be read."""
    name = config.get("_class_name")
    if name is not None and "LCM" in str(name):
        raise ValueError(_DISTILLED.format(name))
    if name is not None and name not in CLASSES:
        raise ValueError(
            f"{name} is not among the schedulers whose process fastsde knows. If its noise "
            "levels are those of one of them, give that one, or a dict of its keys, as scheduler=."
        )
    _check_telling(config)
    if "upscale_mode" in config or "scale_factors" in config:
        raise ValueError(_DISTILLED.format("FlowMatchLCMScheduler (scale_factors, upscale_mode)"))
    unknown = sorted(k for k in config if not k.startswith("_") and k not in _KEYS)
    if unknown:
        raise ValueError(
            f"{name or 'the scheduler'} has {', '.join(unknown)} in its configuration, which fastsde does not read and "
            "which may change the process. If not, leave them out of the configuration."
        )
    if "sigma_data" in config and "solver_order" in config and "algorithm_type" not in config:
        raise ValueError(
            "these are the keys of CosineDPMSolverMultistepScheduler (Stable Audio), whose network takes "
            "2 / pi arctan(sigma) as its time, which is not read. Run its pipeline with its own scheduler."
        )


def _check_telling(config: Config) -> None:
    """Refuses, with a ValueError, a scheduler's bare configuration that several classes with other processes share."""
    keys = {key for key in config if not key.startswith("_")}
    if "_use_default_values" in config and "_class_name" not in config and keys <= {"num_train_timesteps", "shift"}:
        raise ValueError(
            "a plain flow (FlowMatchHeun) and other processes (FlowMap, MiniMaxH3) have these keys alone, "
            f"{', '.join(sorted(keys))}. Give the scheduler itself, or for a plain flow a dict: {{'shift': 3.0}}."
        )


def filled(config: Config) -> Config:
    """The configuration with the defaults of its class, which files leave out, for what they do not say."""
    import diffusers

    _check_telling(config)
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    # Marked as default, a value would be dropped on the way to another class.
    own = {key: value for key, value in config.items() if key != "_use_default_values"}
    full = own if kind is None else {**kind.from_config(own).config, **own}
    return {key: value for key, value in full.items() if key != "_use_default_values"}


def class_of(config: Config) -> Any:
    """The scheduler's class: the one that is named; of one built in Python, the one whose arguments are all there.

    Where several fit, it is the one with the most arguments.
    """
    import diffusers
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

    if config.get("_class_name") is not None:
        return getattr(diffusers, str(config["_class_name"]), None)
    found = {e.name: _parameters(getattr(diffusers, e.name)) for e in KarrasDiffusionSchedulers}
    fitting = [name for name, parameters in found.items() if parameters <= config.keys()]
    return getattr(diffusers, max(fitting, key=lambda name: len(found[name]))) if fitting else None


def _parameters(scheduler: type) -> set[str]:
    return set(inspect.signature(scheduler).parameters) - {"kwargs"}


def unread(config: Config) -> set[str]:
    """Keys of clipping that the scheduler's class does not read: left over from another, they have no effect."""
    scheduler = class_of(config)
    return set() if scheduler is None else {"clip_sample", "thresholding"} - _parameters(scheduler)


def _number(config: Config, key: str, default: float) -> float:
    """A finite number of the configuration, or else a ValueError that names the key."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{key} must be a finite number; got {value!r}.")
    return float(value)


def _positive(config: Config, key: str, default: float = 1.0) -> float:
    return check_positive(key, config.get(key, default))


def _levels(config: Config, least: int = 2) -> int:
    return check_count("num_train_timesteps", config.get("num_train_timesteps", 1000), least)


def _flow(config: Config, name: str) -> Reading:
    """A rectified flow. A shift spaces a scheduler's steps; here it only says where its last level is."""
    if config.get("invert_sigmas"):
        raise ValueError(f"{name} has invert_sigmas=True, a time that runs the other way; it is not supported.")
    if config.get("prediction_type", "flow_prediction") != "flow_prediction":
        raise ValueError(
            f"{name} has use_flow_sigmas=True with prediction_type={config['prediction_type']!r}; a flow's network "
            'predicts the velocity, "flow_prediction".'
        )
    if _exceeds_one(config):
        raise ValueError(
            f"{name} has sigma_max={config['sigma_max']!r}, a level above 1, which no flow has (Cosmos 2). Its "
            "pipeline knows: fastsde.sample_pipeline(pipe, ..)."
        )
    n = _levels(config, least=1)
    shift = _positive(config, "shift" if "shift" in config else "flow_shift")
    if config.get("use_dynamic_shifting"):
        shift = math.exp(_number(config, "base_shift", 0.0))
    # Its end t = 1 is singular: the start is one level below, where the data's share is 1 / n. A single level is no
    # table at all: the network's time is then t itself.
    first = 1 / (n if n > 1 else 1000)
    sde = RectifiedFlow(t_min=shift * first / (1 + (shift - 1) * first), t_max=1 - first)
    timestep, time = functools.partial(torch.mul, n), functools.partial(_share, n, 0)
    return Reading(sde, timestep, time, "flow_prediction", levels=n, unshifted=shift == 1.0)


def _exceeds_one(config: Config) -> bool:
    """Whether a flow's scheduler has levels above 1."""
    return config.get("sigma_max") is not None and _number(config, "sigma_max", 1.0) > 1


def _edm(config: Config, sigma_data: float) -> Reading:
    sde = EDM(t_min=_number(config, "sigma_min", 0.002), t_max=_number(config, "sigma_max", 80.0))
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(f"EDM's preconditioning is known for epsilon and v_prediction; got {prediction!r}.")
    return Reading(sde, _quarter_log, _sigma_of_quarter_log, prediction, sigma_data, levels=_levels(config))


# The network's times as functions of a module, so that readings can be pickled.


def _level(n: int, t: Time) -> Time:
    return (n * t - 1).clamp(min=0.0)


def _share(n: int, first: int, k: Time) -> Time:
    return (k + first) / n


def _rising(n: int, t: Time) -> Time:
    return n * (1 - t)


def _falling(n: int, k: Time) -> Time:
    return 1 - k / n


def _time_of_sigma(sde: SDE, sigma: Time) -> Time:
    return sde.t_of_log_snr(-2 * sigma.log())


def _quarter_log(sigma: Time) -> Time:
    return 0.25 * sigma.log()


def _sigma_of_quarter_log(k: Time) -> Time:
    return (4 * k).exp()


def _table(config: Config, name: str) -> Reading:
    if config.get("shift", 1.0) != 1.0:
        raise ValueError(
            f"{name} has a table of betas and shift={config['shift']!r}, the key of a flow: which of them is meant? "
            'A flow has prediction_type="flow_prediction".'
        )
    bars = alphas_cumprod(config)
    prediction = config.get("prediction_type", "epsilon")
    if config.get("rescale_betas_zero_snr") and prediction == "epsilon":
        raise ValueError(
            f"{name} has zero terminal SNR (rescale_betas_zero_snr) with prediction_type='epsilon': where there is "
            "only noise, predicting it says nothing of the data. Such models predict v or the sample."
        )
    sde = DiscreteVPSDE(alphas_cumprod=bars)
    n = sde.levels
    return Reading(sde, functools.partial(_level, n), functools.partial(_share, n, 1), prediction, levels=n)


def alphas_cumprod(config: Config) -> Tensor:
    r"""The table alpha_bar_k of a configuration, rebuilt in float64, with shape (N,).

    `linear`, `scaled_linear` (linear in sqrt beta), `squaredcos_cap_v2` (beta_k = min(1 - f((k + 1) / N) / f(k / N),
    0.999), f = cos^2(pi / 2 (t + 0.008) / 1.008); Nichol and Dhariwal, https://arxiv.org/abs/2102.09672, eq. 17),
    `laplace` (the same with sqrt(SNR / (1 + SNR)) of a Laplace density of the log-SNR), `sigmoid` (betas on a sigmoid
    from -6 to 6), or `trained_betas`. With `snr_shift_scale` c the SNR is divided by c, so that alpha_bar becomes
    alpha_bar / (c + (1 - c) alpha_bar) (CogVideoX, https://arxiv.org/abs/2408.06072). With `rescale_betas_zero_snr`,
    sqrt(alpha_bar) is shifted and scaled so that its last value is 0 and its first stays (Lin et al.,
    https://arxiv.org/abs/2305.08891, alg. 1); for the 0 we put half of the value before it.

    Raises:
        ValueError: for a beta schedule that is unknown, or betas outside of (0, 1).
    """
    trained = config.get("trained_betas")
    if trained is not None:
        betas = torch.as_tensor(trained, dtype=torch.float64)
    else:
        schedule, n = config.get("beta_schedule", "linear"), _levels(config)
        check_choice("beta_schedule", schedule, _BETAS)
        betas = _BETAS[schedule](n, _number(config, "beta_start", 1e-4), _number(config, "beta_end", 0.02))
    if betas.ndim != 1 or not ((betas > 0) & (betas < 1)).all():
        raise ValueError("the betas must be a list of numbers in (0, 1).")
    bars = torch.log1p(-betas).cumsum(0).exp()
    scale = _positive(config, "snr_shift_scale")
    bars = bars / (scale + (1 - scale) * bars)
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
