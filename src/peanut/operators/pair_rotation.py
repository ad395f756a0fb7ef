"""Rotation and scaling of pairs of features; the operator of RoAd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .delta import applied, transformed
from .rotation import Rotation

__all__ = ["PairRotation"]


@dataclass(frozen=True, eq=False)
class PairRotation(Rotation):
    """R x = cos ⊙ x + sin ⊙ x̃, x̃ = (−x₂, x₁) in each group of features with the halves x₁ and x₂.

    So feature i of a group's first half and feature i of its second are rotated as a pair. The backward saves x. The
    parts stay in their own dtype, since in 16 bits a cosine near 1 would be 1.

    Args:
        cos: (width), what a feature itself is multiplied by.
        sin: (width), what its partner is multiplied by.
        group: the features of a group, an even number that divides the width.
    """

    cos: Tensor
    sin: Tensor
    group: int

    @property
    def width(self) -> int:
        return len(self.cos)

    def apply(self, x: Tensor) -> Tensor:
        if transformed():
            return torch.addcmul(x, x, (self.cos - 1).to(x.dtype)) + _partners(x, self.group) * self.sin.to(x.dtype)
        return applied(_Turned, x, self.cos, self.sin, self.group)

    def times(self, weight: Tensor) -> Tensor:
        """W R for W (…, width): the transpose rotates back."""
        return _turned_back(weight, self.cos, self.sin, self.group)

    def dense(self) -> Tensor:
        return self.times(torch.eye(self.width, dtype=self.cos.dtype, device=self.cos.device))

    def to(self, dtype: torch.dtype) -> PairRotation:
        return self


def _partners(x: Tensor, group: int) -> Tensor:
    """x̃: the halves of each group exchanged, the new first one negative."""
    first, second = x.reshape(*x.shape[:-1], x.shape[-1] // group, 2, group // 2).unbind(-2)
    return torch.stack([-second, first], dim=-2).reshape(x.shape)


def _turned_back(y: Tensor, cos: Tensor, sin: Tensor, group: int) -> Tensor:
    """y R, with cos − 1 in place of cos: in 16 bits a cosine near 1 would be 1."""
    return torch.addcmul(y, y, (cos - 1).to(y.dtype)) - _partners(y * sin.to(y.dtype), group)


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, group: int) -> Tensor:
        ctx.save_for_backward(x, cos, sin)
        ctx.group = group
        return x + _partners(x, group).mul_(sin.to(x.dtype)).addcmul_(x, (cos - 1).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, cos, sin = ctx.saved_tensors
        grad_x = grad_cos = grad_sin = None
        if ctx.needs_input_grad[0]:
            grad_x = _turned_back(grad, cos, sin, ctx.group)
        if ctx.needs_input_grad[1]:
            grad_cos = (grad * x).sum_to_size(cos.shape).to(cos.dtype)
        if ctx.needs_input_grad[2]:
            grad_sin = (grad * _partners(x, ctx.group)).sum_to_size(sin.shape).to(sin.dtype)
        return grad_x, grad_cos, grad_sin, None
