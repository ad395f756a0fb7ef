"""Partial fine-tuning: some modules, such as the last blocks, are trained whole (Lee et al. 2019, arXiv 1911.03090)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..protocols import Change, PeftConfig, Values, WeightMethod, register
from ..weights import FrozenLayer

__all__ = ["Partial", "PartialConfig"]


@dataclass(kw_only=True)
class PartialConfig(PeftConfig):
    """Config of partial fine-tuning: ``target_modules`` names modules of any kind, ``layers_to_transform`` blocks."""

    method = "PARTIAL"


@register
class Partial(WeightMethod[PartialConfig]):
    """W' trained freely, in whole modules rather than as a change of layers."""

    config_class = PartialConfig
    kinds = ()
    size = "those of the named modules"
    trains = "named"

    def start(self, config: PartialConfig, layer: FrozenLayer, generator: torch.Generator) -> dict[str, Tensor]:
        return {}

    def change(self, config: PartialConfig, parameters: Values, layer: FrozenLayer) -> Change:
        return Change()
