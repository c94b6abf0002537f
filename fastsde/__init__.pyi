from . import kdiffusion, latent, score, tokens
from .api import encode, sample
from .chains import langevin
from .checkpoints import pretrained
from .control import Adaptive, AdaptiveGrid, Controller, Grid
from .diagnosis import Diagnosis, diagnose
from .diffusers import from_diffusers, sample_pipeline
from .diffusers.live import PipelineSampler
from .fitting import fit
from .integration import integrate
from .job import EngineState
from .lane import Request
from .likelihood import Likelihood, log_likelihood
from .live import Sampler, SamplerFullError, SamplerStats
from .ode import ProbabilityFlowODE
from .result import (
    DataRangeWarning,
    Interrupted,
    RepeatedSeedWarning,
    SampleResult,
    SamplingError,
    Status,
    Trajectory,
)
from .score.base import Prediction, ScoreModel
from .sde.base import SDE
from .sde.discrete import DiscreteVPSDE
from .sde.edm import EDM
from .sde.flow import RectifiedFlow
from .sde.ve import VESDE
from .sde.vp import VPSDE, SubVPSDE
from .solvers import (
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

__version__: str

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
    "PipelineSampler",
    "Prediction",
    "PredictorCorrector",
    "ProbabilityFlow",
    "ProbabilityFlowODE",
    "RectifiedFlow",
    "RepeatedSeedWarning",
    "Request",
    "Resampling",
    "ReverseDiffusion",
    "SASolver",
    "SampleResult",
    "Sampler",
    "SamplerFullError",
    "SamplerStats",
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
    "latent",
    "log_likelihood",
    "pretrained",
    "sample",
    "sample_pipeline",
    "score",
    "tokens",
]
