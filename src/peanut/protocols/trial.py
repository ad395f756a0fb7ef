"""What a method is tried on where nobody has written a config for it: by the benchmark and the table of methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Trial"]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A model, or a stack of layers, as far as a config has to know it.

    Args:
        shapes: (out, in) of the weights that may be changed.
        feed_forward: names of the layers among them that end a feed-forward part.
        blocks: how many blocks there are.
        tokens: how many virtual tokens to put in, or tokens to train.
        causal: whether it is a causal language model.
        biases: whether its layers have biases.
        head: whether it has a head that is trained whole.
    """

    shapes: Sequence[Sequence[int]] = ()
    feed_forward: Sequence[str] = ()
    blocks: int = 1
    tokens: int = 16
    causal: bool = False
    biases: bool = True
    head: bool = False

    def divisor(self, size: int) -> int:
        """The largest divisor of ``size`` that divides every width too."""
        return math.gcd(size, *(width for shape in self.shapes for width in shape))
