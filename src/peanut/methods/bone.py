"""Bone: the earlier name of MiSS, with a file format of its own (Kang & Yin 2024, arXiv 2409.15371)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..protocols import Change, PeftConfig, Values, WeightMethod, register
from ..protocols.values import Count
from ..weights import FrozenLayer
from .miss import check_blocks, first_block, repeated

__all__ = ["Bone", "BoneConfig"]


@dataclass(kw_only=True)
class BoneConfig(PeftConfig):
    """Config of Bone.

    Args:
        r: width of a block.
        init_weights: ``True``: one block for all inputs, zeros; ``False``: the same, random; ``"bat"``: blocks (r, r)
            that multiply those of the weight, zeros.
        bias: ``"none"``, ``"all"`` or ``"bone_only"``: which biases are trained too.
    """

    method = "BONE"

    r: Count = 8
    init_weights: bool | Literal["bat"] = True
    bias: Literal["none", "all", "bone_only"] = "none"


@register
class Bone(WeightMethod[BoneConfig]):
    """ΔW[o, i] = block[i mod r, o], block (r, out); "bat": (W⁰_ac + I) block_a, block (out/r, r, r)."""

    config_class = BoneConfig
    kinds = ("linear", "conv1d", "conv", "embedding")
    size = "r * d_out"

    def start(self, config: BoneConfig, layer: FrozenLayer, generator: torch.Generator) -> dict[str, Tensor]:
        return {"bone_block": first_block(config.r, layer.out_features, config.init_weights, generator)}

    def change(self, config: BoneConfig, parameters: Values, layer: FrozenLayer) -> Change:
        return Change(delta=repeated(parameters["bone_block"], layer))

    def check(self, config: BoneConfig, layer: FrozenLayer, path: str) -> None:
        check_blocks(config.r, config.init_weights, layer, path)
