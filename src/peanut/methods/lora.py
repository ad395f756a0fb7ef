"""LoRA: the update is a trained low-rank product (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import PeanutError
from ..operators import LowRank
from ..protocols import Change, PeftConfig, PeftType, WeightMethod, register
from ..protocols.config import check_finite, check_pattern, check_probability, check_whole, matching_pattern
from ..weights import FrozenLayer

__all__ = ["Lora", "LoraConfig"]


@dataclass(kw_only=True)
class LoraConfig(PeftConfig):
    """Config of LoRA.

    Args:
        r: rank.
        lora_alpha: α; the update is scaled by α/r.
        lora_dropout: dropout of the change's input.
        fan_in_fan_out: accepted and ignored: how a layer keeps its weight is read off the layer.
        bias: ``"none"``, or ``"lora_only"``: the adapted layers' biases are trained too.
        use_rslora: scale by α/√r instead.
        init_lora_weights: ``True``: A Kaiming-uniform, B = 0; ``"gaussian"``: A normal with σ = 1/r, B = 0; ``False``:
            both random.
        lora_bias: B has a bias of its own.
        rank_pattern, alpha_pattern: r and α for particular layers, by name or regular expression.
    """

    method = PeftType.LORA

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "lora_only"] = "none"
    use_rslora: bool = False
    init_lora_weights: bool | Literal["gaussian"] = True
    lora_bias: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.r = check_whole("r", self.r, least=1)
        check_finite("lora_alpha", self.lora_alpha)
        self.lora_dropout = check_probability("lora_dropout", self.lora_dropout)
        for name, r in self.rank_pattern.items():
            check_pattern("rank_pattern", name)
            check_whole(f"rank_pattern[{name!r}]", r, least=1)
        for name, alpha in self.alpha_pattern.items():
            check_pattern("alpha_pattern", name)
            check_finite(f"alpha_pattern[{name!r}]", alpha)
        if self.bias not in ("none", "lora_only"):
            raise PeanutError(f"bias={self.bias!r}", "'none' or 'lora_only'", "change bias")
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise PeanutError(f"init_lora_weights={self.init_lora_weights!r}", "True, False or 'gaussian'", "change it")

    def for_layer(self, path: str) -> LoraConfig:
        rank, alpha = matching_pattern(self.rank_pattern, path), matching_pattern(self.alpha_pattern, path)
        return replace(
            self,
            r=self.r if rank is None else self.rank_pattern[rank],
            lora_alpha=self.lora_alpha if alpha is None else self.alpha_pattern[alpha],
        )

    @property
    def scaling(self) -> float:
        """s = α/r, or α/√r."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@register
class Lora(WeightMethod[LoraConfig]):
    """ΔW = s · B · A with A (r, in), B (out, r), s = α/r or α/√r."""

    config_class = LoraConfig
    kinds = ("linear", "conv1d", "conv2d", "embedding")

    def start(self, config: LoraConfig, layer: FrozenLayer, generator: torch.Generator) -> dict[str, Tensor]:
        a, b = suffixes(layer)
        A, B = torch.empty(layer.down_shape(config.r)), torch.zeros(layer.up_shape(config.r))
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(A, std=1 / config.r, generator=generator)
        elif layer.kind.name == "embedding":
            # An embedding reads one column of A a token, so A is the factor that starts at zero.
            A.zero_()
            nn.init.normal_(B, generator=generator)
        else:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        if config.init_lora_weights is False:
            nn.init.normal_(A if layer.kind.name == "embedding" else B, generator=generator)
        values = {a: A, b: B}
        if config.lora_bias:
            values["lora_B.bias"] = torch.zeros(layer.out_features)
        bias = layer.bias()
        if config.bias == "lora_only" and bias is not None:
            values["base_layer.bias"] = bias.detach().clone()
        return values

    def change(self, config: LoraConfig, parameters: Mapping[str, Tensor], layer: FrozenLayer) -> Change:
        a, b = suffixes(layer)
        # A convolution's factors are kept as kernels; flattened they are the matrices.
        A, B = parameters[a].flatten(1), parameters[b].flatten(1)
        shift = None
        if config.lora_bias:
            shift = config.scaling * parameters["lora_B.bias"]
        bias = layer.bias()
        if bias is not None and "base_layer.bias" in parameters:
            moved = parameters["base_layer.bias"] - bias
            shift = moved if shift is None else shift + moved
        return Change(delta=LowRank(B, A, config.scaling), shift=shift, dropout=config.lora_dropout)


def suffixes(layer: FrozenLayer) -> tuple[str, str]:
    """The names under which files keep A and B."""
    if layer.kind.name == "embedding":
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A.weight", "lora_B.weight"
