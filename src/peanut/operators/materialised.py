"""Base class of operators whose Δ is built as a matrix in each forward and again in each backward, but never stored."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .delta import Delta, applied, batched, product_dtype, recomputed, shaped, transformed
from .inference import WrittenOut

__all__ = ["Materialised"]


@dataclass(frozen=True, eq=False)
class Materialised(Delta):
    """A Δ for which no order of products is cheaper than building it from its small parts.

    A subclass is a frozen dataclass whose fields are tensors, or plain values (numbers, strings, tuples of them), and
    gives three things: ``trained``, ``dense()`` in ordinary differentiable torch, and ``pull``, its backward.

    Laws, besides those of every operator: ``pull(g)`` is the gradient of ``(dense() * g).sum()`` with respect to
    the parts; both work in any floating dtype, and ``dense()`` is in that of the parts. ``pulled(g, x)`` is
    ``pull(gᵀ x)``, and differentiable where gradients are on.
    """

    trained: ClassVar[tuple[str, ...]]
    """The fields to which gradients flow: those of them that are tensors are the parts."""

    @abstractmethod
    def pull(self, grad: Tensor) -> tuple[Tensor, ...]:
        """The gradients of the parts given that of the dense Δ, (out, in)."""

    def pulled(self, grads: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """The gradients of the parts given (tokens, out) and (tokens, in), whose product would be that of Δ."""
        return self.pull(grads.T @ tokens)

    def pulled_through(self, grads: Tensor, tokens: Tensor, weight: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(grads (W + Δ), ``pulled(grads, tokens)``), or grads Δ without a W: what a backward needs, in one go."""
        return grads @ self.matrix(weight), self.pulled(grads, tokens)

    def matrix(self, weight: Tensor | None) -> Tensor:
        """W + Δ, or Δ without a W."""
        return self.dense() if weight is None else self.onto(weight)

    def apply(self, x: Tensor) -> Tensor:
        return self._product(x, None, None)

    def joined(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (W + Δ)ᵀ + b by one product, where the dtype is wide enough to hold the sum.

        In 16 bits W + Δ would round away every entry of Δ below a few thousandths of the weight's, which early in
        training is all of them; there Δ has a product of its own.
        """
        if torch.finfo(weight.dtype).bits < 32:
            return F.linear(x, weight, bias) + self.apply(x)
        return self._product(x, weight, bias)

    def rows(self, ids: Tensor) -> Tensor:
        return recomputed(lambda ids: self.dense().T[ids], ids)

    def for_inference(self, dtype: torch.dtype) -> Delta:
        return WrittenOut(self.to(dtype))

    def _product(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        dtype = product_dtype(x)
        operator, x = self.to(dtype), x.to(dtype)
        weight, bias = (None if value is None else value.to(dtype) for value in (weight, bias))
        if not torch.is_grad_enabled() or transformed():
            return F.linear(x, operator.matrix(weight), bias)
        tensors = {name: value for name, value in vars(operator).items() if isinstance(value, Tensor)}
        if any(value.requires_grad for name, value in tensors.items() if name not in self.trained):
            # Somebody trains what Δ is made of as well (the base's weight).
            return recomputed(lambda x: F.linear(x, operator.matrix(weight), bias), x)
        plain = tuple((name, value) for name, value in vars(operator).items() if name not in tensors)
        return applied(_Product, x, weight, bias, type(self), plain, tuple(tensors), *tensors.values())


def _again(made_of: type[Materialised], plain: Any, names: tuple[str, ...], tensors: Sequence[Tensor]) -> Materialised:
    return made_of(**dict(plain), **dict(zip(names, tensors, strict=True)))


class _Product(torch.autograd.Function):
    """y = x (W + Δ)ᵀ + b, or x Δᵀ without a W; saves x, W and the tensors that Δ is made of."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, weight, bias, made_of, plain, names, *tensors = arguments
        ctx.save_for_backward(x, weight, *tensors)
        ctx.recipe = made_of, plain, names
        matrix = _again(made_of, plain, names, tensors).matrix(weight)
        return shaped(F.linear(x.reshape(-1, x.shape[-1]), matrix, bias), x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *tensors = ctx.saved_tensors
        made_of, plain, names = ctx.recipe
        operator = _again(made_of, plain, names, tensors)
        grads, tokens = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        need_x, need_weight, need_bias, *need = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        pulled: tuple[Tensor, ...] = ()
        if need_weight or batched(grad):
            grad_weight = grads.T @ tokens
            pulled = operator.pull(grad_weight) if any(need) else ()
        elif need_x and any(need):
            grad_x, pulled = operator.pulled_through(grads, tokens, weight)
        elif any(need):
            pulled = operator.pulled(grads, tokens)
        if need_x and grad_x is None:
            grad_x = grads @ operator.matrix(weight)
        if need_bias:
            grad_bias = grads.sum(0)
        parts = (name for name in operator.trained if name in names)
        of_parts = dict(zip(parts, pulled, strict=False))  # none where none is needed
        grad_x = None if grad_x is None else grad_x.view(x.shape)
        return grad_x, grad_weight, grad_bias, None, None, None, *(of_parts.get(name) for name in names)
