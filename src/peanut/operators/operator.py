"""The protocol of a linear operator on activations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Operator", "gained"]


class Operator(ABC):
    """A linear operator Δ of shape (out, in): an additive change of a weight, or a rotation of its input.

    Laws, checked for every operator in float64, forward and backward:
        ``apply(x)`` is ``x @ dense().T``; ``rows(ids)`` is ``dense().T[ids]``;
        ``weighted(x, g)`` is ``apply(x) * g``; ``beside(x, x @ W.T + b, b)`` is ``apply(x)``;
        ``joined(x, W, b)`` is ``x @ (W + dense()).T + b`` for a frozen W;
        ``turned(x, W, b, g)`` is ``x @ (W @ dense()).T * g + b`` for a rotation and a frozen W;
        ``factors()``, if given, is (up, down) with ``up @ down`` equal to ``dense()``;
        the backward of ``apply`` and ``joined`` saves nothing of the size of ``dense()``.
    An operator without one matrix (of each sample, of each token) has no ``dense`` and no ``rows``, and raises there.
    """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """Δ on activations: (…, in) → (…, out)."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Δ written out, (out, in): for merging and for tests, never kept in training."""

    @abstractmethod
    def to(self, dtype: torch.dtype) -> Self:
        """The same operator with its parts in ``dtype``; gradients flow back through the cast."""

    def beside(self, x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
        """Δ x where y = W x + b, what the layer itself answers, is there already: ``apply`` unless Δ is made of it."""
        return self.apply(x)

    def weighted(self, x: Tensor, gate: Tensor) -> Tensor:
        """gate ⊙ Δ x, gate (…, 1): what a mixture makes of an expert, token by token."""
        return self.apply(x) * gate

    def joined(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (W + Δ)ᵀ + b for a frozen W (out, in), in whatever order of products is cheapest: (…, in) → (…, out)."""
        return F.linear(x, weight, bias) + self.apply(x)

    def onto(self, weight: Tensor) -> Tensor:
        """W + Δ, a new tensor."""
        return weight + self.dense()

    def rotated(self, weight: Tensor) -> Tensor:
        """W · R for a rotation R of the input: (out, in) → (out, in)."""
        return weight @ self.dense()

    def turned(self, x: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor | None = None) -> Tensor:
        """g ⊙ (x Rᵀ) Wᵀ + b for a rotation R of the input and a frozen W (out, in), in one go: (…, in) → (…, out).

        A gain of one leaves the bits of the product with the bias in it.
        """
        return gained(F.linear(self.apply(x), weight, bias), bias, gain)

    def beyond_identity(self) -> tuple[Tensor, Tensor] | None:
        """(up, down) of shapes (in, r) and (r, in) if a rotation R is I + up · down, else ``None``."""
        return None

    def rows(self, ids: Tensor) -> Tensor:
        """Δᵀ at the rows ``ids``: (…) → (…, out), as an embedding reads it."""
        return self.dense().T[ids]

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(up, down) of shapes (out, r) and (r, in) if Δ is their product, else ``None``."""
        return None

    def settled(self, dtype: torch.dtype) -> Operator:
        """The same operator, without gradients, as it answers one token of dtype ``dtype`` fastest.

        Called once and kept while nothing changes, for evaluation; so what can be computed beforehand is.
        """
        return self.to(dtype)


def gained(y: Tensor, bias: Tensor | None, gain: Tensor | None) -> Tensor:
    """g ⊙ (y − b) + b, which is y to the bit where the gain is one."""
    return y if gain is None else y + (y if bias is None else y - bias) * (gain - 1).to(y.dtype)
