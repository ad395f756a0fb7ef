"""Operators composed of others: sums, products, and Δ between two rotations or weighted per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from ..errors import PeanutError
from .delta import Delta
from .low_rank import LowRank
from .rotation import Diagonal, Rotation

__all__ = ["Between", "Chain", "Gated", "Scaled", "Sum", "chain", "gated", "scaled", "total"]


@dataclass(frozen=True, eq=False)
class Sum(Delta):
    """Δ₁ + Δ₂ + …, each applied in its own way."""

    terms: tuple[Delta, ...]

    def apply(self, x: Tensor) -> Tensor:
        return reduce(torch.add, (term.apply(x) for term in self.terms))

    def joined(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        first, *others = self.terms
        return reduce(torch.add, (term.apply(x) for term in others), first.joined(x, weight, bias))

    def beside(self, x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
        return reduce(torch.add, (term.beside(x, y, bias) for term in self.terms))

    def rows(self, ids: Tensor) -> Tensor:
        return reduce(torch.add, (term.rows(ids) for term in self.terms))

    def dense(self) -> Tensor:
        return reduce(torch.add, (term.dense() for term in self.terms))


@dataclass(frozen=True, eq=False)
class Gated(Delta):
    """gate ⊙ Δ x, gate (…, 1) with the shape of x before its last: each token has a Δ of its own."""

    inner: Delta
    gate: Tensor

    def apply(self, x: Tensor) -> Tensor:
        return self.inner.apply(x) * self.gate.to(x.dtype)

    def rows(self, ids: Tensor) -> Tensor:
        rows = self.inner.rows(ids)
        return rows * self.gate.to(rows.dtype)

    def dense(self) -> Tensor:
        raise PeanutError("the weight of a layer that has another one for each token", "a single expert", "name one")


@dataclass(frozen=True, eq=False)
class Scaled(Delta):
    """c Δ for a number c."""

    inner: Delta
    factor: float

    def apply(self, x: Tensor) -> Tensor:
        return self.inner.apply(x) * self.factor

    def rows(self, ids: Tensor) -> Tensor:
        return self.inner.rows(ids) * self.factor

    def dense(self) -> Tensor:
        return self.inner.dense() * self.factor


@dataclass(frozen=True, eq=False)
class Between(Delta):
    """L · Δ · S, either side optional: what is left of a Δ to add where L and the gains S are merged."""

    left: Rotation | None
    inner: Delta
    in_scale: Rotation | None

    def apply(self, x: Tensor) -> Tensor:
        y = self.inner.apply(x if self.in_scale is None else self.in_scale.apply(x))
        return y if self.left is None else self.left.apply(y)

    def dense(self) -> Tensor:
        matrix = self.inner.dense()
        if self.left is not None:
            matrix = self.left.apply(matrix.T).T
        return matrix if self.in_scale is None else self.in_scale.times(matrix)


@dataclass(frozen=True, eq=False)
class Chain(Rotation):
    """R₁ R₂ …, a product of square operators: the last acts on the input first."""

    links: tuple[Rotation, ...]

    def apply(self, x: Tensor) -> Tensor:
        for link in reversed(self.links):
            x = link.apply(x)
        return x

    def times(self, weight: Tensor) -> Tensor:
        for link in self.links:
            weight = link.times(weight)
        return weight

    def dense(self) -> Tensor:
        return reduce(torch.matmul, (link.dense() for link in self.links))


def gated(delta: Delta, gate: Tensor) -> Delta:
    """gate ⊙ Δ x, gate (…, 1) with the shape of x before its last: an expert of a mixture, weighted token by token."""
    return delta.gated(gate) if isinstance(delta, LowRank) else Gated(delta, gate)


def scaled(delta: Delta, factor: float) -> Delta:
    """c Δ: low-rank still, if Δ is."""
    return replace(delta, scaling=delta.scaling * factor) if isinstance(delta, LowRank) else Scaled(delta, factor)


def total(deltas: Sequence[Delta]) -> Delta | None:
    """Σ Δ as one operator, ``None`` for none: low-rank ones side by side as one of them."""
    if len(deltas) < 2:
        return deltas[0] if deltas else None
    low_rank = [delta for delta in deltas if isinstance(delta, LowRank)]
    alike = len({delta.gate is None for delta in low_rank}) == 1
    return LowRank.sum(low_rank) if alike and len(low_rank) == len(deltas) else Sum(tuple(deltas))


def chain(links: Sequence[Rotation]) -> Rotation | None:
    """The product of square operators as one, ``None`` for none: gains multiplied."""
    if len(links) < 2:
        return links[0] if links else None
    gains = [link.gain for link in links if isinstance(link, Diagonal)]
    return Diagonal(torch.stack(gains).prod(0)) if len(gains) == len(links) else Chain(tuple(links))
