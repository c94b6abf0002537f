"""What several tests measure against: the processes under test, exact Gaussian moments, regression of orders."""

import math

import numpy as np
import torch

from fastsde import EDM, VESDE, VPSDE, DiscreteVPSDE, RectifiedFlow, SubVPSDE
from fastsde.noise import StepNoise

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


def vector(*values):
    """A float64 vector, the form of times and coefficients."""
    return torch.tensor(values, dtype=torch.float64)


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
