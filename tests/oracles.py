"""What several tests measure against: the processes under test, exact Gaussian moments, regression of orders."""

import math

import numpy as np
import torch

from fastsde import EDM, VESDE, VPSDE, DiscreteVPSDE, RectifiedFlow, ScoreModel, SubVPSDE
from fastsde.noise import StepNoise
from fastsde.score.base import BoundModel

LINEAR_BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
"""The table of DDPM (Ho et al. 2020, sec. 4)."""

SDES = {
    "VESDE": VESDE(),
    "VPSDE": VPSDE(),
    "SubVPSDE": SubVPSDE(),
    "DiscreteVPSDE": DiscreteVPSDE(LINEAR_BETAS),
    "EDM": EDM(),
    "RectifiedFlow": RectifiedFlow(),
}
"""One of each process, with its published constants."""

MILD = {
    "VPSDE": VPSDE(0.5, 3.0, t_min=0.05),
    "SubVPSDE": SubVPSDE(0.5, 3.0, t_min=0.3),
    "VESDE": VESDE(0.5, 3.0, t_min=0.05),
    "RectifiedFlow": RectifiedFlow(t_min=0.2, t_max=0.6),
}
"""Mild ones, so that grids of 8 to 128 steps are already in the asymptotic regime.

With VP's published constants (beta up to 20) or VE's (sigma over four decades) they are not.
"""


def vector(*values):
    """A float64 vector, the form of times and coefficients."""
    return torch.tensor(values, dtype=torch.float64)


def draw(*shape, seed=0):
    """Normals in float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def curved(x, t):
    """A score that is no linear function of x, so that mixed-up arguments show; works on arrays and tensors."""
    return -x / (1 + x * x) - t * x


def curved_model(sde, **options):
    return ScoreModel(lambda x, t: curved(x, t[:, None]), sde, **options)


def point_mass(sde, event=(5,)):
    """Data that are one point, 0.3: the expected denoised sample is always that point, exactly."""
    return ScoreModel(lambda x, t: torch.full_like(x, 0.3), sde, "sample", event_shape=event)


def bind(model, n):
    """The model of a step of n rows."""
    return BoundModel(model, {}, torch.ones(n, dtype=torch.bool))


def flow_map(model, x, first, last):
    """The exact probability flow of Gaussian data between two times: each element keeps its number of deviations."""
    t = torch.tensor([first, last], dtype=torch.float64)
    (a_t, a_s), (s_t, s_s) = model.sde.alpha(t), model.sde.sigma(t)
    m, v = model.mean.double(), model.std.double() ** 2
    return a_s * m + (x - a_t * m) * ((a_s**2 * v + s_s**2) / (a_t**2 * v + s_t**2)).sqrt()


def noted_noise(monkeypatch):
    """A list of the normals of our solvers' steps from now on."""
    noted, z = [], StepNoise.z.fget

    def noting(noise):
        noted.append(z(noise))
        return noted[-1]

    monkeypatch.setattr(StepNoise, "z", property(noting))
    return noted


def assert_independent(z):
    """z with shape (k, d): k draws of d normals each, all of their own.

    Products have a standard error of 1 / sqrt(d), squares of sqrt(2 / d): five and a half of them for some 300 pairs.
    """
    d = z.shape[1]
    error = (z @ z.mT / d - torch.eye(len(z))).abs()
    assert float(error.diagonal().max()) < 5.5 * (2 / d) ** 0.5
    assert float(error.fill_diagonal_(0).max()) < 5.5 / d**0.5


def inside(sde, share):
    """The time at the given share (0 to 1) of the process's range, with shape (1,)."""
    return vector(sde.t_min + share * (sde.t_max - sde.t_min))


def exact_variance(sde, std, t):
    """Variance of x_t for data with standard deviation `std`: alpha^2 std^2 + sigma^2."""
    return sde.alpha(t) ** 2 * std**2 + sde.sigma(t) ** 2


def derivative(function, t):
    """d function / dt, row by row, by automatic differentiation; t has shape (B,)."""
    t = t.clone().requires_grad_()
    # The zero keeps a function that is constant in the graph.
    return torch.autograd.grad((function(t) + 0 * t).sum(), t)[0]


def fitted_order(steps, errors):
    """Slope of -log error against log steps, by least squares."""
    slope, _ = np.polyfit([math.log(n) for n in steps], [math.log(float(e)) for e in errors], 1)
    return -slope


class GivenNoise(StepNoise):
    """Noise for one step by hand: the increment dw over [s, t], and further normals if any."""

    dw = z = None  # plain attributes in the place of the properties

    def __init__(self, dw, t=None, s=None, normals=()):
        self.dw, self.normals = dw, normals
        self.z = dw if t is None else dw / (t - s).sqrt().reshape(-1, *(1,) * (dw.ndim - 1))

    def normal(self, k=0):
        return self.normals[k]
