"""Solvers: one small file each. `SOLVERS` is the list behind the solver table and the command line."""

from fastsde.solvers.ancestral import Ancestral
from fastsde.solvers.annealed_langevin import AnnealedLangevin
from fastsde.solvers.base import Solver, Step
from fastsde.solvers.consistent_annealed import ConsistentAnnealed
from fastsde.solvers.ddim import DDIM
from fastsde.solvers.deis import DEIS
from fastsde.solvers.dpm_solver_pp import DPMSolverPP
from fastsde.solvers.euler_maruyama import EulerMaruyama
from fastsde.solvers.exponential import ExponentialPC
from fastsde.solvers.extrapolated import ExtrapolatedEM
from fastsde.solvers.fitted import FittedSolver
from fastsde.solvers.heun import Heun
from fastsde.solvers.langevin import MALA, Corrector, Langevin, LangevinDynamics
from fastsde.solvers.predictor_corrector import PredictorCorrector
from fastsde.solvers.probability_flow import ProbabilityFlow
from fastsde.solvers.resampling import Resampling
from fastsde.solvers.reverse_diffusion import ReverseDiffusion
from fastsde.solvers.sa_solver import SASolver
from fastsde.solvers.tableaus import DORMAND_PRINCE, EULER, HEUN, RK4, Tableau
from fastsde.solvers.unipc import UniPC

SOLVERS: tuple[type[Solver], ...] = (
    ExtrapolatedEM,
    ExponentialPC,
    DDIM,
    DPMSolverPP,
    UniPC,
    DEIS,
    SASolver,
    ProbabilityFlow,
    Heun,
    EulerMaruyama,
    ReverseDiffusion,
    Ancestral,
    PredictorCorrector,
    AnnealedLangevin,
    ConsistentAnnealed,
    Resampling,
)

__all__ = [
    "DDIM",
    "DEIS",
    "DORMAND_PRINCE",
    "EULER",
    "HEUN",
    "MALA",
    "RK4",
    "SOLVERS",
    "Ancestral",
    "AnnealedLangevin",
    "ConsistentAnnealed",
    "Corrector",
    "DPMSolverPP",
    "EulerMaruyama",
    "ExponentialPC",
    "ExtrapolatedEM",
    "FittedSolver",
    "Heun",
    "Langevin",
    "LangevinDynamics",
    "PredictorCorrector",
    "ProbabilityFlow",
    "Resampling",
    "ReverseDiffusion",
    "SASolver",
    "Solver",
    "Step",
    "Tableau",
    "UniPC",
]
