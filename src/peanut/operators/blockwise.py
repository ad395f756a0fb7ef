"""Δ made of repeated blocks, the operator of MiSS, and the weight-aware variant of Bone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import PeanutError
from .delta import Delta, applied, batched, product_dtype, shaped, transformed
from .materialised import Materialised

__all__ = ["BlockAffine", "Blockwise"]


@dataclass(frozen=True, eq=False)
class Blockwise(Delta):
    """Δ[o, i] = block[i mod r, o mod m]: the columns repeat with period r, the rows with period m.

    So Δ x is a sum over the input's blocks of r, one thin product, and a repetition; Δ has rank ≤ r. Where r does not
    divide in, the last block is cut short.

    Args:
        block: (r, m), m dividing out.
        size: (out, in).
    """

    block: Tensor
    size: tuple[int, int]

    def apply(self, x: Tensor) -> Tensor:
        dtype = product_dtype(x)
        return self._product(x.to(dtype), None, None, self.block.to(dtype))

    def joined(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (W + Δ)ᵀ + b, Δ's part added in place; the backward saves r numbers a token and not x."""
        dtype = product_dtype(x)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        if transformed() or weight.requires_grad or (bias is not None and bias.requires_grad):
            return F.linear(x, weight, bias) + self.apply(x)
        return self._product(x, weight, bias, self.block.to(dtype))

    def _product(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, block: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not transformed():
            return applied(_Folded, x, weight, bias, block, self.size)
        return _joined(x, _fold(x.reshape(-1, self.size[1]), len(block)), weight, bias, block, self.size)

    def rows(self, ids: Tensor) -> Tensor:
        r, m = self.block.shape
        return F.embedding(ids % r, self.block).repeat((1,) * ids.ndim + (self.size[0] // m,))

    def dense(self) -> Tensor:
        up, down = self.factors()
        return up @ down

    def factors(self) -> tuple[Tensor, Tensor]:
        """(the block's rows repeated, (out, r); ones where column ≡ row mod r, (r, in))."""
        r, m = self.block.shape
        place = torch.arange(self.size[1], device=self.block.device) % r
        down = (place == torch.arange(r, device=self.block.device)[:, None]).to(self.block.dtype)
        return self.block.T.repeat(self.size[0] // m, 1), down


class _Folded(torch.autograd.Function):
    """y = x Wᵀ + b + repeat(fold(x) block), or the last term alone; saves fold(x), (tokens, r), W and the block."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, block: Tensor, size: tuple[int, int]
    ) -> Tensor:
        folded = _fold(x.reshape(-1, size[1]), len(block))
        ctx.save_for_backward(folded, weight, block)
        ctx.size, ctx.shape = size, x.shape
        return _joined(x, folded, weight, bias, block, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # x itself was not saved
            raise PeanutError(
                "a gradient of the gradient of a MiSS layer",
                "first derivatives: of the input the layer saves r numbers a token only",
                "leave out create_graph, or use init_weights='bat' or another method",
            )
        folded, weight, block = ctx.saved_tensors
        r, m = block.shape
        out, inputs = ctx.size
        grads = grad.reshape(-1, out)
        summed = grads.view(-1, out // m, m).sum(1) if m < out else grads
        grad_x = grad_block = None
        if ctx.needs_input_grad[3]:
            grad_block = folded.T @ summed
        if ctx.needs_input_grad[0]:
            spread = summed @ block.T
            blocks = inputs // r
            grad_x = spread.new_zeros(grads.shape[0], inputs) if weight is None else grads @ weight
            if batched(grad):
                grad_x = grad_x + spread.repeat(1, blocks + 1)[:, :inputs]
            else:
                grad_x[:, : blocks * r].view(-1, blocks, r).add_(spread.unsqueeze(1))
            if blocks * r < inputs and not batched(grad):
                grad_x[:, blocks * r :].add_(spread[:, : inputs - blocks * r])
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, grad_block, None


def _joined(
    x: Tensor, folded: Tensor, weight: Tensor | None, bias: Tensor | None, block: Tensor, size: tuple[int, int]
) -> Tensor:
    tokens, m = x.reshape(-1, size[1]), block.shape[1]
    if weight is None:
        y = (folded @ block).repeat(1, size[0] // m)
    else:
        y = F.linear(tokens, weight, bias)
        if m == size[0]:
            y.addmm_(folded, block)
        else:
            y.view(-1, size[0] // m, m).add_((folded @ block).unsqueeze(1))
    return shaped(y, x.shape[:-1])


def _fold(x: Tensor, r: int) -> Tensor:
    """The sum of the blocks of r columns: (tokens, in) → (tokens, r)."""
    whole = x.shape[1] // r * r
    folded = x[:, :whole].reshape(-1, x.shape[1] // r, r).sum(1)
    return folded if whole == x.shape[1] else folded + F.pad(x[:, whole:], (0, r - x.shape[1] + whole))


@dataclass(frozen=True, eq=False)
class BlockAffine(Materialised):
    """Δ_ac = (W_ac + I) B_a for the blocks (r, r) of W: each block of the frozen weight through a learned product.

    Args:
        block: B, (out/r, r, r).
        weight: W, (out, in), read and mostly not trained.
    """

    trained = ("block",)

    block: Tensor
    weight: Tensor

    def dense(self) -> Tensor:
        return self._with_own(self._stacked(self.weight) @ self.block)

    def onto(self, weight: Tensor) -> Tensor:
        if not weight.is_contiguous():  # the sum keeps the layout, so that its products are those of the weight
            return weight + self.dense()
        # One pass less than the sum of two matrices: the product adds to a copy of the weight.
        return self._with_own(torch.baddbmm(self._stacked(weight), self._stacked(self.weight), self.block))

    def pull(self, grad: Tensor) -> tuple[Tensor, ...]:
        a, r, _ = self.block.shape
        own = grad.reshape(a, r, -1, r).sum(2)
        return (self._stacked(self.weight).transpose(1, 2) @ self._stacked(grad) + own,)

    def _with_own(self, stacked: Tensor) -> Tensor:
        """The stacks with B added to each block of theirs, (out, in)."""
        a, r, _ = self.block.shape
        return stacked.view(a, r, -1, r).add_(self.block.unsqueeze(2)).view(self.weight.shape)

    def _stacked(self, matrix: Tensor) -> Tensor:
        """(out, in) as out/r stacks of rows of r: (out/r, in, r), row and column block in one dimension."""
        a, r, _ = self.block.shape
        return matrix.to(self.block.dtype).reshape(a, -1, r)
