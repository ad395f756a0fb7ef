"""Δ = s · up · down: the low-rank operator of LoRA, PEANuT and most of their relatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import PeanutError
from .delta import Delta, applied, shaped, transformed

__all__ = ["LowRank"]

NARROW = 8
"""x downᵀ is saved for the backward if r is at most 1/8 of in."""


@dataclass(frozen=True, eq=False)
class LowRank(Delta):
    """Δ = scaling · up · down with up (out, r) and down (r, in); applied as scaling · (x downᵀ) upᵀ, never built.

    The scaling stays a number beside the factors, so that a trained factor is used as it is and no copy of it is
    saved for the backward.

    With a gate each token has a Δ of its own, Δ_t = scaling · up · diag(g_t) · down, so that experts of a mixture, or
    the adapters of a batch's samples, act by one product. There is then no one matrix: ``dense`` is an error, and
    ``factors`` gives none.

    Args:
        up: (out, r).
        down: (r, in).
        scaling: s.
        gate: (…, e) with the shape of x before its last (or broadcast to it): g_t for each of e parts of the ranks.
        parts: how many ranks belong to each of the gate's entries.
    """

    up: Tensor
    down: Tensor
    scaling: float = 1.0
    gate: Tensor | None = None
    parts: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    @property
    def rank(self) -> int:
        """r, the number of columns of up."""
        return self.up.shape[1]

    def apply(self, x: Tensor) -> Tensor:
        return F.linear(self._weighted(F.linear(x, self.down)), self.scaled_up())

    def rows(self, ids: Tensor) -> Tensor:
        return F.linear(self._weighted(F.embedding(ids, self.down.T)), self.scaled_up())

    def _weighted(self, hidden: Tensor) -> Tensor:
        """The r numbers of each token times its gate."""
        return hidden if self.gate is None else hidden * _spread(self.gate.to(hidden.dtype), self.parts)

    def dense(self) -> Tensor:
        if self.gate is not None:
            raise PeanutError(
                "the weight of a layer that has another one for each token", "one adapter for all", "name one"
            )
        return self.scaled_up() @ self.down

    def factors(self) -> tuple[Tensor, Tensor] | None:
        return None if self.gate is not None else (self.scaled_up(), self.down)

    def scaled_up(self) -> Tensor:
        """scaling · up, (out, r)."""
        return self.up if self.scaling == 1.0 else self.up * self.scaling

    def gated(self, gate: Tensor) -> LowRank:
        """g_t Δ for every token t, gate (…, 1)."""
        return LowRank(self.up, self.down, self.scaling, gate, (self.rank,))

    def joined(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (W + Δ)ᵀ + b in one go: the frozen product and Δ's share one output and one gradient buffer.

        Args:
            x: (…, in).
            weight: the frozen matrix W, (out, in).
            bias: b, (out), or ``None``.

        Returns:
            (…, out). The backward saves x, which it needs for the factors' gradient, and at most r numbers a token.
        """
        if transformed():
            return super().joined(x, weight, bias)
        gate = self.gate
        if gate is not None:
            gate = gate.to(x.dtype).expand(*x.shape[:-1], -1).reshape(-1, gate.shape[-1])
        arguments = (x, weight, bias, self.up, self.down, gate, self.scaling, self.parts)
        return applied(_JoinedProduct, *arguments) if torch.is_grad_enabled() else _joined(*arguments)[0]

    @staticmethod
    def sum(operators: Sequence[LowRank]) -> LowRank:
        """The sum of low-rank operators, again low-rank: the factors side by side, the ranks added.

        All of them have a gate, or none has.
        """
        if len(operators) == 1:
            return operators[0]
        gates = [operator.gate for operator in operators if operator.gate is not None]
        return LowRank(
            torch.cat([operator.scaled_up() for operator in operators], dim=1),
            torch.cat([operator.down for operator in operators], dim=0),
            gate=torch.cat(gates, dim=-1) if gates else None,
            parts=tuple(part for operator in operators for part in operator.parts),
        )


def _spread(gate: Tensor, parts: Sequence[int]) -> Tensor:
    """A gate for each rank, (…, r), of one for each part of the ranks, (…, e)."""
    if len(parts) == 1 or set(parts) == {1}:
        return gate
    each = [own.expand(*own.shape[:-1], part) for own, part in zip(gate.split(1, -1), parts, strict=True)]
    return torch.cat(each, dim=-1)


def _joined(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None,
    scaling: float,
    parts: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The product, and x downᵀ."""
    tokens = x.reshape(-1, x.shape[-1])
    y, hidden = F.linear(tokens, weight, bias), tokens @ down.T
    seen = hidden if gate is None else hidden * _spread(gate, parts)
    return shaped(y.addmm_(seen, up.T, alpha=scaling), x.shape[:-1]), hidden


class _JoinedProduct(torch.autograd.Function):
    """y = x Wᵀ + b + s (g ⊙ x downᵀ) upᵀ for a frozen W, g (tokens, e) or none.

    Autograd on its own would write the change's output and its gradient with respect to x to memory once more each,
    and add them in another pass. Here both are added inside the product that makes them (addmm). x downᵀ is saved if it
    is much smaller than x: computing it again is another pass over x.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, weight, _, up, down, gate, ctx.scaling, ctx.parts = arguments
        y, hidden = _joined(*arguments)
        narrow = len(down) * NARROW <= x.shape[-1]
        kept = narrow and (ctx.needs_input_grad[3] or ctx.needs_input_grad[5])
        ctx.save_for_backward(x, weight, up, down, gate, hidden if kept else None)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, up, down, gate, hidden = ctx.saved_tensors
        need_x, need_weight, need_bias, need_up, need_down, need_gate, *_ = ctx.needs_input_grad
        grads = grad.reshape(-1, grad.shape[-1])
        tokens = x.reshape(-1, x.shape[-1])
        grad_x = grad_weight = grad_bias = grad_up = grad_down = grad_gate = grad_hidden = None
        wide = None if gate is None else _spread(gate, ctx.parts)
        if need_x or need_down or need_gate:
            grad_hidden = (grads @ up).mul_(ctx.scaling)
        # Where the backward is itself differentiated, saved values must not be treated as constants.
        if (need_up or need_gate) and (hidden is None or torch.is_grad_enabled()):
            hidden = tokens @ down.T
        if need_up:
            grad_up = (grads.T @ (hidden if wide is None else hidden * wide)).mul_(ctx.scaling)
        if need_gate:
            each = (grad_hidden * hidden).split(ctx.parts, dim=-1)
            grad_gate = torch.stack([part.sum(-1) for part in each], dim=-1)
        if grad_hidden is not None and wide is not None:
            grad_hidden = grad_hidden * wide
        if grad_hidden is not None and need_x:
            grad_x = (grads @ weight).addmm_(grad_hidden, down).view(x.shape)
        if need_weight:
            grad_weight = grads.T @ tokens
        if need_bias:
            grad_bias = grads.sum(0)
        if grad_hidden is not None and need_down:
            grad_down = grad_hidden.T @ tokens
        return grad_x, grad_weight, grad_bias, grad_up, grad_down, grad_gate, None, None
