"""Δ = diag(g)(W + s · up · down) − W, the operator of DoRA: a low-rank change and a gain of every output."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .built import product_dtype
from .operator import Operator

__all__ = ["Decomposed"]


@dataclass(frozen=True)
class Decomposed(Operator):
    """Δ = diag(gain)(W + scaling · up · down) − W with W (out, in), up (out, r), down (r, in), gain (out); never built.

    Everything is computed from gain − 1, taken before the gain is cast: in 16 bits 1.001 is 1, and 0.001 is 0.001.
    A gain of one over a product of zero so changes nothing, exactly.

    Args:
        weight: the frozen W, in its own dtype; nothing flows back to it.
        up: the second factor.
        down: the first factor.
        scaling: s.
        gain: g, kept in its own dtype by ``to``.
        whole: the weight that ``joined`` is given is W itself, nothing merged into it, so that one product serves both.
    """

    weight: Tensor
    up: Tensor
    down: Tensor
    scaling: float
    gain: Tensor
    whole: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def apply(self, x: Tensor) -> Tensor:
        return self._product(x, self.weight, None, whole=False)

    def joined(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.whole:
            return F.linear(x, weight, bias) + self.apply(x)
        return self._product(x, weight, bias, whole=True)

    def rows(self, ids: Tensor) -> Tensor:
        return _GainedRows.apply(ids, self.weight, self.up, self.down, self.gain, self.scaling)  # type: ignore[no-any-return, no-untyped-call]

    def dense(self) -> Tensor:
        less_one = (self.gain - 1)[:, None] * self.weight.to(self.up.dtype)
        return (less_one + self.gain[:, None] * self.scaling * (self.up @ self.down)).to(self.up.dtype)

    def to(self, dtype: torch.dtype) -> Decomposed:
        return replace(self, up=self.up.to(dtype), down=self.down.to(dtype))

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, whole: bool) -> Tensor:
        dtype = product_dtype(x)
        x, weight, up, down = (value.to(dtype) for value in (x, weight, self.up, self.down))
        bias = None if bias is None else bias.to(dtype)
        return _GainedProduct.apply(x, weight, bias, up, down, self.gain, self.scaling, whole)  # type: ignore[no-any-return, no-untyped-call]


class _GainedProduct(torch.autograd.Function):
    """y = g ⊙ (x Wᵀ + s (x downᵀ) upᵀ) + b, or without ``whole`` what of it is not x Wᵀ, for a frozen W.

    Keeps x. The output before the gain, which the gain's gradient needs, is computed again in the backward: kept, it
    would be as large as the layer's output.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        up: Tensor,
        down: Tensor,
        gain: Tensor,
        scaling: float,
        whole: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, up, down, gain)
        ctx.scaling, ctx.whole = scaling, whole
        tokens, less_one = x.reshape(-1, x.shape[-1]), (gain - 1).to(x.dtype)
        hidden = tokens @ down.T
        if whole:
            # With the bias in the product, a gain of one gives the bits that the layer itself gives.
            y = F.linear(x, weight, bias)
            flat = y.view(-1, y.shape[-1]).addmm_(hidden, up.T, alpha=scaling)
            flat.addcmul_(flat, less_one)
            if bias is not None:
                flat.sub_(less_one * bias)
            return y
        low = (hidden @ up.T).mul_(scaling)
        low.addcmul_(torch.addmm(low, tokens, weight.T), less_one)
        return low.view(*x.shape[:-1], low.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, up, down, gain = ctx.saved_tensors
        need_x, _, need_bias, need_up, need_down, need_gain, *_ = ctx.needs_input_grad
        grads, tokens = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        less_one = (gain - 1).to(x.dtype)
        grad_x = grad_bias = grad_up = grad_down = grad_gain = None
        hidden = tokens @ down.T if need_up or need_gain else None
        if hidden is not None and need_gain:
            before = (tokens @ weight.T).addmm_(hidden, up.T, alpha=ctx.scaling)
            grad_gain = before.mul_(grads).sum(0, dtype=gain.dtype)
        if need_bias:
            grad_bias = grads.sum(0)
        gained = torch.addcmul(grads, grads, less_one)
        grad_hidden = (gained @ up).mul_(ctx.scaling) if need_x or need_down else None
        if hidden is not None and need_up:
            grad_up = (gained.T @ hidden).mul_(ctx.scaling)
        if grad_hidden is not None and need_down:
            grad_down = grad_hidden.T @ tokens
        if grad_hidden is not None and need_x:
            through = gained if ctx.whole else grads * less_one
            grad_x = (through @ weight).addmm_(grad_hidden, down).view(x.shape)
        return grad_x, None, grad_bias, grad_up, grad_down, grad_gain, None, None


class _GainedRows(torch.autograd.Function):
    """Δᵀ at ``ids``; keeps the ids."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: Tensor, up: Tensor, down: Tensor, gain: Tensor, scaling: float
    ) -> Tensor:
        ctx.save_for_backward(ids, weight, up, down, gain)
        ctx.scaling = scaling
        low = F.linear(F.embedding(ids, down.T), up).mul_(scaling)
        before = F.embedding(ids, weight.T).to(low.dtype) + low
        return low.addcmul_(before, (gain - 1).to(low.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ids, weight, up, down, gain = ctx.saved_tensors
        _, _, need_up, need_down, need_gain, _ = ctx.needs_input_grad
        grads, places = grad.reshape(-1, grad.shape[-1]), ids.reshape(-1)
        hidden = F.embedding(places, down.T)
        grad_up = grad_down = grad_gain = None
        gained = torch.addcmul(grads, grads, (gain - 1).to(grads.dtype))
        if need_gain:
            before = F.embedding(places, weight.T).to(grads.dtype).addmm(hidden, up.T, alpha=ctx.scaling)
            grad_gain = before.mul_(grads).sum(0, dtype=gain.dtype)
        if need_up:
            grad_up = (gained.T @ hidden).mul_(ctx.scaling)
        if need_down:
            grad_hidden = (gained @ up).mul_(ctx.scaling)
            grad_down = torch.zeros_like(down.T).index_add(0, places, grad_hidden).T
        return None, None, grad_up, grad_down, grad_gain, None
