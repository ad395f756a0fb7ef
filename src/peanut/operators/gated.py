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
        delta = self._opening() * self.values
        return delta if self.dtype is None else delta.to(self.dtype)

    def onto(self, weight: Tensor) -> Tensor:
        if weight.dtype != self.values.dtype:
            return super().onto(weight)
        return torch.addcmul(weight, self._opening(), self.values)

    def pull(self, grad: Tensor) -> tuple[Tensor, ...]:
        grad = grad.to(self.values.dtype)
        opening, slope = self._opened(self.logits)
        through = grad * self.values
        if self.group is None:
            return grad * opening, through * slope
        whole, rise = self._opened(self.group)
        own = (through * opening).sum() * rise
        return grad * opening * whole, through * slope * whole, own

    def to(self, dtype: torch.dtype) -> Gated:
        return replace(self, dtype=dtype)

    def _opening(self) -> Tensor:
        opening = gate(self.logits, self.low, self.high)
        return opening if self.group is None else gate(self.group, self.low, self.high) * opening

    def _opened(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """A gate and its derivative, zero where it is cut."""
        share = torch.sigmoid(logits)
        stretched = self.low + (self.high - self.low) * share
        opening = torch.clamp(stretched, 0, 1)
        slope = torch.addcmul(share, share, share, value=-1) * (self.high - self.low)
        return opening, slope * (opening == stretched)  # as the derivative of clamp has it


def gate(logits: Tensor, low: float, high: float) -> Tensor:
    """σ(α) stretched to (low, high) and cut to [0, 1]."""
    return torch.clamp(low + (high - low) * torch.sigmoid(logits), 0, 1)
