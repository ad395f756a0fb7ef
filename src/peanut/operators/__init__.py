"""Linear operators on weights: applied to activations, written out densely, with a backward that saves little."""

from .low_rank import LowRank
from .operator import Operator

__all__ = ["LowRank", "Operator"]
