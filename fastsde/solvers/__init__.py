"""Solvers: one small file each. `SOLVERS` is the list behind the solver table and the command line."""

from fastsde.solvers.base import Solver, Step
from fastsde.solvers.euler_maruyama import EulerMaruyama
from fastsde.solvers.extrapolated import ExtrapolatedEM

SOLVERS: tuple[type[Solver], ...] = (ExtrapolatedEM, EulerMaruyama)

__all__ = ["SOLVERS", "EulerMaruyama", "ExtrapolatedEM", "Solver", "Step"]
