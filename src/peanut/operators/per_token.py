"""A sum of low-rank Δ, each behind a gate that every token has for itself: what a mixture makes of its experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import PeanutError
from .low_rank import LowRank
from .operator import Operator
from .saved_outputs import shaped

__all__ = ["PerToken"]


@dataclass(frozen=True)
class PerToken(Operator):
    """Δ_t = Σ_e g_et Δ_e for token t, the gates g_e (…, 1) of each expert e with the shape of x before its last.

    There is no one matrix, so ``dense`` and ``rows`` are errors.
    """

    experts: tuple[LowRank, ...]
    gates: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.experts[0].shape

    def apply(self, x: Tensor) -> Tensor:
        each = zip(self.experts, self.gates, strict=True)
        return reduce(torch.add, (expert.weighted(x, gate) for expert, gate in each))

    def joined(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ups, downs = [expert.up for expert in self.experts], [expert.down for expert in self.experts]
        scalings = tuple(expert.scaling for expert in self.experts)
        if torch.is_grad_enabled():
            return _JoinedProduct.apply(x, weight, bias, scalings, *ups, *downs, *self.gates)  # type: ignore[no-any-return, no-untyped-call]
        return _joined(x, weight, bias, scalings, ups, downs, self.gates)

    def dense(self) -> Tensor:
        self._refuse()

    def rows(self, ids: Tensor) -> Tensor:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise PeanutError("the weight of a layer that has another one for each token", "a single expert", "name one")

    def to(self, dtype: torch.dtype) -> PerToken:
        experts = tuple(expert.to(dtype) for expert in self.experts)
        return PerToken(experts, tuple(gate.to(dtype) for gate in self.gates))


def _joined(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scalings: Sequence[float],
    ups: Sequence[Tensor],
    downs: Sequence[Tensor],
    gates: Sequence[Tensor],
) -> Tensor:
    tokens = x.reshape(-1, x.shape[-1])
    y = F.linear(tokens, weight, bias)
    for scaling, up, down, gate in zip(scalings, ups, downs, gates, strict=True):
        y.addmm_((tokens @ down.T).mul_(gate.reshape(-1, 1)), up.T, alpha=scaling)
    return shaped(y, x.shape[:-1])


class _JoinedProduct(torch.autograd.Function):
    """y = x Wᵀ + b + Σ_e s_e (g_e ⊙ x down_eᵀ) up_eᵀ for a frozen W; x down_eᵀ is computed again in the backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scalings: tuple[float, ...], *parts: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight, *parts)
        ctx.scalings = scalings
        return _joined(x, weight, bias, scalings, *_by_kind(parts, len(scalings)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *parts = ctx.saved_tensors
        need_x, need_weight, need_bias, _, *needed = ctx.needs_input_grad
        count = len(ctx.scalings)
        found: list[Tensor | None] = [None] * len(parts)
        tokens, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_x = grads @ weight if need_x else None
        for index, (scaling, up, down, gate) in enumerate(zip(ctx.scalings, *_by_kind(parts, count), strict=True)):
            need_up, need_down, need_gate = needed[index::count]
            column = gate.reshape(-1, 1)
            hidden = tokens @ down.T if need_up or need_gate else None
            grad_hidden = (grads @ up).mul_(scaling) if need_x or need_down or need_gate else None
            if hidden is not None and need_up:
                found[index] = (grads.T @ (hidden * column)).mul_(scaling)
            if hidden is not None and grad_hidden is not None and need_gate:
                found[2 * count + index] = (grad_hidden * hidden).sum(-1).view(gate.shape)
            if grad_hidden is not None:
                grad_hidden = grad_hidden * column
                if need_down:
                    found[count + index] = grad_hidden.T @ tokens
                grad_x = None if grad_x is None else grad_x.addmm_(grad_hidden, down)
        grad_weight = grads.T @ tokens if need_weight else None
        grad_bias = grads.sum(0) if need_bias else None
        return None if grad_x is None else grad_x.view(x.shape), grad_weight, grad_bias, None, *found


def _by_kind(parts: Sequence[Tensor], count: int) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """The ups, the downs and the gates of ``count`` experts."""
    return parts[:count], parts[count : 2 * count], parts[2 * count :]
