"""LayerNorm tuning: only normalisation layers are trained (Zhao et al. 2023, arXiv 2312.11420)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..operators.dense import Dense
from ..protocols import Change, PeftConfig, Values, WeightMethod, register
from ..weights import FrozenLayer

__all__ = ["LNTuning", "LNTuningConfig"]

WEIGHT, BIAS = "ln_tuning_layers.weight", "ln_tuning_layers.bias"


@dataclass(kw_only=True)
class LNTuningConfig(PeftConfig):
    """Config of LayerNorm tuning; ``target_modules`` of ``None`` takes the model's norms, and may name any layers."""

    method = "LN_TUNING"
    only_here = frozenset({"layers_to_transform", "layers_pattern"})


@register
class LNTuning(WeightMethod[LNTuningConfig]):
    """y = n(x) ⊙ w + b with new w and b (features): ``ln_tuning_layers.weight`` and, if the norm has one, ``.bias``.

    They start as the norm's own. Seen as a layer, the norm's matrix is w as (features, 1). Of a layer of another kind
    that ``target_modules`` names, w is the weight.
    """

    config_class = LNTuningConfig
    kinds = ("norm", "linear", "conv1d", "conv", "embedding")
    size = "2 * d_out"
    targets = "norms"

    def start(self, config: LNTuningConfig, layer: FrozenLayer, generator: torch.Generator) -> dict[str, Tensor]:
        weight = layer.kind.layout(layer.module, layer.matrix())
        bias, values = layer.bias(), {WEIGHT: weight.detach().clone()}
        return values if bias is None else {**values, BIAS: bias.detach().clone()}

    def change(self, config: LNTuningConfig, parameters: Values, layer: FrozenLayer) -> Change:
        delta = layer.kind.matrix(layer.module, parameters[WEIGHT]) - layer.matrix()
        bias = layer.bias()
        return Change(delta=Dense(delta), shift=None if bias is None else parameters[BIAS] - bias)
