"""A frozen product with a gain of every output, which keeps nothing that the layers around it do not keep."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .materialised import product_dtype
from .saved_outputs import Returned, pulled_gain, shaped, tells_gain, weight_is_less

__all__ = ["gained_product"]


def gained_product(x: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor) -> Tensor | None:
    """g ⊙ (x Wᵀ) + b for a frozen W (out, in): (…, in) → (…, out); ``None`` where an ordinary product serves better.

    Autograd would keep x Wᵀ for the gain's gradient. Here the output is kept, which an activation behind a layer that
    widens keeps too, and x, which is smaller, for an output that has been changed in place. Others gain nothing.

    Args:
        x: (…, in).
        weight: the frozen matrix W, (out, in).
        bias: b, (out), or ``None``.
        gain: g, (out).
    """
    dtype = product_dtype(x)
    out, inputs = weight.shape
    if not (torch.is_grad_enabled() and out > inputs and dtype == x.dtype == weight.dtype and tells_gain(x, gain)):
        return None
    return _Gained.apply(x, weight, bias, gain)  # type: ignore[no-any-return, no-untyped-call]


class _Gained(torch.autograd.Function):
    """y = g ⊙ (x Wᵀ) + b; keeps x and y, and computes x Wᵀ again should y have been changed in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        if weight_is_less(tokens):
            y = F.linear(tokens, weight * gain.to(weight.dtype)[:, None], bias)
        else:
            y = F.linear(tokens, weight, bias)  # with b in it, so that a gain of one leaves the layer's own bits
            y.addcmul_(y if bias is None else y - bias, (gain - 1).to(y.dtype))
        y = shaped(y, x.shape[:-1])
        ctx.returned = Returned(y)
        known = (x, y.data) if ctx.needs_input_grad[3] else (None, None)
        ctx.save_for_backward(weight, bias, gain, *known)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, bias, gain, x, kept = ctx.saved_tensors
        grads = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_bias = grad_gain = None
        if ctx.needs_input_grad[0]:
            of_one = gain.to(weight.dtype)
            less = len(grads) >= weight.shape[1]  # as in the forward
            grad_x = grads @ (weight * of_one[:, None]) if less else (grads * of_one) @ weight
            grad_x = grad_x.view(*grad.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[2]:
            grad_bias = grads.sum(0)
        if ctx.needs_input_grad[3] and ctx.returned.tells():
            grad_gain = pulled_gain(kept, bias, gain, grads)
        elif ctx.needs_input_grad[3]:
            grad_gain = (F.linear(x, weight).view(grads.shape) * grads).sum(0, dtype=gain.dtype)
        return grad_x, None, grad_bias, grad_gain
