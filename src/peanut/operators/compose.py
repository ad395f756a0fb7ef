"""Operators made of operators: their sum and their product."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from .operator import Operator

__all__ = ["Chain", "Gained", "Sum"]


@dataclass(frozen=True)
class Sum(Operator):
    """Δ₁ + Δ₂ + …, each applied in its own way."""

    terms: tuple[Operator, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.terms[0].shape

    def apply(self, x: Tensor) -> Tensor:
        return reduce(torch.add, (term.apply(x) for term in self.terms))

    def joined(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        first, *others = self.terms
        return reduce(torch.add, (term.apply(x) for term in others), first.joined(x, weight, bias))

    def rows(self, ids: Tensor) -> Tensor:
        return reduce(torch.add, (term.rows(ids) for term in self.terms))

    def dense(self) -> Tensor:
        return reduce(torch.add, (term.dense() for term in self.terms))

    def to(self, dtype: torch.dtype) -> Sum:
        return Sum(tuple(term.to(dtype) for term in self.terms))

    def settled(self, dtype: torch.dtype) -> Sum:
        return Sum(tuple(term.settled(dtype) for term in self.terms))


@dataclass(frozen=True)
class Chain(Operator):
    """R₁ R₂ …, a product of operators: the last acts on the input first."""

    links: tuple[Operator, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.links[0].shape[0], self.links[-1].shape[1]

    def apply(self, x: Tensor) -> Tensor:
        for link in reversed(self.links):
            x = link.apply(x)
        return x

    def rotated(self, weight: Tensor) -> Tensor:
        for link in self.links:
            weight = link.rotated(weight)
        return weight

    def dense(self) -> Tensor:
        return reduce(torch.matmul, (link.dense() for link in self.links))

    def to(self, dtype: torch.dtype) -> Chain:
        return Chain(tuple(link.to(dtype) for link in self.links))

    def settled(self, dtype: torch.dtype) -> Chain:
        return Chain(tuple(link.settled(dtype) for link in self.links))


@dataclass(frozen=True)
class Gained(Operator):
    """diag(out_scale) · Δ · diag(in_scale), either gain optional."""

    inner: Operator
    out_scale: Tensor | None
    in_scale: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    def apply(self, x: Tensor) -> Tensor:
        y = self.inner.apply(x if self.in_scale is None else x * self.in_scale)
        return y if self.out_scale is None else y * self.out_scale

    def dense(self) -> Tensor:
        matrix = self.inner.dense()
        if self.out_scale is not None:
            matrix = self.out_scale[:, None] * matrix
        return matrix if self.in_scale is None else matrix * self.in_scale

    def to(self, dtype: torch.dtype) -> Gained:
        return self._around(self.inner.to(dtype), dtype)

    def settled(self, dtype: torch.dtype) -> Gained:
        return self._around(self.inner.settled(dtype), dtype)

    def _around(self, inner: Operator, dtype: torch.dtype) -> Gained:
        scales = [None if scale is None else scale.to(dtype) for scale in (self.out_scale, self.in_scale)]
        return Gained(inner, *scales)
