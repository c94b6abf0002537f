"""Score models: how to read a network, and exact models with known scores."""

from fastsde.score.analytic import DatasetScore, GaussianScore, MixtureScore
from fastsde.score.base import Prediction, ScoreModel

__all__ = ["DatasetScore", "GaussianScore", "MixtureScore", "Prediction", "ScoreModel"]
