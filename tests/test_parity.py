"""The fixed-grid solvers against the schedulers of diffusers: the same levels, network and noise, in float64."""

import importlib
from collections import deque

import pytest
import torch
from oracles import LINEAR_BETAS, vector

import fastsde
from fastsde import DDIM, DEIS, Ancestral, DiscreteVPSDE, DPMSolverPP, Grid, Heun, ScoreModel, UniPC
from fastsde.noise import StepNoise
from fastsde.score import MixtureScore
from fastsde.solvers.adams_weights import adams_weights

diffusers = pytest.importorskip("diffusers")
# Their NumPy calls on tensors.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*")

SDE = DiscreteVPSDE(LINEAR_BETAS)
BARS = (1 - LINEAR_BETAS).cumprod(0)
SIGMAS = ((1 - BARS) / BARS).sqrt()
"""sigma / alpha of every level, as in their `sigmas`."""
MEANS = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NONE = torch.zeros(3, 4, 0, dtype=torch.float64)
MIXTURE = MixtureScore(SDE, vector(0.2, 0.3, 0.5), MEANS, NONE, NONE[:, 0], floor=0.05)
START = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
ROUNDED = {"rtol": 1e-6, "atol": 1e-6}
"""For schedulers that round the state to float32 at every step, 6e-8 of it; measured 3e-7 at worst."""
EXACT = {"rtol": 1e-12, "atol": 1e-12}
"""For those that do not: float64 roundings of y = x / alpha, up to 157 times x; measured 3e-14 at worst."""


def epsilon(x, level):
    """The network of both: the exact noise of a mixture, no linear function of x, at levels 0 .. 999 of the table."""
    t = (level + 1) / 1000
    return -SDE.sigma(t)[:, None] * MIXTURE.exact_score(x, t)


MODEL = ScoreModel(epsilon, SDE, "epsilon", timestep=lambda t: 1000 * t - 1)


@pytest.fixture
def their_noise(monkeypatch):
    """Notes the normals of our solvers' steps, and gives them to their schedulers in turn: ours must run first."""
    noted, z = deque(), StepNoise.z.fget

    def noting(noise):
        value = z(noise)
        if value.any():  # a warm-up turn of no length has none
            noted.append(value)
        return value

    def draw(shape, dtype=None, **_):
        # Their last step, which denoises, draws as well, and gives it no weight.
        return noted.popleft().to(dtype) if noted else torch.full(shape, 7.0, dtype=dtype)

    monkeypatch.setattr(StepNoise, "z", property(noting))
    for name in ("ddim", "ddpm", "dpmsolver_multistep", "euler_ancestral_discrete"):
        monkeypatch.setattr(importlib.import_module(f"diffusers.schedulers.scheduling_{name}"), "randn_tensor", draw)


def build(name, steps, **config):
    """A scheduler with the timesteps it chooses itself, and its float32 tables redone in float64."""
    scheduler = getattr(diffusers, f"{name}Scheduler")(trained_betas=LINEAR_BETAS.numpy(), **config)
    scheduler.set_timesteps(steps)
    scheduler.alphas_cumprod = BARS
    if hasattr(scheduler, "sigmas"):
        sigmas = torch.cat([SIGMAS[scheduler.timesteps.long()], scheduler.sigmas[-1:].double()])
        # At level 0, 1 - alpha_bar = 1e-4 is 8e-5 off in float32: the same sigmas, on levels of the table, not between.
        torch.testing.assert_close(scheduler.sigmas.double(), sigmas, rtol=2e-4, atol=0)
        scheduler.sigmas = sigmas
    return scheduler


def loop(scheduler, *, in_y=False, finish=True, **options):
    """Their loop; without `finish` the last step is ours, to denoise, which some take with another order of theirs."""
    x = START / BARS[int(scheduler.timesteps[0])].sqrt() if in_y else START
    for k, t in enumerate(scheduler.timesteps):
        output = epsilon(scheduler.scale_model_input(x, t), t.double().expand(len(x)))
        if not finish and k == len(scheduler.timesteps) - 1:
            return (x - (1 - BARS[t]).sqrt() * output) / BARS[t].sqrt()
        x = scheduler.step(output, t, x, **options).prev_sample
    return x


