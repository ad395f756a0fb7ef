"""Operators for inference: matrices that speed up small batches are computed once and reused."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .delta import Delta, captured

__all__ = ["FEW", "Evaluated", "WrittenOut", "few_tokens"]

FEW = 64
"""The most tokens for which precomputed matrices are used."""


@dataclass(frozen=True, eq=False)
class Evaluated(Delta):
    """An operator in evaluation: few tokens use precomputed matrices, many are computed as in training.

    Args:
        origin: the operator, in the dtype of the tokens.
    """

    origin: Delta

    @property
    def few(self) -> int:
        """The most tokens for which the precomputed matrices are used."""
        return FEW

    @abstractmethod
    def answer(self, tokens: Tensor) -> Tensor:
        """Δ on few tokens: (tokens, in) → (tokens, out)."""

    def apply(self, x: Tensor) -> Tensor:
        if not few_tokens(x, self.few):
            return self.origin.apply(x)
        y = self.answer(x.reshape(-1, x.shape[-1]))
        return y.view(*x.shape[:-1], y.shape[-1])

    def joined(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not few_tokens(x, self.few):
            return self.origin.joined(x, weight, bias)
        return F.linear(x, weight, bias).add_(self.apply(x))

    def dense(self) -> Tensor:
        return self.origin.dense()

    def to(self, dtype: torch.dtype) -> Evaluated:
        return self  # it was made for that dtype


@dataclass(frozen=True, eq=False)
class WrittenOut(Evaluated):
    """Caches W + Δ from the first small batch until a large one: for a Δ that nothing smaller than W represents.

    Generation computes one token at a time; to build W + Δ for each would cost many times the product with it. In
    16 bits W + Δ would round most of a small Δ away, so there Δ is stored separately.
    """

    held: dict[int, tuple[Tensor | None, Tensor]] = field(default_factory=dict, repr=False)
    """By the identity of W: W itself, so that no other tensor has it, and W + Δ (of no W: Δ)."""

    def answer(self, tokens: Tensor) -> Tensor:
        return F.linear(tokens, self._hold(None))

    def apply(self, x: Tensor) -> Tensor:
        if not few_tokens(x):
            self.held.clear()
        return super().apply(x)

    def joined(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not few_tokens(x):
            self.held.clear()
        elif torch.finfo(weight.dtype).bits >= 32:
            return F.linear(x, self._hold(weight), bias)
        return super().joined(x, weight, bias)

    def _hold(self, weight: Tensor | None) -> Tensor:
        found = self.held.get(id(weight))
        if found is None:
            found = weight, self.origin.dense() if weight is None else self.origin.onto(weight)
            self.held.clear()
            self.held[id(weight)] = found
        return found[1]


def few_tokens(x: Tensor, most: int = FEW) -> bool:
    """Whether x, (…, in), has at most ``most`` tokens; false in graphs and transforms, which must serve any number."""
    return not captured() and 0 < x.numel() <= most * x.shape[-1]
