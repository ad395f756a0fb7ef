"""``MixtureMethod``: the interface of methods that mix other adapters, token by token."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from .method import C, Method, Values

__all__ = ["MixtureMethod"]


class MixtureMethod(Method[C]):
    """A gate over adapters that only add to weights: y = W x + Σ_e g_e(token) · Δ_e x.

    The gates are computed from the last hidden states of a first pass through the base model.
    """

    @abstractmethod
    def experts(self, config: C) -> dict[str, Any]:
        """The names of the adapters that it mixes, each with its folder; empty for all that are in the model."""

    @abstractmethod
    def mixing(self, config: C, experts: dict[str, Any]) -> C:
        """The config with these experts."""

    def fitted(self, config: C, width: int) -> C:
        """The config with what it leaves open read off the model, whose hidden states have ``width`` entries."""
        return config

    def trains_experts(self, config: C) -> bool:
        """Whether the experts are trained together with the gate."""
        return False

    @abstractmethod
    def start(self, config: C, width: int, experts: int, layers: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The initial tensors, for hidden states of size ``width`` and these numbers of experts and of layers."""

    def first_pass(self, config: C) -> float:
        """The gate of every expert in the first pass; 0 for the bare base."""
        return 0.0

    @abstractmethod
    def gates(self, config: C, parameters: Values, hidden: Tensor, layers: int, training: bool) -> Tensor:
        """The gates, (batch, tokens, layers, experts), from hidden states (batch, tokens, width)."""

    def applied(self, config: C, gates: Tensor) -> Tensor:
        """What the experts' outputs are multiplied by, of the same shape as ``gates``."""
        return gates
