"""fastsde: samples from pretrained diffusion models, with no schedule to tune."""

from fastsde import score
from fastsde.api import sample
from fastsde.control import Adaptive, Controller, Grid
from fastsde.engine import EngineState
from fastsde.pretrained import pretrained
from fastsde.result import SampleResult, SamplingError, Status
from fastsde.score.base import Prediction, ScoreModel
from fastsde.sde.base import SDE
from fastsde.sde.discrete import DiscreteVPSDE
from fastsde.sde.edm import EDM
from fastsde.sde.flow import RectifiedFlow
from fastsde.sde.sub_vp import SubVPSDE
from fastsde.sde.ve import VESDE
from fastsde.sde.vp import VPSDE
from fastsde.solvers import DDIM, SOLVERS, EulerMaruyama, ExponentialPC, ExtrapolatedEM, Solver

__version__ = "0.1.0"

__all__ = [
    "DDIM",
    "EDM",
    "SDE",
    "SOLVERS",
    "VESDE",
    "VPSDE",
    "Adaptive",
    "Controller",
    "DiscreteVPSDE",
    "EngineState",
    "EulerMaruyama",
    "ExponentialPC",
    "ExtrapolatedEM",
    "Grid",
    "Prediction",
    "RectifiedFlow",
    "SampleResult",
    "SamplingError",
    "ScoreModel",
    "Solver",
    "Status",
    "SubVPSDE",
    "pretrained",
    "sample",
    "score",
]
