"""Δ = diag(g)(W + s · up · down) − W: the operator of DoRA, a low-rank update and a scale for every output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .delta import Delta, applied, batched, product_dtype, shaped, transformed
from .inference import Evaluated
from .saved_outputs import SavedOutput, pulled_gain, tells_gain, weight_is_less

__all__ = ["MagnitudeDirection"]


@dataclass(frozen=True, eq=False)
class MagnitudeDirection(Delta):
    """Δ = diag(gain)(W + scaling · up · down) − W with W (out, in), up (out, r), down (r, in), gain (out); never built.

    Everything is computed from gain − 1, taken before the gain is cast: in 16 bits 1.001 is 1, and 0.001 is 0.001.
    A gain of one over a product of zero so changes nothing, exactly.

    Args:
        weight: the frozen W, in its own dtype, or a function that dequantises it.
        up: the second factor.
        down: the first factor.
        scaling: s.
        gain: g, left in its own dtype by ``to``.
        whole: the weight that ``joined`` is given is W itself, nothing merged into it, so that one product serves both.
    """

    weight: Tensor | Callable[[], Tensor]
    up: Tensor
    down: Tensor
    scaling: float
    gain: Tensor
    whole: bool = False

    def matrix(self) -> Tensor:
        """W."""
        return self.weight if isinstance(self.weight, Tensor) else self.weight()

    def apply(self, x: Tensor) -> Tensor:
        return self._product(x, self.matrix(), None, whole=False)

    def beside(self, x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
        if not self.whole:
            return self.apply(x)
        product = y if bias is None else y - bias
        up = (self.gain[:, None] * self.up * self.scaling).to(x.dtype)
        low = F.linear(F.linear(x, self.down.to(x.dtype)), up)
        return low + product * (self.gain - 1).to(product.dtype)

    def joined(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.whole:
            return F.linear(x, weight, bias) + self.apply(x)
        return self._product(x, weight, bias, whole=True)

    def rows(self, ids: Tensor) -> Tensor:
        low = F.linear(F.embedding(ids, self.down.T), self.up * self.scaling)
        before = F.embedding(ids, self.matrix().T).to(low.dtype) + low
        return low + before * (self.gain - 1).to(low.dtype)

    def dense(self) -> Tensor:
        less_one = (self.gain - 1)[:, None] * self.matrix().to(self.up.dtype)
        return (less_one + self.gain[:, None] * self.scaling * (self.up @ self.down)).to(self.up.dtype)

    def to(self, dtype: torch.dtype) -> MagnitudeDirection:
        return replace(self, up=self.up.to(dtype), down=self.down.to(dtype))

    def for_inference(self, dtype: torch.dtype) -> _Evaluated:
        up = (self.gain[:, None] * self.up * self.scaling).to(dtype)
        return _Evaluated(self.to(dtype), up, self.down.to(dtype), (self.gain - 1).to(dtype))

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, whole: bool) -> Tensor:
        dtype = product_dtype(x)
        x, weight, up, down = (value.to(dtype) for value in (x, weight, self.up, self.down))
        bias = None if bias is None else bias.to(dtype)
        if transformed():
            low = F.linear(F.linear(x, down), (self.gain[:, None] * up * self.scaling).to(dtype))
            y = F.linear(x, weight) * (self.gain - 1).to(dtype) + low
            return y + F.linear(x, weight, bias) if whole else y
        return applied(_GainedProduct, x, weight, bias, up, down, self.gain, self.scaling, whole)


@dataclass(frozen=True, eq=False)
class _Evaluated(Evaluated):
    """A ``MagnitudeDirection`` for evaluation, with diag(gain) · scaling · up and gain − 1 precomputed."""

    origin: MagnitudeDirection
    up: Tensor
    down: Tensor
    less_one: Tensor

    def answer(self, tokens: Tensor) -> Tensor:
        y = F.linear(tokens, self.origin.matrix().to(tokens.dtype)).mul_(self.less_one)
        return y.addmm_(tokens @ self.down.T, self.up.T)

    def joined(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.origin.whole:
            return super().joined(x, weight, bias)
        y = _gained(x.reshape(-1, x.shape[-1]), weight, bias, self.up, self.down, self.less_one)
        return y.view(*x.shape[:-1], y.shape[-1])


def _gained(tokens: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor, down: Tensor, less_one: Tensor) -> Tensor:
    """g ⊙ (x Wᵀ) + (x downᵀ) upᵀ + b, of an ``up`` with the gain in it, in one buffer."""
    # With the bias in the product, a gain of one gives the bits that the layer itself gives.
    y = F.linear(tokens, weight, bias)
    y.addcmul_(y, less_one).addmm_(tokens @ down.T, up.T)
    return y if bias is None else y.sub_(less_one * bias)


class _GainedProduct(torch.autograd.Function):
    """y = g ⊙ (x Wᵀ + s (x downᵀ) upᵀ) + b, or without ``whole`` what this adds to x Wᵀ + b.

    Saves x. The gain's gradient follows from y, or from the gradient of W', which costs a product as large as x Wᵀ but
    then gives the factors' gradients without further products over tokens. So y is saved where that is cheap.
    With many tokens it is cheaper to scale W than the output: W' is then built in the forward and in the backward.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, weight, bias, up, down, gain, ctx.scaling, ctx.whole = arguments
        tokens, gained_up = x.reshape(-1, x.shape[-1]), (gain[:, None] * up * ctx.scaling).to(up.dtype)
        less_one = (gain - 1).to(x.dtype)
        if not ctx.whole:
            y = F.linear(tokens, weight).mul_(less_one).addmm_(tokens @ down.T, gained_up.T)
        elif weight_is_less(tokens):
            y = F.linear(tokens, _changed(weight, gain, gained_up, down), bias)
        else:
            y = _gained(tokens, weight, bias, gained_up, down, less_one)
        y, kept = shaped(y, x.shape[:-1]), None
        if ctx.whole and ctx.needs_input_grad[5] and SavedOutput.cheap(weight.shape) and tells_gain(y, gain):
            kept, ctx.saved_output = y.data, SavedOutput(y)
        ctx.save_for_backward(x, weight, up, down, gain, bias, kept)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, up, down, gain, bias, kept = ctx.saved_tensors
        need_x, need_weight, need_bias, *need_parts = ctx.needs_input_grad[:6]
        grads, tokens = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        gained_up = (gain[:, None] * up * ctx.scaling).to(up.dtype)
        grad_x = grad_weight = grad_bias = grad_up = grad_down = grad_gain = None
        if need_weight:  # somebody trains the base as well
            grad_weight = (grads * (gain if ctx.whole else gain - 1).to(grads.dtype)).T @ tokens
        if need_bias:
            grad_bias = grads.sum(0)
        if any(need_parts):
            if kept is not None and ctx.saved_output.tells() and not batched(grad):
                grad_gain = pulled_gain(kept, bias, gain, grads)
                of_up, grad_down = grads.T @ (tokens @ down.T), (grads @ gained_up).T @ tokens
            else:
                of_weight = grads.T @ tokens
                of_up, grad_down = of_weight @ down.T, gained_up.T @ of_weight
                grad_gain = (weight * of_weight).sum(1, dtype=gain.dtype)
                grad_gain = grad_gain + (of_up * up).sum(1, dtype=gain.dtype) * ctx.scaling
            grad_up = (of_up * (gain * ctx.scaling)[:, None]).to(up.dtype)
        if need_x and ctx.whole and weight_is_less(tokens):
            grad_x = (grads @ _changed(weight, gain, gained_up, down)).view(x.shape)
        elif need_x:
            less_one = (gain - 1).to(x.dtype)
            through = torch.addcmul(grads, grads, less_one) if ctx.whole else grads * less_one
            grad_x = (through @ weight).addmm_(grads @ gained_up, down).view(x.shape)
        return grad_x, grad_weight, grad_bias, grad_up, grad_down, grad_gain, None, None


def _changed(weight: Tensor, gain: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """W' = diag(g) W + up · down, of an ``up`` with the gain in it."""
    return (weight * gain.to(weight.dtype)[:, None]).addmm_(up, down)
