"""W Aᵀ, which weight-aware methods read: the one part of a step that costs as much as more tokens would."""

from __future__ import annotations

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
        self._made: dict[int, _Made] = {}

    def of(self, matrix: Tensor, A: Tensor) -> Tensor:
        """M Aᵀ for M (e, d), read in its own dtype and never copied to another, and A (r, d): (e, r), in A's dtype."""
        if (
            torch.compiler.is_compiling()
            or not A.is_leaf
            or not A.requires_grad
            or not counted(A)
            or not counted(matrix)
        ):
            return product(matrix, A)
        made = self._made.get(A.data_ptr())
        if made is None or not made.holds(matrix, A):
            with torch.no_grad():
                made = self._made[A.data_ptr()] = _Made(matrix, A, product(matrix, A))
        found: Tensor = _Known.apply(A, matrix, made)  # type: ignore[no-untyped-call]
        return found

    def forget(self) -> None:
        """Lets go of all."""
        self._made.clear()

    def __reduce__(self) -> tuple[type[Products], tuple[()]]:
        return Products, ()  # copies and files begin with none


class _Made:
    """A product, and how to tell whether it is still that of its factors."""

    def __init__(self, matrix: Tensor, A: Tensor, value: Tensor) -> None:
        self.A, self.value = A.detach(), value  # A is held, so that no other takes its place in memory
        self.version = version(matrix), version(A), A.shape
        self.pulled = 0

    def holds(self, matrix: Tensor, A: Tensor) -> bool:
        if self.version != (version(matrix), version(A), A.shape):
            return False
        if torch._C._current_graph_task_id() != -1:  # a backward runs
            return True
        # The first gradient is put there, each later one is added in place, and whatever else is done to it counts too.
        return self.pulled > 0 and A.grad is not None and A.grad._version == self.pulled - 1


class _Known(torch.autograd.Function):
    """A product that was made before; keeps the frozen matrix."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, matrix: Tensor, made: _Made) -> Tensor:
        ctx.save_for_backward(matrix)
        ctx.made, ctx.dtype = made, A.dtype
        return made.value.view_as(made.value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (matrix,) = ctx.saved_tensors
        ctx.made.pulled += 1
        return (grad.to(matrix.dtype).T @ matrix).to(ctx.dtype), None, None


def product(matrix: Tensor, A: Tensor) -> Tensor:
    """M Aᵀ in A's dtype."""
    return (matrix @ A.to(matrix.dtype).T).to(A.dtype)
