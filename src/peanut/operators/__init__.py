"""Linear operators on weights: applied to activations, written out densely, with a backward that saves little."""

from .compose import Chain, Gained, Sum
from .dense import Dense
from .low_rank import LowRank
from .operator import Operator
from .per_sample import PerSample
from .per_token import PerToken
from .spectrum import effective_rank, singular_values

__all__ = [
    "Chain",
    "Dense",
    "Gained",
    "LowRank",
    "Operator",
    "PerSample",
    "PerToken",
    "Sum",
    "effective_rank",
    "singular_values",
]
