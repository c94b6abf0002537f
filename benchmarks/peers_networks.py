"""Peers on a network that is given as a `fastsde.ScoreModel`: each a function of start noise and a budget of calls.

Flows and tables of discrete betas go through diffusers' schedulers in their usual loop; other processes through
fastsde's implementations of the same solvers, which agree with diffusers' (tests/test_parity.py). Where a scheduler
leaves a choice, the peers get the better one:

- The network is called at the noise level of the step, not at its timestep rounded to an integer.
- Noise is taken as it is: all of these schedulers start from a standard normal.
- A scheduler that stops above zero noise is taken there by a first-order step with its last output, at no call.
- Clipping is part of the model: the schedulers are given the epsilon that belongs to the clipped x_0.

DDIM is DPM-Solver++ of order 1, which is the same formula and offers all spacings at any number of steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

import fastsde

Draw = Callable[[Tensor, int], "Tensor | None"]
"""Images, from standard normal noise with shape (B, *event) and a budget of calls.

None where the peer cannot do with that many calls.
"""


@dataclasses.dataclass(frozen=True)
class Diffusers:
    """A scheduler of diffusers in its usual loop.

    Attributes:
        model: the score model.
        cond: its conditioning, each tensor with leading axis B.
        name: the scheduler's class.
        options: its configuration.
        even: gives a flow's scheduler equal steps from 1 to 1 / N itself, as many pipelines do, and not 1 / 1000.
    """

    model: fastsde.ScoreModel
    cond: Mapping[str, Tensor] | None
    name: str
    options: Mapping[str, object]
    even: bool = False

    @property
    def flow(self) -> bool:
        """Whether the process is a flow; it has a table of betas otherwise."""
        return isinstance(self.model.sde, fastsde.RectifiedFlow)

    def scheduler(self, calls: int) -> object | None:
        """The scheduler with its steps set, or None where it has none for that many calls."""
        import diffusers

        sde = self.model.sde
        own = {} if self.flow else {"trained_betas": table(sde), "num_train_timesteps": sde.levels}
        scheduler = getattr(diffusers, self.name)(**self.options, **own)
        if self.even:
            scheduler.set_timesteps(sigmas=np.linspace(1, 1 / calls, calls))
        else:
            try:
                scheduler.set_timesteps((calls + 1) // 2 if "Heun" in self.name else calls)
            except (ValueError, IndexError, ZeroDivisionError):
                return None
        levels = scheduler.sigmas[: len(scheduler.timesteps)]
        good = len(levels) <= calls and bool((levels > 0).all() and (levels.diff() <= 0).all())
        # Two steps at one level divide by zero; Heun's scheduler lists every level after the first twice.
        if not good or ("Heun" not in self.name and not (levels.diff() < 0).all()):
            return None
        scheduler.set_begin_index(0)
        return scheduler

    def out(self, x: Tensor, level: Tensor) -> Tensor:
        """What the scheduler takes for the network's output: the velocity of a flow, the epsilon of others."""
        if self.flow:  # of which the time is the level, to 1 itself
            return self.model(x, level.expand(len(x)), self.cond or {}).velocity
        t = self.model.sde.t_of_log_snr(-2 * level.log().reshape(1)).clamp(max=1.0)
        return self.model(x, t.expand(len(x)), self.cond or {}).epsilon

    @torch.no_grad()
    def __call__(self, z: Tensor, calls: int) -> Tensor | None:
        scheduler = self.scheduler(calls)
        if scheduler is None:
            return None
        x = z
        # SA-Solver draws noise even where it takes none of it.
        more = {"generator": torch.Generator(z.device).manual_seed(0)} if "SASolver" in self.name else {}
        with self.model.sampling():
            for level, t in zip(scheduler.sigmas.double().tolist(), scheduler.timesteps, strict=False):
                out = self.out(x, torch.tensor(level, dtype=torch.float64, device=z.device))
                x = scheduler.step(out, t, x, **more).prev_sample
        last = float(scheduler.sigmas[-1])
        if last > 0 and self.flow:
            x = x - last * out
        elif last > 0:
            x = x * (1 + last**2) ** 0.5 - last * out
        return x


def on_grid(
    model: fastsde.ScoreModel,
    cond: Mapping[str, Tensor] | None,
    solver: fastsde.Solver,
    grid: Callable[[fastsde.SDE, int], fastsde.Grid],
    z: Tensor,
    calls: int,
) -> Tensor | None:
    """A solver of fastsde with one call a step and one more to denoise, on a grid of a continuous process."""
    if calls < 2:
        return None
    options = {"solver": solver, "controller": grid(model.sde, calls - 1), "x_init": model.sde.prior(z), "seed": 0}
    return fastsde.sample(model, cond=None if cond is None else dict(cond), **options).samples


