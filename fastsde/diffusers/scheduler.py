"""Our exponential solver as a scheduler of diffusers, for pipelines that keep their own loop."""

from __future__ import annotations

import copy
import inspect
import math
import os
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastsde.batching import expand_like
from fastsde.diffusers.schedules import class_of, filled, read_loop, unread
from fastsde.score.base import Prediction
from fastsde.sde.base import SDE, Level
from fastsde.sde.discrete import DiscreteVPSDE
from fastsde.solvers import ExponentialPC, FittedSolver
from fastsde.solvers.adams import AdamsPlan, Predicted
from fastsde.steps import own_grid
from fastsde.types import Carry, State, Time


class FastSDEScheduler(SchedulerMixin, ConfigMixin):
    r"""`ExponentialPC` on a fixed grid, for `pipe.scheduler = FastSDEScheduler.from_config(pipe.scheduler.config)`.

    N inference steps are N network calls: the first gives the first prediction D, each further one predicts and
    corrects, and the last D is the denoised sample. Timesteps are those of `sample(nfe=N)`, fractional; the network
    gets what `ExponentialPC` gets there, so both give the same image from the same start (adaptive steps need
    `sample_pipeline`, because a pipeline's loop takes no rejection). It starts from noise; a start from an image is
    `sample_pipeline`'s, or needs levels that are given. Half-precision states are kept in float32 between
    steps; an edit of the state between two steps, as inpainting pipelines do, carries over.

    A flow's loop starts from noise z of variance 1, the state at t = 1, as pipelines of flows do (`init_noise_sigma` is
    1). The first call gives its D, and steps begin from alpha D + sigma z at t_max.

    Args:
        num_train_timesteps, beta_start, .., base_shift: the schedule, in the terms of diffusers' schedulers, as
            `read_schedule` understands them. With none of them, DDPM's: 1000 linear betas from 1e-4 to 0.02. A flow
            with one training timestep has times in [0, 1]; with `invert_sigmas`, times and velocities run backwards.
        use_clipped_model_output: whether clipping changes the predicted noise too, so that it and the denoised sample
            still make up the state; else it moves the state, as `DDIMScheduler` does. `from_config` takes care of it.
        exponential_order: order of `ExponentialPC`, 1 to 3.
        exponential_eta: its noise: 0 for the probability flow, 1 for the reverse-time SDE.
        fitted: what `FittedSolver.as_json` gives, to walk in place of `ExponentialPC`; `from_config` takes the solver
            itself or the file that `fastsde fit` wrote. The pipeline then runs with as many steps as it was fitted for,
            from the start; with a guess it makes one call more, whose output is not used. The process is checked, the
            network, which a scheduler does not see, is not.

    Raises:
        ValueError: as `read_schedule`.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers] + ["FlowMatchEulerDiscreteScheduler"]
    order = 1

    begin_index: int | None
    _index: int | None
    _ahead: Predicted

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
        time_shift_type: str | None = None,
        shift_terminal: float | None = None,
        invert_sigmas: bool | None = None,
        use_clipped_model_output: bool = True,
        exponential_order: int = 3,
        exponential_eta: float = 0.0,
        fitted: dict[str, Any] | None = None,
    ) -> None:
        config = {key: value for key, value in self.config.items() if value is not None}
        if not config.keys() & {"beta_schedule", "trained_betas", "sigma_data", "snr", "shift", "flow_shift"}:
            self.register_to_config(beta_schedule="linear")
        self.solver = ExponentialPC(order=exponential_order, eta=exponential_eta)
        if fitted is not None:
            if exponential_eta or exponential_order != 3:
                raise ValueError("fitted= says eta and order itself; leave exponential_eta and exponential_order out.")
            self.solver = FittedSolver.from_json(fitted, "fitted=")
        self.reading = read_loop(self.config)
        self.set_timesteps(self.solver.nfe if isinstance(self.solver, FittedSolver) else num_train_timesteps)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As of any scheduler, from the configuration of another one: with its class's defaults, not with ours.

        Args:
            config: `pipe.scheduler.config`, or a dict with the same keys.
            return_unused_kwargs: as diffusers'.
            kwargs: further arguments, such as `exponential_eta=1.0` or `fitted="six.json"`.
        """
        if isinstance(fitted := kwargs.get("fitted"), FittedSolver):
            kwargs["fitted"] = fitted.as_json()
        elif isinstance(fitted, str | os.PathLike):
            kwargs["fitted"] = FittedSolver.load(fitted).as_json()
        if isinstance(config, Mapping):
            kept = {key: value for key, value in filled(config).items() if key not in unread(config)}
            # Pipelines that make their own list of sigmas, Flux's, leave the levels to schedulers with this key.
            if kept.get("shift") is not None and kept.get("beta_schedule") is None:
                kept |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
            # DDIM's clips the denoised sample and leaves the predicted noise.
            theirs = class_of(config)
            if theirs is not None and "use_clipped_model_output" in inspect.signature(theirs.step).parameters:
                kept["use_clipped_model_output"] = False
            read_loop(kept)  # what cannot work is refused before keys of no use here are dropped
            config = kept
        made = super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)
        scheduler = made[0] if return_unused_kwargs else made
        # With keys that are no arguments here, which diffusers keeps in the configuration.
        scheduler.reading = read_loop(scheduler.config)
        scheduler.set_timesteps(scheduler.num_inference_steps)
        return made

    @property
    def sde(self) -> SDE:
        """The process."""
        return self.reading.sde

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the start: 1 for a flow, whose pipelines start from the noise itself."""
        return self.reading.loop_std

    @property
    def step_index(self) -> int | None:
        """Number of the next step; None before the first."""
        return self._index

    @property
    def _step_index(self) -> int | None:
        return self._index

    @_step_index.setter
    def _step_index(self, value: int | None) -> None:
        raise ValueError(
            "this pipeline sets the number of the step back, to take each step twice (Cosmos does); FastSDEScheduler "
            "takes a step once. Run the pipeline with its own scheduler."
        )

    @property
    def sigmas(self) -> Tensor:
        """Levels of the timesteps and of the end: t of a flow, sigma / alpha of other processes; with shape (N + 1,).

        With `invert_sigmas` 1 - t, as the scheduler with that key has it. On the CPU, in float32.
        """
        level = self.times if self.reading.is_flow else (-0.5 * self.sde.log_snr(self.times)).exp()
        level = torch.cat([level, level.new_zeros(1)])
        return (1 - level if self.config.get("invert_sigmas") else level).float()

    @property
    def alphas_cumprod(self) -> Tensor:
        """The table of alpha^2, with shape (num_train_timesteps,), in float32.

        Raises:
            AttributeError: for a process without a table.
        """
        if not isinstance(self.sde, DiscreteVPSDE):
            raise AttributeError(f"{self.sde} has no table of alphas.")
        return self.sde.alpha(torch.arange(1, self.sde.levels + 1).double() / self.sde.levels).square().float()

    @property
    def betas(self) -> Tensor:
        """1 - alpha_k^2 / alpha_(k-1)^2 of that table; shape and errors as of `alphas_cumprod`."""
        bars = self.alphas_cumprod.double()
        return (1 - bars / torch.cat([bars.new_ones(1), bars[:-1]])).float()

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Says at which timestep the loop starts, for pipelines that start from an image.

        Raises:
            ValueError: for a start in the middle of a grid of our own, whose levels crowd at the data's end: the share
                of the list that a pipeline skips would be hardly any noise.
        """
        if begin_index and (self._own_grid or self.solver.times is not None):
            raise ValueError(
                f"FastSDEScheduler starts from noise; this pipeline starts at step {begin_index}. Call it as "
                "fastsde.sample_pipeline(pipe, ..), which starts from an image; or give timesteps= or sigmas=."
            )
        self.begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | np.ndarray | Tensor | None = None,
        sigmas: Sequence[float] | np.ndarray | Tensor | None = None,
        mu: float | None = None,
    ) -> None:
        """Chooses the grid and forgets the last run.

        Args:
            num_inference_steps: the number of network calls, at least 1.
            device: where `timesteps` goes.
            timesteps: the network's times to visit instead, in the order of falling noise.
            sigmas: levels to visit instead, decreasing: t of a flow, before the shift; sigma / alpha of other
                processes. With `timesteps` too, the network is told those at these levels.
            mu: a flow's shift of given sigmas where `use_dynamic_shifting`, exp(mu), or mu if `time_shift_type` is
                "linear"; else `shift` is. Without sigmas a shift only says where a loop starts from an image: it spaces
                steps, and the spacing is ours.

        Raises:
            ValueError: if neither a number nor lists of that length say which steps, or they cannot be walked.
        """
        n = num_inference_steps
        lengths = {len(v) for v in (timesteps, sigmas) if v is not None}
        counted = isinstance(n, Integral) and not isinstance(n, bool) and n >= 1
        if lengths and self.solver.times is not None:
            raise ValueError("a fitted solver has its own times; give num_inference_steps, not timesteps or sigmas.")
        if len(lengths) > 1 or not (n in lengths or (counted and not lengths) or (n is None and lengths)):
            raise ValueError(
                "give num_inference_steps of at least 1, timesteps or sigmas (or both), of the same length; got "
                f"num_inference_steps={n!r} and lists of {sorted(lengths)}."
            )
        self._mu, self._paired = mu, timesteps is not None and sigmas is not None
        if sigmas is not None:
            times = self._times_of(torch.as_tensor(sigmas, dtype=torch.float64), mu)
        elif timesteps is not None:
            times = self.reading.time(torch.as_tensor(timesteps, dtype=torch.float64))
        else:
            times = self._own_times(int(n or 0))
        times = self._checked(times, timesteps if sigmas is None else sigmas)
        self._given_at = 1.0 if self.reading.is_flow and not lengths else float(times[0])
        if times[0] > self.sde.t_max:  # the end itself cannot be stepped from
            times[0] = max(self.sde.t_max, float(times[:2].mean()) if len(times) > 1 else 0.0)
        self.times = times
        self.num_inference_steps, self._own_grid = len(times) if n is None else int(n), not lengths
        network = self.reading.timestep(self.times) if timesteps is None else torch.as_tensor(timesteps)
        self.timesteps = network.float().to(device or "cpu")
        self.begin_index = None
        self._index = None
        self._carry: Carry = {}
        self._returned = torch.empty(0)

    def _own_times(self, levels: int) -> Time:
        """Those of `sample(nfe=levels)`, or of the fitted solver."""
        if not isinstance(self.solver, FittedSolver):
            clock, steps = copy.copy(self.sde), levels - 1
            if self.reading.is_flow and self.config.get("shift_terminal"):
                clock.t_min = float(self.config["shift_terminal"])
            return own_grid(clock, self.solver, steps).times if steps else torch.tensor([clock.t_max]).double()
        if levels != self.solver.nfe:
            raise ValueError(
                f"the solver was fitted for {self.solver.nfe} steps; got num_inference_steps={levels}. Fit one "
                "for as many, or take the scheduler without fitted=."
            )
        times = torch.tensor(self.solver.times, dtype=torch.float64)
        self.solver.check(self.sde, times)
        return times

    def _checked(self, times: Time, given: object) -> Time:
        """The times, if steps can go through them; within the process but for a flow's ends, which have no level."""
        if len(times) == 0 or not torch.isfinite(times).all() or not (times.diff() < 0).all():
            raise ValueError(f"timesteps and sigmas must be finite, and their noise must fall; got {given}.")
        slack = 0.01 * (self.sde.t_max - self.sde.t_min)  # pipelines' lists end a level or so outside
        if times[0] > self.sde.t_max + slack or times[-1] < self.sde.t_min - slack:
            first, last = (float(self.reading.timestep(torch.tensor([t]))) for t in (self.sde.t_max, self.sde.t_min))
            raise ValueError(f"timesteps must be from {first:g} to {last:g}; got {given}.")
        return times.clamp(_LEAST, 1.0) if self.reading.is_flow else times.clamp(self.sde.t_min, self.sde.t_max)

    def _times_of(self, sigmas: Tensor, mu: float | None) -> Time:
        """Times at levels; a flow's are s sigma / (1 + (s - 1) sigma), with s from `mu` where it shifts dynamically."""
        if not self.reading.is_flow:
            return self.sde.t_of_log_snr(-2 * sigmas.log())
        shift = float(self.config.get("shift") or self.config.get("flow_shift") or 1.0)
        if self.config.get("use_dynamic_shifting"):
            mu = float(self.config.get("base_shift") or 0.0) if mu is None else mu
            shift = float(mu) if self.config.get("time_shift_type") == "linear" else math.exp(mu)
        times, terminal = shift * sigmas / (1 + (shift - 1) * sigmas), self.config.get("shift_terminal")
        return 1 - (1 - times) * (1 - terminal) / (1 - times[-1]) if terminal else times

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
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """The state at the next timestep; after the last one, the denoised sample.

        Args:
            model_output: what the network returned, with shape (B, *event).
            timestep: the element of `timesteps` it was called with.
            sample: the state it was called on.
            eta: DDIM's, which its pipelines hand over; 0, since noise is `exponential_eta`.
            use_clipped_model_output: as in the configuration, which it overrides; None for that.
            generator: for the noise of `exponential_eta`; one, or one for each sample.
            return_dict: False for a tuple, of the state and the denoised sample as predicted here.

        Raises:
            ValueError: for states of another shape, steps out of order, and an `eta` that would have no effect.
        """
        if eta:
            raise ValueError(
                f"eta must be 0; got {eta}. Noise is FastSDEScheduler.from_config(.., exponential_eta=1.0)."
            )
        wide = model_output.ndim > 1 and model_output.shape[1] == 2 * sample.shape[1]  # with a learned variance
        wrong = (model_output[:, : sample.shape[1]] if wide else model_output).shape != sample.shape
        if wrong or (self._index is not None and self._returned.shape != sample.shape):
            raise ValueError(
                f"model_output and sample must have the shape of the state, and keep it; got "
                f"{tuple(model_output.shape)} and {tuple(sample.shape)}."
            )
        if self._index is not None and self._index >= len(self.times):
            raise ValueError(f"all {len(self.times)} steps are taken; call set_timesteps before the next run.")
        x = sample.to(torch.float64 if sample.dtype == torch.float64 else torch.float32, copy=True)
        start, k = self._index is None, self.begin_index if self._index is None else self._index
        k = self.index_for_timestep(timestep) if k is None else k
        self._check_timestep(timestep, k)
        if start:
            self._begin(x, k)
        c = self._coefficients(k, x)
        level = self.sde.level(self.times[k].to(x.device).expand(len(x)))
        prediction, edit = self._prediction(model_output.to(x.dtype), x, level, use_clipped_model_output)
        if start and isinstance(self.solver, FittedSolver) and self.solver.guesses:
            # The pipeline's loop has called the network all the same, at each of its timesteps.
            guess = self.solver.first_prediction(x)
            prediction, edit = Prediction("sample", guess, x, level.alpha, level.sigma), None
        state, self._carry = self.solver.correct(self._ahead, prediction, c, self._carry)
        if not start:
            state = state + (x - self._returned)
        elif k == 0 and self._given_at > float(self.times[0]):
            state = self._moved(x, prediction.x_0, level)
        state = state if edit is None else state + edit
        out = self._carry["x_0"]
        if k + 1 < len(self.times):
            z = None
            if self.solver.eta:
                z = randn_tensor(x.shape, generator=generator, device=x.device, dtype=torch.float32).to(x.dtype)
            self._ahead = self.solver.predict(state, self._coefficients(k + 1, x), self._carry, z)
            out = self._ahead.x
        self._index = k + 1
        out = out.to(sample.dtype)
        self._returned = out.to(x.dtype, copy=True)  # the caller may edit his in place
        return SchedulerOutput(prev_sample=out) if return_dict else (out, prediction.x_0.to(sample.dtype))

    def _begin(self, x: State, k: int) -> None:
        """Plans the steps from timestep k on."""
        self.set_begin_index(k)
        self._first, self._plan = k, self.solver.plan(self.sde, self.times[k:])
        self._carry = self.solver.init(x)
        self._ahead = self.solver.predict(x, self._coefficients(k, x), self._carry, None)

    def _moved(self, x: State, x_0: State, level: Level) -> State:
        """The state at the first level, from one that was given at a higher one, along the first prediction."""
        given = self.sde.level(torch.tensor([self._given_at], dtype=torch.float64, device=x.device))
        keep = level.sigma / given.sigma
        return expand_like(keep, x) * x + expand_like(level.alpha - keep * given.alpha, x) * x_0

    def _coefficients(self, k: int, x: State) -> AdamsPlan:
        """Those of the step to timestep k, a row for each state."""
        return self._plan.rows(torch.full((len(x),), k - self._first)).map(lambda value: value.to(x.device))

    def _prediction(self, out: Tensor, x: State, level: Level, whole: bool | None) -> tuple[Prediction, State | None]:
        """What the network said of the state it was called on, and how clipping moves the state, if it does."""
        reading, prediction = self.reading, self.reading.read(out, x, level)
        if reading.limit is None:
            return prediction, None
        x_0 = reading.clip(prediction.x_0)
        clipped = Prediction("sample", x_0, x, level.alpha, level.sigma)
        if self.config["use_clipped_model_output"] if whole is None else whole:
            return clipped, None
        # The noise as it was and the clipped sample make up another state: the one DDIM goes on from.
        return clipped, expand_like(level.alpha, x) * (x_0 - prediction.x_0)

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

    def _time(self, timestep: Tensor | float | int, rows: int) -> Time:
        if self._paired:
            k = torch.as_tensor(timestep).double().reshape(-1)
            return self.times[[self.index_for_timestep(one) for one in k]].expand(rows)
        t = self.reading.time_of(timestep)
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


_LEAST = 1e-5
"""The least time of a flow: at 0 there is no noise left to step from."""
