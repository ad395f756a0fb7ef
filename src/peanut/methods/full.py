"""Full fine-tuning: every parameter of the model is trained; the upper bound in every comparison."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..protocols import Change, PeftConfig, Values, WeightMethod, register
from ..weights import FrozenLayer

__all__ = ["Full", "FullConfig"]


@dataclass(kw_only=True)
class FullConfig(PeftConfig):
    """Config of full fine-tuning. The base stays beside the trained copy, so that the adapter can be disabled."""

    method = "FULL"


@register
class Full(WeightMethod[FullConfig]):
    """W' trained freely, in whole modules rather than as a change of layers."""

    config_class = FullConfig
    kinds = ()
    size = "all"
    trains = "all"

    def start(self, config: FullConfig, layer: FrozenLayer, generator: torch.Generator) -> dict[str, Tensor]:
        return {}

    def change(self, config: FullConfig, parameters: Values, layer: FrozenLayer) -> Change:
        return Change()