def table(sde: fastsde.DiscreteVPSDE) -> list[float]:
    """The betas of a process with a table of levels."""
    t = torch.arange(sde.levels + 1, dtype=torch.float64) / sde.levels
    return (-torch.expm1(2 * sde.log_alpha(t).diff())).tolist()


def zero(t: object) -> float:
    """The share of noise that SA-Solver adds: none, so that it solves the probability flow."""
    return 0.0


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SA = {"tau_func": zero, "predictor_order": 3, "corrector_order": 4}
BH1 = {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}  # a last step to zero noise is infinite in this variant
SOLVERS: dict[str, tuple[str, dict[str, object]]] = {
    "DPM-Solver++ 2": ("DPMSolverMultistepScheduler", {"solver_order": 2}),
    "DPM-Solver++ 3": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "UniPC 2": ("UniPCMultistepScheduler", {"solver_order": 2}),
    "UniPC 3": ("UniPCMultistepScheduler", {"solver_order": 3}),
    "UniPC 3 bh1": ("UniPCMultistepScheduler", {"solver_order": 3, **BH1}),
    "DEIS 3": ("DEISMultistepScheduler", {"solver_order": 3}),
    "SA-Solver 3, no noise": ("SASolverScheduler", SA),
}
"""Multistep schedulers for flows and tables: their class and settings."""

SPACINGS: dict[str, dict[str, object]] = {
    "leading": {"timestep_spacing": "leading"},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace"},
    "Karras": {"use_karras_sigmas": True},
    "log-SNR": {"use_exponential_sigmas": True},
}
"""Spacings of the schedulers for tables; equal steps in log-SNR are their exponential sigmas."""


def flow_peers(model: fastsde.ScoreModel, cond: Mapping[str, Tensor] | None) -> dict[str, Draw]:
    """Peers on a rectified flow, with equal steps in t and with those shifted by 3."""
    peers: dict[str, Draw] = {}
    for shift in (1.0, 3.0):
        end, make = f", shift {shift:g}", partial(Diffusers, model, cond)
        peers[f"Euler{end}"] = make("FlowMatchEulerDiscreteScheduler", {"shift": shift})
        peers[f"Euler to 1/N{end}"] = make("FlowMatchEulerDiscreteScheduler", {"shift": shift}, even=True)
        peers[f"Heun{end}"] = make("FlowMatchHeunDiscreteScheduler", {"shift": shift})
        for name, (scheduler, options) in SOLVERS.items():
            peers[name + end] = make(scheduler, {**options, **FLOW, "flow_shift": shift})
    return peers


def table_peers(model: fastsde.ScoreModel, cond: Mapping[str, Tensor] | None) -> dict[str, Draw]:
    """Peers on a table of discrete betas, with all spacings they offer.

    Left out as the same to rounding: Lu's lambdas are equal steps in log-SNR, and UniPC bh1 is SA-Solver without noise.
    """
    solvers = {"DDIM": ("DPMSolverMultistepScheduler", {"solver_order": 1}), **SOLVERS}
    del solvers["UniPC 3 bh1"]
    return {
        f"{name}, {spacing}": Diffusers(model, cond, scheduler, {**options, **said})
        for name, (scheduler, options) in solvers.items()
        for spacing, said in SPACINGS.items()
    }


def continuous_peers(model: fastsde.ScoreModel, cond: Mapping[str, Tensor] | None) -> dict[str, Draw]:
    """Peers on a continuous process, as fastsde implements them, on two grids."""
    solvers = {
        "DDIM": fastsde.DDIM(),
        "DPM-Solver++ 2": fastsde.DPMSolverPP(order=2),
        "DPM-Solver++ 3": fastsde.DPMSolverPP(order=3),
        "UniPC 2": fastsde.UniPC(order=2),
        "UniPC 3": fastsde.UniPC(order=3),
        "DEIS 3": fastsde.DEIS(order=3),
    }
    grids = {"Karras": fastsde.Grid.karras, "log-SNR": fastsde.Grid.log_snr}
    return {
        f"{name}, {spacing}": partial(on_grid, model, cond, solver, grid)
        for name, solver in solvers.items()
        for spacing, grid in grids.items()
    }


def peers(model: fastsde.ScoreModel, cond: Mapping[str, Tensor] | None = None) -> dict[str, Draw]:
    """All peers that can run a model, by name.

    Args:
        model: the score model, clipped or not.
        cond: conditioning of the rows to come, each tensor with leading axis B.
    """
    if isinstance(model.sde, fastsde.RectifiedFlow):
        return flow_peers(model, cond)
    if isinstance(model.sde, fastsde.DiscreteVPSDE):
        return table_peers(model, cond)
    return continuous_peers(model, cond)
