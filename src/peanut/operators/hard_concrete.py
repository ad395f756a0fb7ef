"""Δ as a trained matrix times hard-concrete gates; the operator of diff pruning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .delta import captured
from .materialised import Materialised

__all__ = ["HardConcrete", "logistic"]

SPAN = 1 << 19
"""About how many entries are processed together on a CPU, so that intermediate results stay in its caches."""


@dataclass(frozen=True, eq=False)
class HardConcrete(Materialised):
    """Δ = gate(logits + noise) ⊙ gate(group) ⊙ values, gate(α) = clamp(low + (high − low) · σ(α), 0, 1).

    Args:
        values: (out, in).
        logits: (out, in).
        group: one logit for all entries together, (1), or ``None``.
        low, high: the range to which a gate is stretched before it is cut to [0, 1].
        dtype: that of Δ, the parts' own if ``None``. The gates are always made in the parts' dtype: in 16 bits a step
            of training would leave most of them where they are.
        seed: of the noise (``logistic``), which is drawn again wherever it is needed and so never saved; ``None``: no
            noise.
    """

    trained = ("values", "logits", "group")

    values: Tensor
    logits: Tensor
    group: Tensor | None = None
    low: float = -1.5
    high: float = 1.5
    dtype: torch.dtype | None = None
    seed: int | None = None

    def dense(self) -> Tensor:
        return self._joined(None, self._opening())

    def onto(self, weight: Tensor) -> Tensor:
        return self._joined(weight, self._opening())

    def pull(self, grad: Tensor) -> tuple[Tensor, ...]:
        grad = grad.to(self.values.dtype)
        opening, slope = self._opened(self._noisy())
        through = grad * self.values
        if self.group is None:
            return grad * opening, through * slope
        whole, rise = self._opened(self.group)
        own = (through * opening).sum() * rise
        return grad * opening * whole, through * slope * whole, own

    def pulled_through(self, grads: Tensor, tokens: Tensor, weight: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        if torch.is_grad_enabled() or captured():
            return super().pulled_through(grads, tokens, weight)
        stretched = self._stretched()  # the gates are made once for both
        grad_tokens = grads @ self._joined(weight, stretched.clamp(0, 1))
        return grad_tokens, self._pulled_in_place((grads.T @ tokens).to(self.values.dtype), stretched)

    def to(self, dtype: torch.dtype) -> HardConcrete:
        return replace(self, dtype=dtype)

    def _joined(self, weight: Tensor | None, opening: Tensor) -> Tensor:
        """W + Δ, or Δ alone, from the gates of the entries, which are overwritten if they are not needed again."""
        if self.group is not None:
            opening = self._opened(self.group)[0] * opening
        if weight is None or weight.dtype != self.values.dtype:
            delta = opening * self.values
            delta = delta if self.dtype is None else delta.to(self.dtype)
            return delta if weight is None else weight + delta
        if torch.is_grad_enabled() or captured() or weight.stride() != opening.stride():
            return torch.addcmul(weight, opening, self.values)
        return torch.addcmul(weight, opening, self.values, out=opening)

    def _opening(self) -> Tensor:
        if torch.is_grad_enabled() or captured():
            return self._opened(self._noisy())[0]
        return self._stretched().clamp_(0, 1)

    def _noisy(self) -> Tensor:
        generator = self._generator()
        if generator is None:
            return self.logits
        return self.logits + torch.cat([logistic(self.logits[rows], generator) for rows in self._spans()])

    def _generator(self) -> np.random.Generator | torch.Generator | None:
        if self.seed is None:
            return None
        if self.logits.device.type == "cpu":  # where torch's takes twice as long
            return np.random.Generator(np.random.SFC64(self.seed))
        return torch.Generator(self.logits.device).manual_seed(self.seed)

    def _spans(self) -> Iterator[slice]:
        """Rows that are dealt with together."""
        out, inputs = self.values.shape
        count = max(1, SPAN // inputs) if self.logits.device.type == "cpu" else out
        return (slice(first, first + count) for first in range(0, out, count))

    def _stretched(self) -> Tensor:
        """low + (high − low) · σ(logits + noise), without a gradient."""
        stretched, generator = torch.empty_like(self.logits), self._generator()
        for rows in self._spans():
            logits = self.logits[rows]
            if generator is not None:
                logits = logistic(logits, generator).add_(logits)
            torch.sigmoid(logits, out=stretched[rows]).mul_(self.high - self.low).add_(self.low)
        return stretched

    def _opened(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """A gate and its derivative, zero where it is cut."""
        share = torch.sigmoid(logits)
        stretched = self.low + (self.high - self.low) * share
        opening = torch.clamp(stretched, 0, 1)
        slope = torch.addcmul(share, share, share, value=-1) * (self.high - self.low)
        return opening, slope * (opening == stretched)  # as the derivative of clamp has it

    def _pulled_in_place(self, grad: Tensor, stretched: Tensor) -> tuple[Tensor, ...]:
        """``pull`` of ``grad`` from gates before their cut: both become gradients, a span of rows at a time."""
        whole, rise = (None, None) if self.group is None else self._opened(self.group)
        scale = 1 / (self.high - self.low) if whole is None else whole / (self.high - self.low)
        own = grad.new_zeros(1)
        for rows in self._spans():
            grads, slope = grad[rows], stretched[rows]
            opening, through = slope.clamp(0, 1), grads * self.values[rows]
            uncut = opening == slope
            grads.mul_(opening)
            if whole is not None:
                own += through.mul(opening).sum()
                grads.mul_(whole)
            # (high − low) σ (1 − σ) = (s − low) (high − s) / (high − low), s what σ is stretched to
            rest = self.high - slope
            slope.sub_(self.low).mul_(rest).mul_(uncut).mul_(through).mul_(scale)
        return (grad, stretched) if rise is None else (grad, stretched, own * rise)


def logistic(like: Tensor, draws: np.random.Generator | torch.Generator) -> Tensor:
    """log u − log(1 − u) for u = (k + ½) / 2¹⁶, k uniform in 0, …, 2¹⁶ − 1; of the shape, dtype and device of ``like``.

    Each draw of 64 random bits makes four of them.
    """
    count, dtype = -(-like.numel() // 4), torch.promote_types(like.dtype, torch.float32)
    if isinstance(draws, torch.Generator):
        bits = torch.empty(count, dtype=torch.int64, device=like.device).random_(-(2**63), None, generator=draws)
    else:
        bits = torch.from_numpy(draws.integers(-(2**63), 2**63, count))
    signed = bits.view(torch.int16)[: like.numel()].view(like.shape)
    return signed.to(dtype).mul_(2.0**-16).add_(0.5 + 2.0**-17).logit_().to(like.dtype)
