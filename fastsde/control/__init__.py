"""Controllers: which step comes next, per sample."""

from fastsde.control.adaptive import Adaptive
from fastsde.control.adaptive_grid import AdaptiveGrid
from fastsde.control.base import Controller, Decision, Verdict
from fastsde.control.grid import Grid

__all__ = ["Adaptive", "AdaptiveGrid", "Controller", "Decision", "Grid", "Verdict"]
