"""Δ that changes the rows of some tokens in an embedding or a tied head; the operator of trainable tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .delta import Delta, transformed

__all__ = ["Rows"]


@dataclass(frozen=True, eq=False)
class Rows(Delta):
    """What is added to the vectors of n tokens of a vocabulary.

    On an embedding Δ is (dim, vocabulary), its columns at ``ids`` being ``vectors``; on a head it is the transpose.

    Args:
        vectors: (n, dim).
        ids: the tokens, (n) integers, none twice.
        vocabulary: number of tokens.
        head: whether Δ is that of a head, (vocabulary, dim).
    """

    vectors: Tensor
    ids: Tensor
    vocabulary: int
    head: bool = False

    def apply(self, x: Tensor) -> Tensor:
        if not self.head:
            return x[..., self.ids] @ self.vectors
        scores = F.linear(x, self.vectors)
        return scores.new_zeros(*x.shape[:-1], self.vocabulary).index_copy(-1, self.ids, scores)

    def joined(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (W + Δ)ᵀ + b; on a head the scores of its tokens alone are added to, in place."""
        if not self.head or transformed():
            return F.linear(x, weight, bias) + self.apply(x)
        tokens = x.reshape(-1, x.shape[-1])
        y = F.linear(tokens, weight, bias).index_add_(-1, self.ids, F.linear(tokens, self.vectors))
        return y.view(*x.shape[:-1], y.shape[-1])

    def rows(self, ids: Tensor) -> Tensor:
        if self.head:
            return self.dense().T[ids]
        known, order = self.ids.sort()
        place = torch.searchsorted(known, ids.to(known.dtype)).clamp_(max=len(known) - 1)
        return torch.where((known[place] == ids).unsqueeze(-1), F.embedding(order[place], self.vectors), 0)

    def dense(self) -> Tensor:
        matrix = self.vectors.new_zeros(self.vocabulary, self.vectors.shape[1]).index_copy(0, self.ids, self.vectors)
        return matrix if self.head else matrix.T
