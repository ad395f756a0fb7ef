"""Linear operators: updates Δ of a weight and rotations, with fast passes and a backward that saves little memory."""

from .compose import Between, Chain, Gated, Sum, chain, gated, total
from .delta import Delta
from .dense import Dense
from .low_rank import LowRank
from .per_sample import PerSample
from .rotation import Diagonal, Rotation

__all__ = [
    "Between",
    "Chain",
    "Delta",
    "Dense",
    "Diagonal",
    "Gated",
    "LowRank",
    "PerSample",
    "Rotation",
    "Sum",
    "chain",
    "gated",
    "total",
]
