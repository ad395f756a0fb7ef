"""Δ that is zero but at fixed places."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .built import Built

__all__ = ["Sparse"]


@dataclass(frozen=True)
class Sparse(Built):
    """Δ[places[0, k], places[1, k]] = values[k], and zero elsewhere; values alone have a gradient.

    One product with W + Δ beats a sparse product at every density that adapters use, so Δ is built.

    Args:
        values: (n).
        places: rows and columns, (2, n), integers, no place twice.
        size: (out, in).
    """

    values: Tensor
    places: Tensor
    size: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    def parts(self) -> tuple[Tensor, ...]:
        return (self.values,)

    def dense(self) -> Tensor:
        return self.onto(self.values.new_zeros(self.size))

    def onto(self, weight: Tensor) -> Tensor:
        rows, columns = self.places.long().unbind()
        out, inputs = self.size
        if weight.T.is_contiguous():  # the sum keeps the layout, so that its products are those of the weight
            flat = weight.T.reshape(-1).scatter_add(0, columns * out + rows, self.values)
            return flat.view(inputs, out).T
        return weight.reshape(-1).scatter_add(0, rows * inputs + columns, self.values).view(self.size)

    def pull(self, grad: Tensor) -> tuple[Tensor, ...]:
        rows, columns = self.places.long().unbind()
        return (grad.reshape(-1)[rows * self.size[1] + columns],)