def ours(solver, scheduler):
    """Our samples on their timesteps: the last is where the sample is denoised."""
    grid = Grid((scheduler.timesteps.unique().flip(0).double() + 1) / 1000)
    return fastsde.sample(MODEL, x_init=START, solver=solver, controller=grid).samples


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim(their_noise, eta):
    # Their step goes to t - 1000 // steps, which is the next timestep only with leading spacing.
    scheduler = build("DDIM", 12, timestep_spacing="leading", clip_sample=False)
    torch.testing.assert_close(ours(DDIM(eta=eta), scheduler), loop(scheduler, eta=eta), **EXACT)


@pytest.mark.parametrize(("variance_type", "posterior"), [("fixed_small", True), ("fixed_large", False)])
def test_ddpm(their_noise, variance_type, posterior):
    scheduler = build("DDPM", 12, timestep_spacing="leading", clip_sample=False, variance_type=variance_type)
    torch.testing.assert_close(ours(Ancestral(posterior=posterior), scheduler), loop(scheduler), **EXACT)


def test_euler_is_ddim():
    scheduler = build("EulerDiscrete", 12, timestep_spacing="leading")
    torch.testing.assert_close(ours(DDIM(), scheduler), loop(scheduler, in_y=True), **ROUNDED)


def test_euler_ancestral(their_noise):
    scheduler = build("EulerAncestralDiscrete", 12, timestep_spacing="leading")
    torch.testing.assert_close(ours(Ancestral(), scheduler), loop(scheduler, in_y=True), **ROUNDED)


def test_heun():
    scheduler = build("HeunDiscrete", 12, timestep_spacing="leading")
    torch.testing.assert_close(ours(Heun(), scheduler), loop(scheduler, in_y=True), **EXACT)


@pytest.mark.parametrize(
    # Not the third order of the SDE: in its last term they have -0.5 in the place of +0.5 (0.42.1); with that
    # changed, the difference is 2e-8.
    ("algorithm", "order"),
    [("dpmsolver++", 1), ("dpmsolver++", 2), ("dpmsolver++", 3), ("sde-dpmsolver++", 1), ("sde-dpmsolver++", 2)],
)
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_dpm_solver_multistep(their_noise, algorithm, order, spacing):
    scheduler = build(
        "DPMSolverMultistep",
        12,
        algorithm_type=algorithm,
        solver_order=order,
        timestep_spacing=spacing,
        lower_order_final=False,  # else the last steps of fewer than 15 have lower orders
    )
    solver = DPMSolverPP(order=order, eta=float("sde" in algorithm))
    torch.testing.assert_close(ours(solver, scheduler), loop(scheduler), **ROUNDED)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_unipc(order, spacing):
    # With lower_order_final the step before the last has at most order 2; without, the last one divides by 0.
    scheduler = build("UniPCMultistep", 12, solver_order=order, timestep_spacing=spacing, lower_order_final=order < 3)
    torch.testing.assert_close(ours(UniPC(order=order), scheduler), loop(scheduler, finish=order < 3), **EXACT)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_deis(order, spacing):
    # Their last step goes to level 0, not to the denoised sample.
    scheduler = build("DEISMultistep", 12, solver_order=order, timestep_spacing=spacing, lower_order_final=False)
    torch.testing.assert_close(ours(DEIS(order=order), scheduler), loop(scheduler, finish=False), **EXACT)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_sa_solver_coefficients(tau, order):
    # Of their steps, orders 1, 3 and 4 have these; at order 2, also in the warm-up, they put c h^2 / 2 in the place of
    # the first moment, so that whole samples differ.
    scheduler = diffusers.SASolverScheduler()
    lam = vector(-1.2, -0.7, -0.5, 0.1, 0.4)[-order - 1 :].flip(0)  # the end of the step, now, and before
    coefficients = scheduler.get_coefficients_fn(order, lam[1], lam[0], list(lam[1:]), torch.tensor(tau).double())
    # Their factor (1 + tau^2) sigma e^{-tau^2 lam} at the end, over alpha.
    c = 1 + tau**2
    expected = c * (-c * lam[0]).exp() * torch.stack(coefficients)
    h = lam[0] - lam[1]
    nodes = ((lam[2:] - lam[1]) / h)[None]
    weights = adams_weights(c * h[None], nodes, torch.tensor([order - 1]), lambda m_0, m: m)
    # Their closed forms cancel: moments of e^{c lam} lam^j divided by products of differences of 0.2; measured 5e-15.
    torch.testing.assert_close(weights[0], expected, rtol=1e-12, atol=1e-12)
