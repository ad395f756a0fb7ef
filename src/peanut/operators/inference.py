"""Operators as evaluation keeps them: few tokens are answered from what was computed beforehand."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..versions import counted, version
from .operator import Operator

__all__ = ["FEW", "Settled", "WrittenOut", "few_tokens"]

FEW = 64
"""Up to so many tokens a settled operator answers from what was computed beforehand."""


@dataclass(frozen=True)
class Settled(Operator):
    """An operator in evaluation: few tokens are answered from what was computed beforehand, many as ever.

    Args:
        origin: the operator, in the dtype of the tokens.
        dtype: that dtype.
    """

    origin: Operator
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.origin.shape

    @property
    def few(self) -> int:
        """Up to so many tokens are answered from what was computed beforehand."""
        return FEW

    @abstractmethod
    def answer(self, tokens: Tensor) -> Tensor:
        """Δ on few tokens: (tokens, in) → (tokens, out)."""

    def add(self, y: Tensor, tokens: Tensor) -> None:
        """Adds Δ on few tokens, (tokens, in), to y, (tokens, out), in place."""
        y.add_(self.answer(tokens))

    def takes(self, x: Tensor) -> bool:
        """Whether x is few tokens."""
        return few_tokens(x, self.few)

    def apply(self, x: Tensor) -> Tensor:
        if not self.takes(x):
            return self.origin.apply(x)
        return self.answer(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self.shape[0])

    def joined(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.takes(x):
            return self.origin.joined(x, weight, bias)
        y = F.linear(x, weight, bias)
        self.add(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]))
        return y

    def dense(self) -> Tensor:
        return self.origin.dense()

    def factors(self) -> tuple[Tensor, Tensor] | None:
        return self.origin.factors()

    def rows(self, ids: Tensor) -> Tensor:
        return self.origin.rows(ids)

    def to(self, dtype: torch.dtype) -> Operator:  # type: ignore[override]
        return self.origin.to(dtype)

    def __reduce__(self) -> tuple[Any, ...]:  # sparse tensors cannot be copied, and a kept sum is not worth it
        return _settle, (self.origin, self.dtype)


@dataclass(frozen=True)
class WrittenOut(Settled):
    """Keeps W + Δ from the first few tokens until many come in: where nothing smaller than the weight makes up Δ.

    Generation asks for one token after the other; to make W + Δ for each would cost many times the product with it. In
    16 bits W + Δ would round most of a small Δ away, so there Δ is kept apart.
    """

    held: dict[Any, tuple[Tensor, Any]] = field(default_factory=dict, repr=False)

    def answer(self, tokens: Tensor) -> Tensor:
        return F.linear(tokens, self._hold(None, None))

    def apply(self, x: Tensor) -> Tensor:
        if not self.takes(x):
            self.held.clear()
        return super().apply(x)

    def joined(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.takes(x):
            self.held.clear()
        elif torch.finfo(weight.dtype).bits >= 32 and counted(weight):
            key = version(weight), weight.shape
            return F.linear(x, self._hold(key, weight), bias)
        return super().joined(x, weight, bias)

    def __reduce__(self) -> tuple[Any, ...]:
        return WrittenOut, (self.origin, self.dtype)

    def _hold(self, key: Any, weight: Tensor | None) -> Tensor:
        if key not in self.held:
            self.held.clear()
            if weight is None:
                self.held[key] = self.origin.dense(), None
            else:  # with the weight's memory, lest another weight comes to lie there
                self.held[key] = self.origin.onto(weight), weight.untyped_storage()
        return self.held[key][0]


def few_tokens(x: Tensor, most: int = FEW) -> bool:
    """Whether x, (…, in), is at most so many tokens; not in a compiled graph, which is to serve any number."""
    return 0 < x.numel() <= most * x.shape[-1] and not torch.compiler.is_compiling()


def _settle(origin: Operator, dtype: torch.dtype) -> Operator:
    return origin.settled(dtype)
