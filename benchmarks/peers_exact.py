"""Peers on exact problems through their own public API, and ours: functions of a problem and a budget of calls.

All see the same denoiser D(y, rho); calls are counted there, not by the samplers. Every peer gets the spacings it
offers, among them one uniform in log-SNR where it has one.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from problems import RHO_MAX, RHO_MIN, SDE, Problem
from torch import Tensor

import fastsde

CHUNK = 2000
"""Samples at a time."""


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A sampler with its settings.

    Attributes:
        family: who wrote it: "fastsde", "diffusers", ..
        kind: "ODE" or "SDE": peers are compared with their like.
        name: solver and settings.
        draw: `draw(problem, n, budget, seed)` returns n samples; `budget` is a number of calls, or a tolerance.
        tolerances: the tolerances to run with, for adaptive samplers; budgets of calls otherwise.
        fewest: smallest budget that makes sense.
    """

    family: str
    kind: str
    name: str
    draw: Callable[[Problem, int, Any, int], Tensor]
    tolerances: tuple[float, ...] = ()
    fewest: int = 1

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells it apart."""
        return self.family, self.kind, self.name


def start(problem: Problem, n: int, k: int, seed: int) -> Tensor:
    """Standard normals of chunk k of a seed, the same for everybody, with shape (at most CHUNK, d)."""
    torch.manual_seed(1_000_003 * seed + k)
    return torch.randn(min(CHUNK, n - k * CHUNK), problem.d)


def drawn(problem: Problem, n: int, seed: int, **options: Any) -> Tensor:
    """Samples by fastsde, from the start states that all samplers share."""
    model = problem.model()
    x = SDE.prior_std * torch.cat([start(problem, n, k, seed) for k in range(-(-n // CHUNK))])
    return fastsde.sample(model, x_init=x, batch_size=CHUNK, seed=seed, **options).samples


def ours(options: Callable[[Any], dict[str, Any]]) -> Callable[[Problem, int, Any, int], Tensor]:
    """fastsde's `sample` with what `options` makes of a budget."""
    return lambda problem, n, budget, seed: drawn(problem, n, seed, **options(budget))


def by_calls(eta: float) -> Callable[[Any], dict[str, Any]]:
    """Our own solver with a number of calls, or with a tolerance."""
    solver = fastsde.ExponentialPC(eta=eta)
    return lambda budget: {"solver": solver, "rtol" if isinstance(budget, float) else "nfe": budget}


