"""Δ stored as a full matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .delta import Delta

__all__ = ["Dense"]


@dataclass(frozen=True, eq=False)
class Dense(Delta):
    """Δ = matrix, (out, in): itself a trained tensor, or a small one (a norm's weight is a matrix (dim, 1))."""

    matrix: Tensor

    def apply(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix)

    def dense(self) -> Tensor:
        return self.matrix
