"""Linear operators on weights: applied to activations, written out densely, with a backward that saves little."""

from .low_rank import LowRank
from .operator import Operator
from .spectrum import effective_rank, singular_values

__all__ = ["LowRank", "Operator", "effective_rank", "singular_values"]
