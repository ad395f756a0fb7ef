"""``Rotation``: the interface of a square operator on one side of a weight; and ``Diagonal``, a scale per feature."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .operator import Operator

__all__ = ["Diagonal", "Rotation"]


class Rotation(Operator, ABC):
    """A square operator on one side of a weight: W' = W R on a layer's input, or W' = L W on its output.

    Mostly a rotation, from which it has its name; a gain is the diagonal case. An author writes the abstract two.

    Laws, checked for every operator in float64, forward and backward:
        ``apply(x)`` is ``x @ dense().T``; ``times(W)`` is ``W @ dense()``;
        ``turned(x, W, b)`` is ``apply(x) @ W.T + b`` for a frozen W;
        ``beyond_identity()``, if given, is (up, down) with ``I + up @ down`` equal to ``dense()``.
    """

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """x Rᵀ, R on activations: (…, width) → (…, width)."""

    @abstractmethod
    def dense(self) -> Tensor:
        """R as a matrix, (width, width)."""

    def times(self, weight: Tensor) -> Tensor:
        """W R for W (…, width)."""
        return weight @ self.dense()

    def turned(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(x Rᵀ) Wᵀ + b for a frozen W (out, width), in whatever order of products is cheapest."""
        return F.linear(self.apply(x), weight, bias)

    def beyond_identity(self) -> tuple[Tensor, Tensor] | None:
        """(up, down) of shapes (width, r) and (r, width) if R is I + up · down, else ``None``."""
        return None


@dataclass(frozen=True, eq=False)
class Diagonal(Rotation):
    """R = diag(gain), gain (width): (IA)³'s and RED's gains of a layer's outputs.

    The gain stays in its own dtype: in 16 bits 1.003 is 1, and 0.003 is 0.003.
    """

    gain: Tensor

    def apply(self, x: Tensor) -> Tensor:
        if torch.finfo(x.dtype).bits < 32:
            return torch.addcmul(x, x, (self.gain - 1).to(x.dtype))
        return x * self.gain.to(x.dtype)

    def times(self, weight: Tensor) -> Tensor:
        return self.apply(weight)

    def dense(self) -> Tensor:
        return torch.diag(self.gain)

    def to(self, dtype: torch.dtype) -> Diagonal:
        return self
