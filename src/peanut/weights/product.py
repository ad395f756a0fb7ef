"""W Aᵀ, which weight-aware methods read: the one part of a step that costs as much as more tokens would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..versions import counted, version

__all__ = ["Products", "product"]


class Products:
    """The products of one frozen matrix with trained A, each made once while it is certain that A is what it was.

    That is so within a backward (gradient checkpointing runs the forward again there), and from one backward to the
    next while A's version and its gradient's tell that nothing happened but that gradients were added up. An optimizer
    that writes behind torch's back is found out by the gradient, which it leaves to be zeroed or taken away.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[int, bool], _Made] = {}

    def of(self, weight: Tensor, read: Callable[[], Tensor], A: Tensor, *, view: bool, transposed: bool) -> Tensor:
        """M Aᵀ for M (e, d), read in its own dtype and never copied to another, and A (r, d): (e, r), in A's dtype.

        Args:
            weight: what the layer keeps of M.
            read: gives M.
            A: what M is multiplied with.
            view: M is a view of ``weight``, which the backward may hold; else it is made of codes, there once more.
            transposed: M is the transpose of the layer's matrix.
        """
        if torch.compiler.is_compiling() or weight.requires_grad:
            return product(read(), A)
        if not (A.is_leaf and A.requires_grad and counted(A) and counted(weight)):
            if view or not A.requires_grad:
                return product(read(), A)
            made = _Made(weight, A, product(read(), A.detach()))
        else:
            place = A.data_ptr(), transposed
            found = self._made.get(place)
            if found is None or not found.holds(weight, A):
                found = self._made[place] = _Made(weight, A, product(read(), A.detach()))
            made = found
        return _Known.apply(A, read() if view else None, read, made)  # type: ignore[no-any-return, no-untyped-call]

    def forget(self) -> None:
        """Lets go of all."""
        self._made.clear()

    def __reduce__(self) -> tuple[type[Products], tuple[()]]:
        return Products, ()  # copies and files begin with none


class _Made:
    """A product, and how to tell whether it is still that of its factors."""

    def __init__(self, weight: Tensor, A: Tensor, value: Tensor) -> None:
        self.A, self.value = A.detach(), value  # A is held, so that no other takes its place in memory
        self.version = version(weight), version(A), A.shape
        self.pulled = 0

    def holds(self, weight: Tensor, A: Tensor) -> bool:
        if self.version != (version(weight), version(A), A.shape):
            return False
        if torch._C._current_graph_task_id() != -1:  # a backward runs
            return True
        # The first gradient is put there, each later one is added in place, and whatever else is done to it counts too.
        return self.pulled > 0 and A.grad is not None and A.grad._version == self.pulled - 1


class _Known(torch.autograd.Function):
    """A product that was made before; keeps the frozen matrix, or how to read it."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, matrix: Tensor | None, read: Callable[[], Tensor], made: _Made) -> Tensor:
        ctx.save_for_backward(matrix)
        ctx.read, ctx.made, ctx.dtype = read, made, A.dtype
        return made.value.view_as(made.value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (matrix,) = ctx.saved_tensors
        if matrix is None:
            matrix = ctx.read()
        ctx.made.pulled += 1
        pulled = matrix.T @ grad.to(matrix.dtype)  # in this order up to a third less time on a CPU
        # Contiguous, as autograd would else copy it when it puts it into A's gradient, and count that as a change.
        return pulled.T.to(ctx.dtype).contiguous(), None, None, None


def product(matrix: Tensor, A: Tensor) -> Tensor:
    """M Aᵀ in A's dtype."""
    return (matrix @ A.to(matrix.dtype).T).to(A.dtype)
