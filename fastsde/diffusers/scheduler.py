"""Our exponential solver as a scheduler of diffusers, for pipelines that keep their own loop."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastsde.arguments import own_grid
from fastsde.batching import expand_like
from fastsde.control import Grid
from fastsde.diffusers.networks import DiffusersModel, clipped
from fastsde.diffusers.schedules import filled, read_schedule
from fastsde.noise import StepNoise
from fastsde.score.base import BoundModel, Prediction, ScoreModel
from fastsde.sde.base import Level
from fastsde.sde.discrete import DiscreteVPSDE
from fastsde.sde.flow import RectifiedFlow
from fastsde.solvers import ExponentialPC, Step
from fastsde.types import State, Time


class FastSDEScheduler(SchedulerMixin, ConfigMixin):
    r"""`ExponentialPC` on a fixed grid, for `pipe.scheduler = FastSDEScheduler.from_config(pipe.scheduler.config)`.

    N inference steps are N network calls: the first gives the first prediction D, each further one predicts and
    corrects, and the last D is the denoised sample. Timesteps are those of `sample(nfe=N)`, fractional; the network
    gets what `ExponentialPC` gets there, so both give the same image from the same start (adaptive steps need
    `sample_pipeline`, because a pipeline's loop takes no rejection). Half-precision states are kept in float32 between
    steps; an edit of the state between two steps, as inpainting pipelines do, carries over.

    Args:
        num_train_timesteps, beta_start, .., base_shift: the schedule, in the terms of diffusers' schedulers, as
            `read_schedule` understands them. With none of them, DDPM's: 1000 linear betas from 1e-4 to 0.02.
        exponential_order: order of `ExponentialPC`, 1 to 3.
        exponential_eta: its noise: 0 for the probability flow, 1 for the reverse-time SDE.

    Raises:
        ValueError: as `read_schedule`.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers] + ["FlowMatchEulerDiscreteScheduler"]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: str | None = None,
        trained_betas: list[float] | None = None,
        prediction_type: str | None = None,
        rescale_betas_zero_snr: bool = False,
        clip_sample: bool | None = None,
        clip_sample_range: float | None = None,
        thresholding: bool | None = None,
        dynamic_thresholding_ratio: float | None = None,
        sample_max_value: float | None = None,
        timestep_type: str | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        sigma_data: float | None = None,
        snr: float | None = None,
        sampling_eps: float | None = None,
        shift: float | None = None,
        flow_shift: float | None = None,
        use_flow_sigmas: bool | None = None,
        use_dynamic_shifting: bool | None = None,
        base_shift: float = 0.5,  # this and the next three are read by pipelines of flow models
        max_shift: float = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool | None = None,
        exponential_order: int = 3,
        exponential_eta: float = 0.0,
    ) -> None:
        config = {key: value for key, value in self.config.items() if value is not None}
        if not config.keys() & {"beta_schedule", "trained_betas", "sigma_data", "snr", "shift", "flow_shift"}:
            config["beta_schedule"] = "linear"
            self.register_to_config(beta_schedule="linear")
        self.reading = read_schedule(config)
        self.sde = self.reading.sde
        self.solver = ExponentialPC(order=exponential_order, eta=exponential_eta)
        self._given: Tensor | None = None
        self.model = clipped(DiffusersModel(lambda x, timestep: self._given, self.reading), self.reading)
        self.begin_index: int | None = None
        self.set_timesteps(num_train_timesteps)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As of any scheduler, from the configuration of another one: with its class's defaults, not with ours.

        Args:
            config: `pipe.scheduler.config`, or a dict with the same keys.
            return_unused_kwargs: as diffusers'.
            kwargs: further arguments, such as `exponential_eta=1.0`.
        """
        if isinstance(config, Mapping):
            kept = dict(filled(config))
            # Pipelines that make their own list of sigmas, Flux's, leave the levels to schedulers with this key.
            if kept.get("shift") is not None and kept.get("beta_schedule") is None:
                kept |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
            read_schedule(kept)  # what cannot work is refused before keys of no use here are dropped
            config = kept
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the start."""
        return self.reading.start_std

    @property
    def step_index(self) -> int | None:
        """Number of the next step; None before the first."""
        return self._index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Says at which timestep the loop starts, for pipelines that start from an image.

        They take a share of the list, meaning a share of the network's time; a grid that crowds at the data's end would
        give them hardly any noise. So the remaining steps of a table of betas or of a flow are planned anew, in place,
        from that share of the time on. Levels that were given stay.
        """
        self.begin_index = begin_index
        replan = self._own_grid and isinstance(self.sde, (DiscreteVPSDE, RectifiedFlow))
        if not replan or not 0 < begin_index < len(self.times):
            return
        clock = copy.copy(self.sde)
        clock.t_max = max(self.sde.t_max * (1 - begin_index / len(self.times)), 2 * self.sde.t_min)
        left = len(self.times) - begin_index
        tail = Grid.tapered(clock, left - 1).times if left > 1 else torch.tensor([clock.t_max], dtype=torch.float64)
        self.times[begin_index:] = tail
        self.timesteps[begin_index:] = self.reading.timestep(tail).to(self.timesteps)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: list[float] | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Chooses the grid and forgets the last run.

        Args:
            num_inference_steps: the number of network calls, at least 1.
            device: where `timesteps` goes.
            timesteps: the network's times to visit instead, decreasing.
            sigmas: levels to visit instead: t of a flow, before `mu`; sigma / alpha of other processes.
            mu: a flow's shift of given sigmas, as exp(mu); without them, it has no effect: shifts space steps, and the
                spacing is ours.

        Raises:
            ValueError: if not exactly one of the three says which steps.
        """
        given = [v for v in (timesteps, sigmas) if v is not None]
        n = num_inference_steps
        if len(given) > 1 or (not given and (not isinstance(n, Integral) or isinstance(n, bool) or n < 1)):
            raise ValueError(f"give num_inference_steps of at least 1, timesteps or sigmas; got {n!r}.")
        if timesteps is not None:
            times = self.reading.time(torch.as_tensor(timesteps, dtype=torch.float64))
        elif sigmas is not None:
            times = self._times_of(torch.as_tensor(sigmas, dtype=torch.float64), mu)
        elif num_inference_steps == 1:
            times = torch.tensor([self.sde.t_max], dtype=torch.float64)
        else:
            times = own_grid(self.sde, self.solver, int(num_inference_steps or 0) - 1).times
        if len(times) == 0 or not torch.isfinite(times).all() or not (times.diff() < 0).all():
            raise ValueError(
                f"timesteps and sigmas must be finite and decrease; got {sigmas if timesteps is None else timesteps}."
            )
        slack = 0.01 * (self.sde.t_max - self.sde.t_min)  # pipelines' lists end a level or so outside
        if times[0] > self.sde.t_max + slack or times[-1] < self.sde.t_min - slack:
            first, last = (float(self.reading.timestep(torch.tensor([t]))) for t in (self.sde.t_max, self.sde.t_min))
            raise ValueError(f"timesteps must be from {first:g} to {last:g}; got {timesteps or sigmas}.")
        self.times = times.clamp(self.sde.t_min, self.sde.t_max)
        self.num_inference_steps, self._own_grid = len(times), not given
        self.timesteps = self.reading.timestep(self.times).float().to(device or "cpu")
        self._index: int | None = None
        self._carry: dict[str, Tensor] = {}
        self._returned = torch.empty(0)

    def _times_of(self, sigmas: Tensor, mu: float | None) -> Time:
        if self.reading.prediction != "flow_prediction":
            return self.sde.t_of_log_snr(-2 * sigmas.log())
        shift = torch.tensor(float(self.config.get("shift") or 1.0)) if mu is None else torch.tensor(float(mu)).exp()
        return shift * sigmas / (1 + (shift - 1) * sigmas)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | int | None = None) -> Tensor:
        """EDM's networks want c_in x; all others x itself."""
        if self.reading.sigma_data is None or timestep is None:
            return sample
        return expand_like(self.reading.c_in(self._time(timestep, 1)), sample) * sample

    def index_for_timestep(self, timestep: Tensor | float | int) -> int:
        """The place of a timestep in `timesteps`."""
        return int((self.timesteps.cpu() - torch.as_tensor(timestep).cpu()).abs().argmin())

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float | int,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The state at the next timestep; after the last one, the denoised sample.

        Args:
            model_output: what the network returned, with shape (B, *event).
            timestep: the element of `timesteps` it was called with.
            sample: the state it was called on.
            generator: for the noise of `exponential_eta`; one, or one for each sample.
            return_dict: False for a tuple.
        """
        wrong = model_output.shape[:1] != sample.shape[:1] or model_output.shape[2:] != sample.shape[2:]
        if wrong or (self._index is not None and self._returned.shape != sample.shape):
            raise ValueError(
                f"model_output and sample must have the shape of the state, and keep it; got "
                f"{tuple(model_output.shape)} and {tuple(sample.shape)}."
            )
        if self._index is not None and self._index >= len(self.times):
            raise ValueError(f"all {len(self.times)} steps are taken; call set_timesteps before the next run.")
        x = sample.to(torch.float64 if sample.dtype == torch.float64 else torch.float32, copy=True)
        first = self._index is None
        if self._index is None:
            self._index = self.index_for_timestep(timestep) if self.begin_index is None else self.begin_index
            self._carry, self._x, self._z = self.solver.init(x), x, torch.zeros_like(x)
            edit = torch.zeros_like(x)
        else:
            edit = x - self._returned
        k = self._index
        self._check_timestep(timestep, k)
        t, before = self._rows(k, x), self._rows(max(k - 1, 0), x)
        self._given = model_output.to(x.dtype)
        now = self._advance(_Given(self.model, x), t if first else before, t)
        self._carry, self._x = now.carry, (x if first else now.x + edit)
        if k + 1 >= len(self.times):
            out = self._carry["x_0"]
        else:
            if self.solver.eta:
                z = randn_tensor(x.shape, generator=generator, device=x.device, dtype=torch.float32)
                self._z = z.to(x.dtype)
            ahead = _Ahead(self.model, x)
            self._advance(ahead, t, self._rows(k + 1, x))
            out = ahead.x
        self._index = k + 1
        out = out.to(sample.dtype)
        self._returned = out.to(x.dtype, copy=True)  # the caller may edit his in place
        return SchedulerOutput(prev_sample=out) if return_dict else (out,)

    def _check_timestep(self, timestep: Tensor | float | int, k: int) -> None:
        """Refuses a timestep that is not the one of the next step; not on a GPU, where looking would wait for it."""
        if isinstance(timestep, Tensor) and timestep.device.type != "cpu":
            return
        found = self.index_for_timestep(timestep)
        if found != k:
            raise ValueError(
                f"the next step is number {k}, from timestep {float(self.timesteps[k]):g}; got {float(timestep):g}, "
                f"which is number {found}. Steps go in order; call set_timesteps before the next run."
            )

    def _advance(self, model: BoundModel, t: Time, s: Time) -> Step:
        return self.solver.step(model, self.sde, self._x, t, s, _Drawn(self._z), self._carry)

    def _rows(self, k: int, x: State) -> Time:
        return self.times[k].to(x.device).expand(len(x))

    def _time(self, timestep: Tensor | float | int, rows: int) -> Time:
        k = torch.as_tensor(timestep).double().reshape(-1)
        t = self.reading.time(k).clamp(self.sde.t_min, self.sde.t_max)
        return t.expand(rows) if len(t) == 1 else t

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x_0 + sigma noise at the network's times `timesteps`, with shape (B,) or one for all."""
        t = self._time(timesteps, len(original_samples)).to(original_samples.device)
        return self.sde.marginal(original_samples, t, noise)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        """`add_noise`, under the name that pipelines of flow models use."""
        return self.add_noise(sample, torch.zeros_like(sample) if noise is None else noise, timestep)

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])


class _Drawn(StepNoise):
    """The step's noise, drawn before."""

    z: State = None  # type: ignore[assignment]

    def __init__(self, z: State) -> None:
        self.z = z


class _Given(BoundModel):
    """The network's output at the state it was called on: the point asked for, but for rounding and edits."""

    def __init__(self, model: ScoreModel, x: State) -> None:
        super().__init__(model, {}, torch.ones(len(x), dtype=torch.bool, device=x.device))
        self.x = x

    def __call__(self, x_t: State, t: Time, level: Level | None = None) -> Prediction:
        return self.model(self.x, t, level=level)


class _Ahead(_Given):
    """Keeps the state that the solver wants evaluated next, which is what a scheduler returns."""

    def __call__(self, x_t: State, t: Time, level: Level | None = None) -> Prediction:
        self.x = x_t
        one = torch.ones_like(t)
        return Prediction("sample", torch.zeros_like(x_t), x_t, one, one)
