"""BitFit: only biases are trained (Ben Zaken et al. 2021, arXiv 2106.10199)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import PeanutError
from ..protocols import Change, PeftConfig, Trial, Values, WeightMethod, register
from ..weights import FrozenLayer

__all__ = ["BitFit", "BitFitConfig"]


@dataclass(kw_only=True)
class BitFitConfig(PeftConfig):
    """Config of BitFit; ``target_modules`` of ``None`` takes every layer that has a bias."""

    method = "BITFIT"


@register
class BitFit(WeightMethod[BitFitConfig]):
    """b' = ``bias`` (out), which starts as the layer's own b; the weight stays."""

    config_class = BitFitConfig
    kinds = ("linear", "conv1d", "conv", "norm")
    size = "d_out"
    targets = "biases"

    def tried(self, on: Trial) -> dict[str, Any] | None:
        return {} if on.biases else None

    def check(self, config: BitFitConfig, layer: FrozenLayer, path: str) -> None:
        if layer.bias() is None:
            raise PeanutError(
                f"'{path}' ({layer.in_features} → {layer.out_features}) has no bias",
                "layers that have one",
                "take it out of target_modules, or put it into exclude_modules",
            )

    def start(self, config: BitFitConfig, layer: FrozenLayer, generator: torch.Generator) -> dict[str, Tensor]:
        return {"bias": own_bias(layer).detach().clone()}

    def change(self, config: BitFitConfig, parameters: Values, layer: FrozenLayer) -> Change:
        return Change(shift=parameters["bias"] - own_bias(layer))


def own_bias(layer: FrozenLayer) -> Tensor:
    """The bias of a layer that ``check`` has let through."""
    bias = layer.bias()
    assert bias is not None
    return bias
