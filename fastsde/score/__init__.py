"""Score models: how to read a network, guidance, and exact models with known scores."""

from fastsde.score.analytic import DatasetScore, GaussianScore, MixtureScore
from fastsde.score.base import Prediction, ScoreModel, Wrapper
from fastsde.score.guidance import ClassifierFreeGuidance, ClassifierGuidance, Clipped

__all__ = [
    "ClassifierFreeGuidance",
    "ClassifierGuidance",
    "Clipped",
    "DatasetScore",
    "GaussianScore",
    "MixtureScore",
    "Prediction",
    "ScoreModel",
    "Wrapper",
]
