"""W Aᵀ, which weight-aware methods read: it costs as much as r extra tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["product", "product_of_codes"]


def product(matrix: Tensor, A: Tensor) -> Tensor:
    """M Aᵀ for M (e, d), read in its own dtype and never copied to another, and A (r, d): (e, r), in A's dtype."""
    return (matrix @ A.to(matrix.dtype).T).to(A.dtype)


def product_of_codes(read: Callable[[], Tensor], A: Tensor) -> Tensor:
    """``product`` for an M that is made of codes by ``read``, in the backward once more rather than kept."""
    return _OfCodes.apply(A, read)  # type: ignore[no-any-return, no-untyped-call]


class _OfCodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, A: Tensor, read: Callable[[], Tensor]) -> Tensor:
        ctx.read, ctx.dtype = read, A.dtype
        return product(read(), A)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        matrix = ctx.read()
        return (matrix.T @ grad.to(matrix.dtype)).T.to(ctx.dtype), None
