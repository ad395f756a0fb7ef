"""Δ = s · up · down, the operator of LoRA, of PEANuT and of most of their relatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .operator import Operator
from .saved_outputs import shaped

__all__ = ["LowRank"]

NARROW = 8
"""x downᵀ is kept for the backward where it has at most one number for so many of x."""


@dataclass(frozen=True)
class LowRank(Operator):
    """Δ = scaling · up · down with up (out, r) and down (r, in); applied as scaling · (x downᵀ) upᵀ, never built.

    The scaling stays a number beside the factors, so that a trained factor is used as it is and no copy of it is
    kept for the backward.
    """

    up: Tensor
    down: Tensor
    scaling: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    @property
    def rank(self) -> int:
        """r, the number of columns of up."""
        return self.up.shape[1]

    def apply(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down), self.scaled_up())

    def weighted(self, x: Tensor, gate: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down) * gate, self.scaled_up())  # keeps r numbers a token, not the output

    def rows(self, ids: Tensor) -> Tensor:
        return F.linear(F.embedding(ids, self.down.T), self.scaled_up())

    def dense(self) -> Tensor:
        return self.scaled_up() @ self.down

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.scaled_up(), self.down

    def scaled_up(self) -> Tensor:
        """scaling · up, (out, r)."""
        return self.up if self.scaling == 1.0 else self.up * self.scaling

    def to(self, dtype: torch.dtype) -> LowRank:
        if self.up.dtype == self.down.dtype == dtype:
            return self
        return LowRank(self.up.to(dtype), self.down.to(dtype), self.scaling)

    def joined(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (W + Δ)ᵀ + b in one go: the frozen product and Δ's share one output and one gradient buffer.

        Args:
            x: (…, in).
            weight: the frozen matrix W, (out, in).
            bias: b, (out), or ``None``.

        Returns:
            (…, out). The backward keeps x, which it needs for the factors' gradient, and at most r numbers a token.
        """
        if torch.is_grad_enabled():
            return _JoinedProduct.apply(x, weight, bias, self.up, self.down, self.scaling)  # type: ignore[no-any-return, no-untyped-call]
        return _joined(x, weight, bias, self.up, self.down, self.scaling)[0]

    @staticmethod
    def sum(operators: Sequence[LowRank]) -> LowRank:
        """The sum of low-rank operators, again low-rank: the factors side by side, the ranks added."""
        if len(operators) == 1:
            return operators[0]
        return LowRank(
            torch.cat([operator.scaled_up() for operator in operators], dim=1),
            torch.cat([operator.down for operator in operators], dim=0),
        )


def _joined(
    x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor, down: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """The product, and x downᵀ."""
    tokens = x.reshape(-1, x.shape[-1])
    y, hidden = F.linear(tokens, weight, bias), tokens @ down.T
    return shaped(y.addmm_(hidden, up.T, alpha=scaling), x.shape[:-1]), hidden


class _JoinedProduct(torch.autograd.Function):
    """y = x Wᵀ + b + s (x downᵀ) upᵀ for a frozen W.

    Autograd on its own would write the change's output and its gradient with respect to x to memory once more each,
    and add them in another pass. Here both are added inside the product that makes them (addmm). x downᵀ is kept where
    it is little beside x: to compute it again is another pass over x.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor, down: Tensor, scaling: float
    ) -> Tensor:
        y, hidden = _joined(x, weight, bias, up, down, scaling)
        narrow = len(down) * NARROW <= x.shape[-1]
        ctx.save_for_backward(x, weight, up, down, hidden if narrow and ctx.needs_input_grad[3] else None)
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, up, down, hidden = ctx.saved_tensors
        need_x, need_weight, need_bias, need_up, need_down, _ = ctx.needs_input_grad
        grads = grad.reshape(-1, grad.shape[-1])
        tokens = x.reshape(-1, x.shape[-1])
        grad_x = grad_weight = grad_bias = grad_up = grad_down = None
        grad_hidden = (grads @ up).mul_(ctx.scaling) if need_x or need_down else None
        if grad_hidden is not None and need_x:
            grad_x = (grads @ weight).addmm_(grad_hidden, down).view(x.shape)
        if need_weight:
            grad_weight = grads.T @ tokens
        if need_bias:
            grad_bias = grads.sum(0)
        if need_up:
            if hidden is None or torch.is_grad_enabled():  # differentiated itself, it must not meet a constant
                hidden = tokens @ down.T
            grad_up = (grads.T @ hidden).mul_(ctx.scaling)
        if grad_hidden is not None and need_down:
            grad_down = grad_hidden.T @ tokens
        return grad_x, grad_weight, grad_bias, grad_up, grad_down, None
