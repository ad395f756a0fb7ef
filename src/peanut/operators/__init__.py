"""Linear operators: updates Δ of a weight and rotations, with fast passes and a backward that saves little memory."""

from .compose import Between, chain, gated, scaled, total
from .delta import Delta
from .dense import Dense
from .low_rank import LowRank
from .per_sample import PerSample
from .rotation import Diagonal, Rotation

__all__ = [
    "Between",
    "Delta",
    "Dense",
    "Diagonal",
    "LowRank",
    "PerSample",
    "Rotation",
    "chain",
    "gated",
    "scaled",
    "total",
]
