"""The protocol of an additive change Δ of a weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Operator"]


class Operator(ABC):
    """A linear operator Δ of shape (out, in).

    Laws, checked for every operator in float64, forward and backward:
        ``apply(x)`` is ``x @ dense().T``; ``rows(ids)`` is ``dense().T[ids]``;
        ``factors()``, if given, is (up, down) with ``up @ down`` equal to ``dense()``;
        the backward of ``apply`` saves nothing of the size of ``dense()``.
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
        """Δ written out, (out, in): for merging and for tests, never for training."""

    @abstractmethod
    def to(self, dtype: torch.dtype) -> Self:
        """The same operator with its parts in ``dtype``; gradients flow back through the cast."""

    def rows(self, ids: Tensor) -> Tensor:
        """Δᵀ at the rows ``ids``: (…) → (…, out), as an embedding reads it."""
        return self.dense().T[ids]

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(up, down) of shapes (out, r) and (r, in) if Δ is their product, else ``None``."""
        return None
