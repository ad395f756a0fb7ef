"""Multiplicative LoRA: the frozen weight times a low-rank product (Zhong et al. 2024, arXiv 2410.01870, section 5.3).

The paper's ablation of PEANuT: the frozen weight as the input, without a nonlinearity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..operators import LowRank
from ..protocols import Change, PeftConfig, Values, WeightMethod, register
from ..protocols.values import Count, Probability, Scale
from ..weights import FrozenLayer

__all__ = ["MultiplicativeLora", "MultiplicativeLoraConfig"]


@dataclass(kw_only=True)
class MultiplicativeLoraConfig(PeftConfig):
    """Config of multiplicative LoRA.

    Args:
        r: rank.
        scaling: s.
        init_weights: start with B = 0, so that nothing changes at first; else B is random like A.
        dropout: dropout of the change's input.
        rank_pattern: r for particular layers, by name or regular expression.
    """

    method = "MULTIPLICATIVE_LORA"
    by_layer = (("r", "rank_pattern"),)

    r: Count = 32
    scaling: Scale = 1.0
    init_weights: bool = True
    dropout: Probability = 0.0
    rank_pattern: dict[str, Count] = field(default_factory=dict)


@register
class MultiplicativeLora(WeightMethod[MultiplicativeLoraConfig]):
    """ΔW = s · W⁰ · A · B with A (in, r), B (r, in): W⁰A is (out, r), so ΔW has rank r and is never built."""

    config_class = MultiplicativeLoraConfig
    kinds = ("linear", "conv1d", "conv", "embedding")
    size = "2 * r * d_in"

    def start(
        self, config: MultiplicativeLoraConfig, layer: FrozenLayer, generator: torch.Generator
    ) -> dict[str, Tensor]:
        # A is drawn as (r, in), so that its spread goes by the layer's width, as in LoRA, and not by r.
        A, B = (torch.zeros(config.r, layer.in_features) for _ in "AB")
        for factor in (A,) if config.init_weights else (A, B):
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5), generator=generator)
        return {"multiplicative_lora_A.weight": A.T.contiguous(), "multiplicative_lora_B.weight": B}

    def change(self, config: MultiplicativeLoraConfig, parameters: Values, layer: FrozenLayer) -> Change:
        A, B = parameters["multiplicative_lora_A.weight"], parameters["multiplicative_lora_B.weight"]
        return Change(delta=LowRank(layer.product(A.T), B, config.scaling), dropout=config.dropout)
