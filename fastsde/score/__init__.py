"""Score models: how to read a network, guidance, measurements, and exact models with known scores."""

from fastsde.score.analytic import DatasetScore, GaussianScore, MixtureScore
from fastsde.score.base import Prediction, ScoreModel, Wrapper
from fastsde.score.guidance import ClassifierFreeGuidance, ClassifierGuidance, Clipped
from fastsde.score.inverse import DPS, MMPS, PiGDM, Projection
from fastsde.score.operators import Grayscale, Linear, LinearOperator, Mask

__all__ = [
    "DPS",
    "MMPS",
    "ClassifierFreeGuidance",
    "ClassifierGuidance",
    "Clipped",
    "DatasetScore",
    "GaussianScore",
    "Grayscale",
    "Linear",
    "LinearOperator",
    "Mask",
    "MixtureScore",
    "PiGDM",
    "Prediction",
    "Projection",
    "ScoreModel",
    "Wrapper",
]
