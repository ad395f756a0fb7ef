"""Linear probing: the backbone stays frozen and only the head is trained; the baseline of every comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..protocols import Change, PeftConfig, Trial, WeightMethod, register
from ..weights import FrozenLayer

__all__ = ["LinearProbing", "LinearProbingConfig"]


@dataclass(kw_only=True)
class LinearProbingConfig(PeftConfig):
    """Config of linear probing: ``modules_to_save``, or the head that ``task_type`` stands for, is what is trained."""

    method = "LINEAR_PROBING"


@register
class LinearProbing(WeightMethod[LinearProbingConfig]):
    """W' = W: no layer changes, so there is no kind of layer to name."""

    config_class = LinearProbingConfig
    kinds = ()
    size = "0"

    def tried(self, on: Trial) -> dict[str, Any] | None:
        return {} if on.head else None

    def start(self, config: LinearProbingConfig, layer: FrozenLayer, generator: torch.Generator) -> dict[str, Tensor]:
        return {}

    def change(self, config: LinearProbingConfig, parameters: Mapping[str, Tensor], layer: FrozenLayer) -> Change:
        return Change()