def chunked(draw: Callable[[Problem, Tensor, Any, int], Tensor]) -> Callable[[Problem, int, Any, int], Tensor]:
    """From a function of standard normal start states to one that draws n samples, a chunk at a time."""

    def all_of(problem: Problem, n: int, budget: Any, seed: int) -> Tensor:
        parts = []
        for k in range(-(-n // CHUNK)):
            z = start(problem, n, k, seed)
            parts.append(draw(problem, z, budget, 1000 * seed + k))
        return torch.cat(parts)

    return all_of


def diffusers(name: str, **options: Any) -> Callable[[Problem, int, Any, int], Tensor]:
    """A scheduler of diffusers in its usual loop, on DDPM's table of betas or in EDM's sigma."""

    def draw(problem: Problem, z: Tensor, budget: int, seed: int) -> Tensor:
        import diffusers

        scheduler = getattr(diffusers, name)(**options)
        scheduler.set_timesteps((budget + 1) // 2 if name.startswith("Heun") else budget)
        x, generator = z * scheduler.init_noise_sigma, torch.Generator().manual_seed(seed)
        takes = "generator" in type(scheduler).step.__code__.co_varnames
        edm = name.startswith("EDM")
        for k, t in enumerate(scheduler.timesteps):
            rho = scheduler.sigmas[k].double()
            y = x if edm else scheduler.scale_model_input(x, t) * float((1 + rho**2).sqrt())
            if edm:
                scheduler.scale_model_input(x, t)  # what the scheduler counts its steps by
            x_0 = problem.denoise(y, rho)
            if edm:
                data, level = scheduler.config.sigma_data, float(rho)
                skip = data**2 / (level**2 + data**2)
                out = (x_0 - skip * y) / (level * data / math.hypot(level, data))
            else:
                out = (y - x_0) / float(rho)
            x = scheduler.step(out, t, x, **({"generator": generator} if takes else {})).prev_sample
        return x

    return chunked(draw)


@functools.cache
def k_diffusion_sampling() -> ModuleType:
    """k_diffusion.sampling alone: the package imports image libraries that no sampler needs, and often are broken."""
    if (found := importlib.util.find_spec("k_diffusion")) is None:
        raise SystemExit("k-diffusion is missing: pip install -e '.[bench,peers]'")
    package = ModuleType("k_diffusion")
    package.__path__ = list(found.submodule_search_locations or ())
    stubs = {"k_diffusion": package, "torchvision": MagicMock(), "torchvision.transforms": MagicMock()}
    with patch.dict(sys.modules, stubs):
        return importlib.import_module("k_diffusion.sampling")


def k_diffusion(name: str, sigmas: str, **options: Any) -> Callable[[Problem, int, Any, int], Tensor]:
    """A sampler of k-diffusion on Karras or exponential sigmas; noise from torch, not from a Brownian tree."""

    def draw(problem: Problem, z: Tensor, budget: int, seed: int) -> Tensor:
        module = k_diffusion_sampling()
        grid = getattr(module, f"get_sigmas_{sigmas}")(budget, RHO_MIN, RHO_MAX)
        more = {"noise_sampler": lambda *_: torch.randn_like(z)} if "sde" in name else {}
        return getattr(module, name)(problem.denoise, z * RHO_MAX, grid, disable=True, **options, **more)

    return chunked(draw)


@chunked
def dpm_adaptive(problem: Problem, z: Tensor, budget: float, seed: int) -> Tensor:
    """k-diffusion's adaptive DPM-Solver-23, denoised at the end."""
    y = k_diffusion_sampling().sample_dpm_adaptive(
        problem.denoise, z * RHO_MAX, RHO_MIN, RHO_MAX, rtol=budget, disable=True
    )
    return problem.denoise(y, torch.tensor(RHO_MIN))


def azula(name: str, **options: Any) -> Callable[[Problem, int, Any, int], Tensor]:
    """A sampler of azula on its VE schedule, whose uniform times are uniform in log-SNR; denoised at the end."""

    def draw(problem: Problem, z: Tensor, budget: int, seed: int) -> Tensor:
        from azula import denoise, noise, sample

        class Exact(denoise.Denoiser):
            schedule = noise.VESchedule(RHO_MIN, RHO_MAX)

            def forward(self, x_t: Tensor, t: Tensor) -> denoise.DiracPosterior:
                return denoise.DiracPosterior(problem.denoise(x_t, self.schedule.sigma(t.double())))

        sampler = getattr(sample, name)(Exact(), steps=budget - 1, silent=True, dtype=torch.float64, **options)
        y = sampler(z * RHO_MAX).to(z.dtype)
        return problem.denoise(y, torch.tensor(RHO_MIN))

    return chunked(draw)


@chunked
def torchdiffeq(problem: Problem, z: Tensor, budget: float, seed: int) -> Tensor:
    """dopri5 on dy / dlam = D - y, denoised at the end."""
    from torchdiffeq import odeint

    ends = torch.tensor([-math.log(RHO_MAX), -math.log(RHO_MIN)], dtype=torch.float64)

    def slope(lam: Tensor, y: Tensor) -> Tensor:
        return problem.denoise(y, (-lam).exp()) - y

    y = odeint(slope, z * RHO_MAX, ends, rtol=budget, atol=budget / 10, method="dopri5")[-1]
    return problem.denoise(y, torch.tensor(RHO_MIN))


@chunked
def torchsde(problem: Problem, z: Tensor, budget: int, seed: int) -> Tensor:
    """Euler-Maruyama of torchsde on dy = 2 (D - y) dlam + sqrt(2) rho dW, denoised at the end."""
    import torchsde

    class Reverse(torch.nn.Module):
        noise_type, sde_type = "diagonal", "ito"

        def f(self, lam: Tensor, y: Tensor) -> Tensor:
            return 2 * (problem.denoise(y, torch.as_tensor(math.exp(-float(lam)))) - y)

        def g(self, lam: Tensor, y: Tensor) -> Tensor:
            return torch.full_like(y, math.sqrt(2) * math.exp(-float(lam)))

    ends = torch.tensor([-math.log(RHO_MAX), -math.log(RHO_MIN)])
    step = float(ends[1] - ends[0]) / (budget - 1) * (1 + 1e-3)  # so that no remainder is left for one more step
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = torchsde.sdeint(Reverse(), z * RHO_MAX, ends, method="euler", dt=step)[-1]
    return problem.denoise(y, torch.tensor(RHO_MIN))


def samplers() -> list[Sampler]:
    """Everybody."""
    found: list[Sampler] = []

    def add(family: str, kind: str, name: str, draw: Any, tolerances: tuple[float, ...] = (), fewest: int = 1) -> None:
        found.append(Sampler(family, kind, name, draw, tolerances, fewest))

    log_snr = ours(lambda n: {"controller": fastsde.Grid.log_snr(SDE, n - 1)})
    published = ours(lambda rtol: {"solver": fastsde.ExtrapolatedEM(), "rtol": rtol})
    add("fastsde", "ODE", "ExponentialPC", ours(by_calls(0.0)))
    add("fastsde", "ODE", "ExponentialPC, log-SNR grid", log_snr)
    add("fastsde", "ODE", "ExponentialPC, rtol", ours(by_calls(0.0)), (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005))
    add("fastsde", "SDE", "ExponentialPC, eta 1", ours(by_calls(1.0)))
    add("fastsde", "SDE", "ExponentialPC, eta 0.5", ours(by_calls(0.5)))
    add("fastsde", "SDE", "ExponentialPC, eta 1, rtol", ours(by_calls(1.0)), (0.5, 0.2, 0.1, 0.05, 0.02))
    add("fastsde", "SDE", "Algorithm 6", published, (0.02, 0.05, 0.1))
    add("fastsde", "SDE", "Euler-Maruyama", ours(lambda n: {"solver": fastsde.EulerMaruyama(n - 1)}))
    spacings = {
        "trailing": {"timestep_spacing": "trailing"},
        "Karras": {"use_karras_sigmas": True},
        "log-SNR": {"use_exponential_sigmas": True},
    }
    for spacing, said in spacings.items():
        for order in (2,) if spacing == "trailing" else (2, 3):
            for name, scheduler in (("DPM-Solver++", "DPMSolver"), ("UniPC", "UniPC"), ("DEIS", "DEIS")):
                draw = diffusers(f"{scheduler}MultistepScheduler", solver_order=order, **said)
                add("diffusers", "ODE", f"{name} {order}, {spacing}", draw)
        sde = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, **said}
        add("diffusers", "SDE", f"SDE-DPM-Solver++ 2, {spacing}", diffusers("DPMSolverMultistepScheduler", **sde))
        add("diffusers", "SDE", f"SA-Solver, {spacing}", diffusers("SASolverScheduler", **said))
    for spacing, sigmas in (("Karras", "karras"), ("log-SNR", "exponential")):
        edm = {"sigma_min": RHO_MIN, "sigma_max": RHO_MAX, "sigma_schedule": sigmas}
        add("diffusers", "ODE", f"Heun, {spacing}", diffusers("HeunDiscreteScheduler", **spacings[spacing]), fewest=11)
        add("diffusers", "ODE", f"EDM DPM-Solver++ 2, {spacing}", diffusers("EDMDPMSolverMultistepScheduler", **edm))
        for name, kind in (("dpmpp_2m", "ODE"), ("lms", "ODE"), ("dpmpp_2m_sde", "SDE"), ("dpmpp_3m_sde", "SDE")):
            add("k-diffusion", kind, f"{name}, {spacing}", k_diffusion(f"sample_{name}", sigmas))
    add("k-diffusion", "ODE", "dpm_adaptive", dpm_adaptive, (0.2, 0.1, 0.05, 0.02))
    for name, order in (("zAB", 3), ("vAB", 3), ("zEAB", 3), ("xEAB", 2), ("xEAB", 3), ("REAB", 2)):
        add("azula", "ODE", f"{name} {order}", azula(f"{name}Sampler", order=order))
    add("azula", "ODE", "DDIM", azula("DDIMSampler"))
    add("azula", "SDE", "Ito", azula("ItoSampler"))
    add("torchdiffeq", "ODE", "dopri5", torchdiffeq, (0.1, 0.01, 0.001))
    add("torchsde", "SDE", "euler", torchsde, fewest=30)
    return found
