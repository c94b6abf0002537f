"""A solver fitted to one network from a few samples."""

from fastsde.fitting.api import fit
from fastsde.fitting.price import FEWEST, PRICE

__all__ = ["FEWEST", "PRICE", "fit"]
