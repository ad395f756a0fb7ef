"""Δ from fixed random matrices and a few trained scales; the operator of RandLoRA and VeRA."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .delta import Delta, applied, shaped, transformed
from .inference import WrittenOut
from .low_rank import LowRank

__all__ = ["RandomBases"]

Side = Literal["up", "down"]


@dataclass(frozen=True, eq=False)
class RandomBases(Delta):
    """Δ = scaling · up · down, one factor fixed and the other basis ⊙ left ⊙ right (broadcast, then flattened to 2D).

    A ``LowRank`` of the product would keep the rescaled factor, which for a basis of full rank is as large as Δ, from
    each forward to its backward; and its copy of the fixed one where the activations have another dtype. Here both
    are made again. The basis and the fixed factor get no gradient.

    Args:
        basis: the random tensor that is rescaled.
        left, right: its trained scalings; the three broadcast to (out, …) for up, to (…, in) for down.
        fixed: the other factor, (out, r) or (r, in).
        side: which factor is the rescaled one.
        scaling: s.
        dtype: that of the products; the tensors' own if ``None``.
    """

    basis: Tensor
    left: Tensor
    right: Tensor
    fixed: Tensor
    side: Side
    scaling: float = 1.0
    dtype: torch.dtype | None = None

    @property
    def shape(self) -> tuple[int, int]:
        full = torch.broadcast_shapes(self.basis.shape, self.left.shape, self.right.shape)
        return (full[0], self.fixed.shape[1]) if self.side == "up" else (self.fixed.shape[0], full[-1])

    def apply(self, x: Tensor) -> Tensor:
        return self._product(x, None, None)

    def joined(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._product(x, weight, bias)

    def rows(self, ids: Tensor) -> Tensor:
        # With the rescaled factor on the left, ids read the fixed one, and there is nothing to scatter gradients to.
        return self._product(ids, None, None) if self.side == "up" else super().rows(ids)

    def dense(self) -> Tensor:
        up, down = self._factors()
        return up @ down if self.scaling == 1.0 else (up @ down) * self.scaling

    def factors(self) -> tuple[Tensor, Tensor] | None:
        up, down = self._factors()
        # Beyond full rank two products cost more than the one that they stand for.
        return (up * self.scaling, down) if up.shape[1] < min(self.shape) else None

    def to(self, dtype: torch.dtype) -> RandomBases:
        return replace(self, dtype=dtype)

    def for_inference(self, dtype: torch.dtype) -> Delta:
        operator, rank = self.to(dtype), self.fixed.shape[0 if self.side == "up" else 1]
        if rank >= min(self.shape):
            return WrittenOut(operator)
        up, down = operator._factors()
        return LowRank(up * self.scaling, down)

    def _factors(self) -> tuple[Tensor, Tensor]:
        return _factors(self.basis, self.left, self.right, self.fixed, self.side, self.dtype)

    def _product(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if transformed():
            up, down = self._factors()
            y = F.linear(_hidden(x, down), up * self.scaling)
            y = y.reshape(*(x.shape[:-1] if x.is_floating_point() else x.shape), y.shape[-1])
            return y if weight is None else F.linear(x, weight, bias) + y
        basis, fixed = self.basis.detach(), self.fixed.detach()
        return applied(
            _Product, x, weight, bias, basis, self.left, self.right, fixed, self.side, self.scaling, self.dtype
        )


def _factors(
    basis: Tensor, left: Tensor, right: Tensor, fixed: Tensor, side: Side, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """(up, down) of shapes (out, r) and (r, in)."""
    dtype = left.dtype if dtype is None else dtype
    scaled = (basis * left * right).to(dtype)
    fixed = fixed.to(dtype)
    return (scaled.flatten(1), fixed) if side == "up" else (fixed, scaled.flatten(0, -2))


class _Product(torch.autograd.Function):
    """y = x Wᵀ + b + s (x downᵀ) upᵀ for a frozen W, or without W; whole numbers x stand for one-hot vectors.

    Saved for the backward: x, W, and the tensors that the factors are made of, as they are. Of high rank the factors
    cost more than W with their product in it: then that is made instead, here and again in the backward.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, weight, bias, basis, left, right, fixed, side, scaling, dtype = arguments
        up, down = _factors(basis, left, right, fixed, side, dtype)
        ctx.save_for_backward(x, weight, basis, left, right, fixed)
        ctx.options = side, scaling, dtype
        if weight is None:
            places = x.shape[:-1] if x.is_floating_point() else x.shape
            return shaped(F.linear(_hidden(x, down), up).mul_(scaling), places)
        tokens = x.reshape(-1, x.shape[-1])
        if _written_out(x, up, down):
            y = F.linear(tokens, torch.addmm(weight, up, down, alpha=scaling), bias)
        else:
            y = F.linear(tokens, weight, bias).addmm_(_hidden(x, down), up.T, alpha=scaling)
        return shaped(y, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, basis, left, right, fixed = ctx.saved_tensors
        side, scaling, dtype = ctx.options
        need_x, need_weight, need_bias, _, need_left, need_right, *_ = ctx.needs_input_grad
        up, down = _factors(basis, left, right, fixed, side, dtype)
        grads = grad.reshape(-1, grad.shape[-1]).to(up.dtype)
        grad_x = grad_weight = grad_bias = grad_left = grad_right = grad_hidden = None
        need_factor, whole = need_left or need_right, weight is not None and _written_out(x, up, down)
        if need_weight or (need_factor and whole):
            grad_weight = grads.T @ x.reshape(-1, x.shape[-1])
        if need_bias:
            grad_bias = grads.sum(0)
        if not whole and (need_x or side == "down"):
            grad_hidden = (grads @ up).mul_(scaling)
        if need_factor:
            if grad_weight is not None:
                grad_scaled = (grad_weight @ down.T if side == "up" else up.T @ grad_weight).mul_(scaling)
            elif grad_hidden is not None and side == "down":
                grad_scaled = grad_hidden.T @ x.reshape(-1, x.shape[-1])
            else:
                grad_scaled = (grads.T @ _hidden(x, down)).mul_(scaling)
            full = torch.broadcast_shapes(basis.shape, left.shape, right.shape)
            weighted = grad_scaled.to(left.dtype).view(full) * basis
            grad_left = (weighted * right).sum_to_size(left.shape)
            grad_right = (weighted * left).sum_to_size(right.shape)
            del grad_scaled, weighted
        if not need_weight:
            grad_weight = None
        if need_x and whole:  # last, when what the factors' gradients took is gone
            changed = torch.addmm(weight, up, down, alpha=scaling)
            del up, down
            grad_x = (grads @ changed).view(x.shape)
        elif need_x and grad_hidden is not None:
            grad_tokens = grad_hidden @ down if weight is None else (grads @ weight).addmm_(grad_hidden, down)
            grad_x = grad_tokens.view(x.shape)
        return grad_x, grad_weight, grad_bias, None, grad_left, grad_right, None, None, None, None


def _written_out(x: Tensor, up: Tensor, down: Tensor) -> bool:
    """Whether W + Δ takes fewer multiplications in a step than the factors, in a dtype wide enough to hold the sum."""
    (out, rank), inputs = up.shape, down.shape[1]
    tokens = x.numel() // x.shape[-1]
    if torch.finfo(up.dtype).bits < 32:
        return False
    return out * inputs * (3 * rank + tokens) < 2 * tokens * rank * (out + inputs)


def _hidden(x: Tensor, down: Tensor) -> Tensor:
    """x downᵀ, (tokens, r)."""
    return F.linear(x.reshape(-1, x.shape[-1]), down) if x.is_floating_point() else down.T[x.flatten()]
