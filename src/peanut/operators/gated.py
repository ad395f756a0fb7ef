"""Δ as a trained matrix behind trained gates."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .built import Built

__all__ = ["Gated", "gate"]


@dataclass(frozen=True)
class Gated(Built):
    """Δ = gate(logits) ⊙ gate(group) ⊙ values, gate(α) = clamp(low + (high − low) · σ(α), 0, 1).

    Args:
        values: (out, in).
        logits: (out, in).
        group: one logit for all entries together, (1), or ``None``.
        low, high: the range to which a gate is stretched before it is cut to [0, 1].
        dtype: that of Δ, the parts' own if ``None``. The gates are always made in the parts' dtype: in 16 bits a step
            of training would leave most of them where they are.
    """

    values: Tensor
    logits: Tensor
    group: Tensor | None = None
    low: float = -1.5
    high: float = 1.5
    dtype: torch.dtype | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def parts(self) -> tuple[Tensor, ...]:
        return (self.values, self.logits) if self.group is None else (self.values, self.logits, self.group)

    def dense(self) -> Tensor:
        delta = gate(self.logits, self.low, self.high) * self.values
        if self.group is not None:
            delta = gate(self.group, self.low, self.high) * delta
        return delta if self.dtype is None else delta.to(self.dtype)

    def pull(self, grad: Tensor) -> tuple[Tensor, ...]:
        grad = grad.to(self.values.dtype)
        opening = gate(self.logits, self.low, self.high)
        through = grad * self.values
        if self.group is None:
            return grad * opening, through * self._slope(self.logits)
        whole = gate(self.group, self.low, self.high)
        own = (through * opening).sum() * self._slope(self.group)
        return grad * opening * whole, through * self._slope(self.logits) * whole, own

    def to(self, dtype: torch.dtype) -> Gated:
        return replace(self, dtype=dtype)

    def _slope(self, logits: Tensor) -> Tensor:
        """The derivative of a gate; zero where it is cut."""
        share = torch.sigmoid(logits)
        stretched = self.low + (self.high - self.low) * share
        inside = (stretched >= 0) & (stretched <= 1)  # as the derivative of clamp has it
        return (self.high - self.low) * share * (1 - share) * inside


def gate(logits: Tensor, low: float, high: float) -> Tensor:
    """σ(α) stretched to (low, high) and cut to [0, 1]."""
    return torch.clamp(low + (high - low) * torch.sigmoid(logits), 0, 1)
