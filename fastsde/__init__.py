"""fastsde: samples from pretrained diffusion models, with no schedule to tune."""

from fastsde import kdiffusion, score
from fastsde.api import encode, sample
from fastsde.control import Adaptive, AdaptiveGrid, Controller, Grid
from fastsde.diagnosis import Diagnosis, diagnose
from fastsde.diffusers import from_diffusers, sample_pipeline
from fastsde.fitting import fit
from fastsde.integrate import integrate
from fastsde.job import EngineState
from fastsde.langevin import langevin
from fastsde.likelihood import Likelihood, log_likelihood
from fastsde.ode import ProbabilityFlowODE
from fastsde.pretrained import pretrained
from fastsde.result import (
    DataRangeWarning,
    Interrupted,
    RepeatedSeedWarning,
    SampleResult,
    SamplingError,
    Status,
    Trajectory,
)
from fastsde.score.base import Prediction, ScoreModel
from fastsde.sde.base import SDE
from fastsde.sde.discrete import DiscreteVPSDE
from fastsde.sde.edm import EDM
from fastsde.sde.flow import RectifiedFlow
from fastsde.sde.sub_vp import SubVPSDE
from fastsde.sde.ve import VESDE
from fastsde.sde.vp import VPSDE
from fastsde.solvers import (
    DDIM,
    DEIS,
    DORMAND_PRINCE,
    EULER,
    HEUN,
    MALA,
    RK4,
    SOLVERS,
    Ancestral,
    AnnealedLangevin,
    ConsistentAnnealed,
    DPMSolverPP,
    EulerMaruyama,
    ExponentialPC,
    ExtrapolatedEM,
    FittedSolver,
    Heun,
    Langevin,
    LangevinDynamics,
    PredictorCorrector,
    ProbabilityFlow,
    Resampling,
    ReverseDiffusion,
    SASolver,
    Solver,
    Tableau,
    UniPC,
)

__version__ = "0.1.0"

__all__ = [
    "DDIM",
    "DEIS",
    "DORMAND_PRINCE",
    "EDM",
    "EULER",
    "HEUN",
    "MALA",
    "RK4",
    "SDE",
    "SOLVERS",
    "VESDE",
    "VPSDE",
    "Adaptive",
    "AdaptiveGrid",
    "Ancestral",
    "AnnealedLangevin",
    "ConsistentAnnealed",
    "Controller",
    "DPMSolverPP",
    "DataRangeWarning",
    "Diagnosis",
    "DiscreteVPSDE",
    "EngineState",
    "EulerMaruyama",
    "ExponentialPC",
    "ExtrapolatedEM",
    "FittedSolver",
    "Grid",
    "Heun",
    "Interrupted",
    "Langevin",
    "LangevinDynamics",
    "Likelihood",
    "Prediction",
    "PredictorCorrector",
    "ProbabilityFlow",
    "ProbabilityFlowODE",
    "RectifiedFlow",
    "RepeatedSeedWarning",
    "Resampling",
    "ReverseDiffusion",
    "SASolver",
    "SampleResult",
    "SamplingError",
    "ScoreModel",
    "Solver",
    "Status",
    "SubVPSDE",
    "Tableau",
    "Trajectory",
    "UniPC",
    "diagnose",
    "encode",
    "fit",
    "from_diffusers",
    "integrate",
    "kdiffusion",
    "langevin",
    "log_likelihood",
    "pretrained",
    "sample",
    "sample_pipeline",
    "score",
]
