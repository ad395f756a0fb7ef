"""Δ = s · up · down with different factors for each sample of a batch; the operator of Poly."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..errors import PeanutError
from .delta import Delta, captured

__all__ = ["PerSample"]


@dataclass(frozen=True, eq=False)
class PerSample(Delta):
    """Δ_i = s · up_i · down_i for sample i, up (batch, out, r), down (batch, r, in); applied as s (x_i down_iᵀ) up_iᵀ.

    x is (batch, …, in); where it has more rows than there are samples, each sample has a run of them. There is no one
    matrix, so ``dense``, and with it ``rows``, is an error.
    """

    up: Tensor
    down: Tensor
    scaling: float = 1.0

    def apply(self, x: Tensor) -> Tensor:
        samples = self.down.shape[0]
        each = x.reshape(samples, -1 if captured() or samples else 0, x.shape[-1])
        return ((each @ self.down.mT * self.scaling) @ self.up.mT).reshape(*x.shape[:-1], self.up.shape[1])

    def dense(self) -> Tensor:
        raise PeanutError(
            "the weight of a layer that has another one for each sample", "one task for all", "see task_ids"
        )
