"""C3A: the update consists of circulant blocks, applied as convolutions (Chen et al. 2024, arXiv 2407.19342)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import PeanutError
from ..operators.circulant import Circulant
from ..protocols import Change, PeftConfig, Trial, Values, WeightMethod, register
from ..protocols.values import Count
from ..weights import FrozenLayer

__all__ = ["C3A", "C3AConfig"]


@dataclass(kw_only=True)
class C3AConfig(PeftConfig):
    """Config of C3A.

    Args:
        block_size: b, the width of a circulant block; it divides both dimensions of every adapted weight.
        bias: ``"none"``, ``"all"`` or ``"c3a_only"``: which biases are trained too.
        block_size_pattern: b for particular layers, by name or regular expression.
        init_weights: ``True``: zeros, so that nothing changes at first; ``"xavier_uniform"`` (or ``False``),
            ``"kaiming_uniform"`` or ``"gaussian"``: random.
    """

    method = "C3A"
    only_here = frozenset({"exclude_modules"})
    by_layer = (("block_size", "block_size_pattern"),)

    block_size: Count = 256
    bias: Literal["none", "all", "c3a_only"] = "none"
    block_size_pattern: dict[str, Count] = field(default_factory=dict)
    init_weights: bool | Literal["gaussian", "kaiming_uniform", "xavier_uniform"] = "xavier_uniform"


@register
class C3A(WeightMethod[C3AConfig]):
    """ΔW of blocks (b, b), the block (i, j) being kernel[i, j, (column − row) mod b] / in; kernel (out/b, in/b, b)."""

    config_class = C3AConfig
    kinds = ("linear", "conv1d", "conv", "embedding")
    size = "d_in * d_out // block_size"

    def tried(self, on: Trial) -> dict[str, Any]:
        return {"block_size": on.divisor(256)}

    def start(self, config: C3AConfig, layer: FrozenLayer, generator: torch.Generator) -> dict[str, Tensor]:
        out, inputs, b = layer.out_features, layer.in_features, config.block_size
        kernel = torch.zeros(out // b, inputs // b, b)
        if config.init_weights == "gaussian":
            nn.init.normal_(kernel, generator=generator)
        elif config.init_weights is not True:
            # The bounds are those of the whole matrix, not of the kernel.
            limit = math.sqrt(1 / inputs if config.init_weights == "kaiming_uniform" else 6 / (inputs + out))
            nn.init.uniform_(kernel, -limit, limit, generator=generator)
        return {"c3a_kernel": kernel}

    def change(self, config: C3AConfig, parameters: Values, layer: FrozenLayer) -> Change:
        return Change(delta=Circulant(parameters["c3a_kernel"], 1 / layer.in_features))

    def check(self, config: C3AConfig, layer: FrozenLayer, path: str) -> None:
        out, inputs, b = layer.out_features, layer.in_features, config.block_size
        if out % b or inputs % b:
            raise PeanutError(
                f"block_size={b} for '{path}' of {out}×{inputs}",
                f"a divisor of both, that is of {math.gcd(out, inputs)}",
                "change block_size, or set it for this layer in block_size_pattern",
            )
