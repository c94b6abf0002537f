"""Solvers: one small file each. `SOLVERS` is the list behind the solver table and the command line."""

from fastsde.solvers.base import Solver, Step
from fastsde.solvers.ddim import DDIM
from fastsde.solvers.euler_maruyama import EulerMaruyama
from fastsde.solvers.exponential import ExponentialPC
from fastsde.solvers.extrapolated import ExtrapolatedEM

SOLVERS: tuple[type[Solver], ...] = (ExtrapolatedEM, ExponentialPC, DDIM, EulerMaruyama)

__all__ = ["DDIM", "SOLVERS", "EulerMaruyama", "ExponentialPC", "ExtrapolatedEM", "Solver", "Step"]
