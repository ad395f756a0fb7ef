"""Nonlinear LoRA: a low-rank update with an activation in it (Zhong et al. 2024, arXiv 2410.01870, section 5.3).

The paper's ablation of PEANuT: a nonlinearity without the frozen weight as its input.
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
from .peanut import activation, check_activation

__all__ = ["NonlinearLora", "NonlinearLoraConfig"]


@dataclass(kw_only=True)
class NonlinearLoraConfig(PeftConfig):
    """Config of nonlinear LoRA.

    Args:
        r: rank.
        act_fn: the activation σ, a key of transformers' ``ACT2FN`` or ``"sine"``, sin 2πx.
        scaling: s.
        init_weights: start with B = 0, so that nothing changes at first; else B is random like A.
        dropout: dropout of the change's input.
        rank_pattern: r for particular layers, by name or regular expression.
    """

    method = "NONLINEAR_LORA"
    by_layer = (("r", "rank_pattern"),)

    r: Count = 32
    act_fn: str = "relu"
    scaling: Scale = 1.0
    init_weights: bool = True
    dropout: Probability = 0.0
    rank_pattern: dict[str, Count] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_activation(self.act_fn)


@register
class NonlinearLora(WeightMethod[NonlinearLoraConfig]):
    """ΔW = s · σ(A) · B with A (out, r), B (r, in): σ works entry by entry, so ΔW has rank r and is never built."""

    config_class = NonlinearLoraConfig
    kinds = ("linear", "conv1d", "conv", "embedding")
    size = "r * (d_in + d_out)"

    def start(self, config: NonlinearLoraConfig, layer: FrozenLayer, generator: torch.Generator) -> dict[str, Tensor]:
        activation(config.act_fn, layer.beside.device)  # made now, as torch.compile cannot make one with parameters
        # Drawn as (r, out), so that their spread goes by the layer's width, as in LoRA, and not by r.
        A = nn.init.kaiming_uniform_(torch.empty(config.r, layer.out_features), a=math.sqrt(5), generator=generator)
        B = torch.zeros(config.r, layer.in_features)
        if not config.init_weights:
            nn.init.kaiming_uniform_(B, a=math.sqrt(5), generator=generator)
        return {"nonlinear_lora_A.weight": A.T.contiguous(), "nonlinear_lora_B.weight": B}

    def change(self, config: NonlinearLoraConfig, parameters: Values, layer: FrozenLayer) -> Change:
        A, B = parameters["nonlinear_lora_A.weight"], parameters["nonlinear_lora_B.weight"]
        delta = LowRank(activation(config.act_fn, A.device)(A), B, config.scaling)
        return Change(delta=delta, dropout=config.dropout)
