"""Δ = s · up · down with factors of its own for each sample of a batch: what a mixture by task makes of its factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import PeanutError
from .delta import Delta, shaped

__all__ = ["PerSample"]


@dataclass(frozen=True)
class PerSample(Delta):
    """Δ_i = s · up_i · down_i for sample i, up (batch, out, r), down (batch, r, in); applied as s (x_i down_iᵀ) up_iᵀ.

    x is (batch, …, in); where it has more rows than there are samples, each sample has a run of them. There is no one
    matrix, so ``dense`` and ``rows`` are errors.
    """

    up: Tensor
    down: Tensor
    scaling: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[1], self.down.shape[2]

    def apply(self, x: Tensor) -> Tensor:
        each = x.reshape(len(self.down), -1, x.shape[-1])
        return ((each @ self.down.mT * self.scaling) @ self.up.mT).reshape(*x.shape[:-1], -1)

    def joined(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if torch.is_grad_enabled():
            return _JoinedProduct.apply(x, weight, bias, self.up, self.down, self.scaling)  # type: ignore[no-any-return, no-untyped-call]
        return _joined(x, weight, bias, self.up, self.down, self.scaling)

    def dense(self) -> Tensor:
        self._refuse()

    def rows(self, ids: Tensor) -> Tensor:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise PeanutError(
            "the weight of a layer that has another one for each sample", "one task for all", "see task_ids"
        )

    def to(self, dtype: torch.dtype) -> PerSample:
        return PerSample(self.up.to(dtype), self.down.to(dtype), self.scaling)


def _joined(x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor, down: Tensor, scaling: float) -> Tensor:
    each = x.reshape(len(down), -1, x.shape[-1])
    y = F.linear(each, weight, bias).baddbmm_(each @ down.mT, up.mT, alpha=scaling)
    return shaped(y, x.shape[:-1])


class _JoinedProduct(torch.autograd.Function):
    """y_i = x_i Wᵀ + b + s (x_i down_iᵀ) up_iᵀ for a frozen W; x_i down_iᵀ is computed again in the backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor, down: Tensor, scaling: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, up, down)
        ctx.scaling = scaling
        return _joined(x, weight, bias, up, down, scaling)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, up, down = ctx.saved_tensors
        need_x, need_weight, need_bias, need_up, need_down, _ = ctx.needs_input_grad
        each, grads = x.reshape(len(down), -1, x.shape[-1]), grad.reshape(len(down), -1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = grad_up = grad_down = None
        grad_hidden = (grads @ up).mul_(ctx.scaling) if need_x or need_down else None
        if grad_hidden is not None and need_x:
            grad_x = (grads @ weight).baddbmm_(grad_hidden, down).view(x.shape)
        if need_weight:
            grad_weight = grads.flatten(0, 1).T @ each.flatten(0, 1)
        if need_bias:
            grad_bias = grads.sum((0, 1))
        if need_up:
            grad_up = (grads.mT @ (each @ down.mT)).mul_(ctx.scaling)
        if grad_hidden is not None and need_down:
            grad_down = grad_hidden.mT @ each
        return grad_x, grad_weight, grad_bias, grad_up, grad_down, None
