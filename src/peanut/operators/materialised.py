"""Base class of operators whose Δ is built as a matrix in each forward and again in each backward, but never stored."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .delta import Delta, product_dtype, shaped
from .inference import WrittenOut

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Materialised"]


@dataclass(frozen=True)
class Materialised(Delta):
    """A Δ for which no order of products is cheaper than building it from its small parts.

    A subclass is a frozen dataclass whose fields are tensors, or plain values (numbers, strings, tuples of them), and
    gives three things: ``parts()``, ``dense()`` in ordinary differentiable torch, and ``pull``, its backward.

    Laws, besides those of every operator: ``pull(g)`` is the gradient of ``(dense() * g).sum()`` with respect to
    ``parts()``; both work in any floating dtype, and ``dense()`` is in that of the parts. ``pulled(g, x)`` is
    ``pull(gᵀ x)``, and differentiable where gradients are on.
    """

    @abstractmethod
    def parts(self) -> tuple[Tensor, ...]:
        """The fields that are trained: the tensors to which gradients flow."""

    @abstractmethod
    def pull(self, grad: Tensor) -> tuple[Tensor, ...]:
        """The gradients of ``parts()`` given that of the dense Δ, (out, in)."""

    def pulled(self, grads: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """The gradients of ``parts()`` given (tokens, out) and (tokens, in), whose product would be that of Δ."""
        return self.pull(grads.T @ tokens)

    def pulled_through(self, grads: Tensor, tokens: Tensor, weight: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(grads (W + Δ), ``pulled(grads, tokens)``), or grads Δ without a W: what a backward needs, in one go."""
        return grads @ (self.dense() if weight is None else self.onto(weight)), self.pulled(grads, tokens)

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
        return self._made().T[ids]

    def to(self, dtype: torch.dtype) -> Self:
        cast = {name: value.to(dtype) for name, value in self._tensors().items() if value.is_floating_point()}
        return replace(self, **cast)

    def for_inference(self, dtype: torch.dtype) -> Delta:
        return WrittenOut(self.to(dtype))

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def _taken_apart(self) -> tuple[Any, ...]:
        """What a backward needs to make this operator again: its class, plain values, and tensors by name."""
        tensors = self._tensors()
        plain = tuple((field.name, getattr(self, field.name)) for field in fields(self) if field.name not in tensors)
        parts = self.parts()
        trained = tuple(next(n for n, value in tensors.items() if value is part) for part in parts)
        other = tuple(name for name in tensors if name not in trained)
        return type(self), plain, trained, other, *parts, *(tensors[name] for name in other)

    def _product(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        dtype = product_dtype(x)
        operator = self.to(dtype)
        weight, bias = (None if value is None else value.to(dtype) for value in (weight, bias))
        if not torch.is_grad_enabled():
            return F.linear(x.to(dtype), operator.dense() if weight is None else operator.onto(weight), bias)
        return _Product.apply(x.to(dtype), weight, bias, *operator._taken_apart())  # type: ignore[no-any-return, no-untyped-call]

    def _made(self) -> Tensor:
        """Δ, (out, in), whose backward is ``pull`` and saves the parts alone."""
        if not torch.is_grad_enabled():
            return self.dense()
        return _Made.apply(*self._taken_apart())  # type: ignore[no-any-return, no-untyped-call]


def _again(
    made_of: type[Materialised], plain: Any, names: tuple[str, ...], tensors: tuple[Tensor, ...]
) -> Materialised:
    return made_of(**dict(plain), **dict(zip(names, tensors, strict=True)))


class _Product(torch.autograd.Function):
    """y = x (W + Δ)ᵀ + b, or x Δᵀ without a W; saves x, W and the parts of Δ."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        made_of: type[Materialised],
        plain: Any,
        trained: tuple[str, ...],
        other: tuple[str, ...],
        *tensors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, *tensors)
        ctx.recipe = made_of, plain, trained, other
        operator = _again(made_of, plain, trained + other, tensors)
        tokens = x.reshape(-1, x.shape[-1])
        return shaped(
            F.linear(tokens, operator.dense() if weight is None else operator.onto(weight), bias), x.shape[:-1]
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *tensors = ctx.saved_tensors
        made_of, plain, trained, other = ctx.recipe
        operator = _again(made_of, plain, trained + other, tuple(tensors))
        grads = grad.reshape(-1, grad.shape[-1])
        tokens = x.reshape(-1, x.shape[-1])
        grad_x = grad_weight = grad_bias = None
        pulled: tuple[Tensor | None, ...] = (None,) * len(trained)
        need_x, need_weight, need_parts = (
            ctx.needs_input_grad[0],
            ctx.needs_input_grad[1],
            any(ctx.needs_input_grad[7:]),
        )
        if need_weight:
            grad_weight = grads.T @ tokens
            pulled = operator.pull(grad_weight) if need_parts else pulled
        elif need_x and need_parts:
            grad_x, pulled = operator.pulled_through(grads, tokens, weight)
        elif need_parts:
            pulled = operator.pulled(grads, tokens)
        if need_x:
            if grad_x is None:
                grad_x = grads @ (operator.dense() if weight is None else operator.onto(weight))
            grad_x = grad_x.view(x.shape)
        if ctx.needs_input_grad[2]:
            grad_bias = grads.sum(0)
        return grad_x, grad_weight, grad_bias, None, None, None, None, *pulled, *(None for _ in other)


class _Made(torch.autograd.Function):
    """Δ written out."""

    @staticmethod
    def forward(
        ctx: Any,
        made_of: type[Materialised],
        plain: Any,
        trained: tuple[str, ...],
        other: tuple[str, ...],
        *tensors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.recipe = made_of, plain, trained, other
        return _again(made_of, plain, trained + other, tensors).dense()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        made_of, plain, trained, other = ctx.recipe
        operator = _again(made_of, plain, trained + other, ctx.saved_tensors)
        return None, None, None, None, *operator.pull(grad), *(None for _ in other)
