"""Δ as a Kronecker product of two small matrices; the operator of LoKr."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .delta import Delta, applied, product_dtype, shaped, transformed

__all__ = ["Kronecker"]


@dataclass(frozen=True, eq=False)
class Kronecker(Delta):
    """Δ = scaling · U ⊗ V with U (a, c) and V (b, d), of shape (a·b, c·d).

    With a token as a matrix X (c, d), row by row, Δ x is U X Vᵀ: two small products. The backward saves x.

    Args:
        outer: U.
        inner: V, or where it is a product of two factors the first of them, (b, r).
        down: the second, (r, d).
        scaling: a number.
    """

    outer: Tensor
    inner: Tensor
    down: Tensor | None = None
    scaling: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        d = (self.inner if self.down is None else self.down).shape[1]
        return self.outer.shape[0] * self.inner.shape[0], self.outer.shape[1] * d

    def apply(self, x: Tensor) -> Tensor:
        dtype = product_dtype(x)
        x, outer, inner = x.to(dtype), self.outer.to(dtype), self._inner().to(dtype)
        if transformed():
            each = x.unflatten(-1, (outer.shape[1], inner.shape[1]))
            y: Tensor = (outer @ (each @ inner.T)).flatten(-2) * self.scaling
            return y
        return applied(_Product, x, outer, inner, self.scaling)

    def rows(self, ids: Tensor) -> Tensor:
        V = self._inner()
        outer, inner = F.embedding(ids // V.shape[1], self.outer.T), F.embedding(ids % V.shape[1], V.T)
        return (outer.unsqueeze(-1) * inner.unsqueeze(-2)).flatten(-2) * self.scaling

    def dense(self) -> Tensor:
        return torch.kron(self.outer, self._inner()) * self.scaling

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """U ⊗ (V₁V₂) = (U ⊗ V₁)(I ⊗ V₂), where that is of lower rank than Δ may be."""
        if self.down is None or self.outer.shape[1] * len(self.down) >= min(self.shape):
            return None
        eye = torch.eye(self.outer.shape[1], dtype=self.outer.dtype, device=self.outer.device)
        return torch.kron(self.outer, self.inner) * self.scaling, torch.kron(eye, self.down)

    def _inner(self) -> Tensor:
        """V."""
        return self.inner if self.down is None else self.inner @ self.down


class _Product(torch.autograd.Function):
    """s · U X Vᵀ of each token; what one of the products gives the other is made again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, outer: Tensor, inner: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(x, outer, inner)
        ctx.scaling = scaling
        each = x.reshape(-1, outer.shape[1], inner.shape[1])
        hidden = (each.flatten(0, 1) @ inner.T).view(*each.shape[:2], len(inner))  # (tokens, c, b)
        y = (hidden.mT.flatten(0, 1) @ outer.T).mul_(scaling).view(len(each), len(inner), len(outer))
        return shaped(y.mT.flatten(1), x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, outer, inner = ctx.saved_tensors
        grads = grad.reshape(-1, outer.shape[0], inner.shape[0]) * ctx.scaling
        each = x.reshape(-1, outer.shape[1], inner.shape[1])
        grad_x = grad_outer = grad_inner = None
        if ctx.needs_input_grad[1]:
            hidden = (each @ inner.T).transpose(0, 1).reshape(outer.shape[1], -1)
            grad_outer = grads.transpose(0, 1).reshape(outer.shape[0], -1) @ hidden.T
        through = outer.T @ grads  # (tokens, c, b)
        if ctx.needs_input_grad[2]:
            grad_inner = through.reshape(-1, inner.shape[0]).T @ each.reshape(-1, inner.shape[1])
        if ctx.needs_input_grad[0]:
            grad_x = (through @ inner).view(x.shape)
        return grad_x, grad_outer, grad_inner, None
