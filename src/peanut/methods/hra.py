"""HRA: the layer's input goes through a product of Householder reflections (Yuan et al. 2024, arXiv 2405.17484)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import PeanutError
from ..operators.householder import Householder
from ..protocols import Change, PeftConfig, Values, WeightMethod, register
from ..protocols.values import Count
from ..weights import FrozenLayer
from .oft import turning

__all__ = ["HRA", "HRAConfig"]


@dataclass(kw_only=True)
class HRAConfig(PeftConfig):
    """Config of HRA.

    Args:
        r: number of reflections.
        apply_GS: make their directions orthogonal first (Gram-Schmidt).
        init_weights: start with pairs of equal reflections, so that for an even r nothing changes at first; else with
            random ones. An odd number of reflections, or orthogonal ones, never change nothing: there one is left over,
            and here all are random.
        bias: ``"none"``, ``"hra_only"`` (the adapted layers' biases are trained too) or ``"all"``.
        rank_pattern: r for particular layers, by name or regular expression.
    """

    method = "HRA"
    only_here = frozenset({"rank_pattern"})
    by_layer = (("r", "rank_pattern"),)

    r: Count = 8
    apply_GS: bool = False  # noqa: N815 - the name in files
    init_weights: bool = True
    bias: Literal["none", "all", "hra_only"] = "none"
    rank_pattern: dict[str, Count] = field(default_factory=dict)


@register
class HRA(WeightMethod[HRAConfig]):
    """W' = W · H₁ H₂ … H_r with H_i = I − 2 u_i u_iᵀ, u_i the columns of ``hra_u`` (in, r), normalised.

    With ``apply_GS`` the columns are made orthogonal, W' = W (I − 2 Q Qᵀ). No in × in matrix is built. An embedding has
    its output reflected, y = H₁ H₂ … H_r W e_id with u_i (out), which Hugging Face PEFT's does not.
    """

    config_class = HRAConfig
    kinds = ("linear", "conv1d", "conv", "embedding")
    size = "r * d_in"

    def check(self, config: HRAConfig, layer: FrozenLayer, path: str) -> None:
        side, width = layer.features
        if config.r > width:
            raise PeanutError(
                f"r={config.r} reflections for '{path}', whose {side} has {width} features",
                f"at most {width}",
                "lower r, there by rank_pattern",
            )

    def start(self, config: HRAConfig, layer: FrozenLayer, generator: torch.Generator) -> dict[str, Tensor]:
        paired = config.init_weights and not config.apply_GS
        u = torch.empty(layer.features[1], math.ceil(config.r / 2) if paired else config.r)
        nn.init.kaiming_uniform_(u, a=math.sqrt(5), generator=generator)
        return {"hra_u": u.repeat_interleave(2, dim=1)[:, : config.r].contiguous() if paired else u}

    def change(self, config: HRAConfig, parameters: Values, layer: FrozenLayer) -> Change:
        u = parameters["hra_u"]
        return turning(layer, Householder.orthogonal(u) if config.apply_GS else Householder.reflections(u))
