"""The change of a layer, the one thing that a weight method returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..operators import Operator

__all__ = ["Change"]


@dataclass(frozen=True)
class Change:
    """y = W x + b becomes y = (W + Δ) x + (b + shift).

    From this value alone the library derives the forward, merge and unmerge, several adapters at once (their changes
    add), adapters per sample, and the export.

    Args:
        delta: Δ, an operator of shape (out, in).
        shift: what is added to the bias, (out).
        dropout: probability with which, in training, an entry of Δ's input is zeroed.
    """

    delta: Operator | None = None
    shift: Tensor | None = None
    dropout: float = 0.0
