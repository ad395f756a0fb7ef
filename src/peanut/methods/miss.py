"""MiSS: the update repeats one block along the input (Kang & Yin 2024, arXiv 2409.15371)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import PeanutError
from ..operators import Delta
from ..operators.blockwise import BlockAffine, Blockwise
from ..protocols import Change, PeftConfig, Values, WeightMethod, register
from ..protocols.values import Count, Probability
from ..weights import FrozenLayer

__all__ = ["Miss", "MissConfig", "check_blocks", "first_block", "repeated"]


@dataclass(kw_only=True)
class MissConfig(PeftConfig):
    """Config of MiSS.

    Args:
        r: width of a block of the input, the rank of ΔW.
        miss_dropout: dropout of the change's input.
        mini_r: height of the block for ``init_weights="mini"``.
        init_weights: ``True``: one block for all inputs, zeros; ``False``: the same, random; ``"mini"``: one block for
            all inputs and outputs, zeros; ``"bat"``: blocks (r, r) that multiply those of the weight, zeros.
        bias: ``"none"``, ``"all"`` or ``"MiSS_only"``: which biases are trained too.
    """

    method = "MISS"

    r: Count = 64
    miss_dropout: Probability = 0.0
    mini_r: Count = 1
    init_weights: bool | Literal["bat", "mini"] = True
    bias: Literal["none", "all", "MiSS_only"] = "none"


@register
class Miss(WeightMethod[MissConfig]):
    """ΔW[o, i] = block[i mod r, o], block (r, out); "mini": block[i mod r, o mod mini_r], block (r, mini_r).

    ``"bat"``: (W⁰_ac + I) block_a for the blocks (r, r) of the frozen weight, block (out/r, r, r).
    """

    config_class = MissConfig
    kinds = ("linear", "conv1d", "conv", "embedding")
    size = "r * d_out"
    styles = (("MISS_BAT", "init_weights", "bat"),)

    def start(self, config: MissConfig, layer: FrozenLayer, generator: torch.Generator) -> dict[str, Tensor]:
        width = config.mini_r if config.init_weights == "mini" else layer.out_features
        return {"miss_block": first_block(config.r, width, config.init_weights, generator)}

    def change(self, config: MissConfig, parameters: Values, layer: FrozenLayer) -> Change:
        return Change(delta=repeated(parameters["miss_block"], layer), dropout=config.miss_dropout)

    def check(self, config: MissConfig, layer: FrozenLayer, path: str) -> None:
        check_blocks(config.r, config.init_weights, layer, path)
        if config.init_weights == "mini" and layer.out_features % config.mini_r:
            raise PeanutError(
                f"mini_r={config.mini_r} for '{path}' with {layer.out_features} outputs",
                f"a divisor of {layer.out_features}",
                "change mini_r",
            )


def first_block(r: int, width: int, init_weights: bool | str, generator: torch.Generator) -> Tensor:
    """The block that is trained, as it starts."""
    if init_weights == "bat":
        return torch.zeros(width // r, r, r)
    block = torch.zeros(r, width)
    return block if init_weights else nn.init.kaiming_uniform_(block, a=math.sqrt(5), generator=generator)


def repeated(block: Tensor, layer: FrozenLayer) -> Delta:
    """The change that a block makes, of three dimensions if it multiplies the frozen weight."""
    if block.ndim == 3:
        return BlockAffine(block, layer.matrix())
    return Blockwise(block, (layer.out_features, layer.in_features))


def check_blocks(r: int, init_weights: bool | str, layer: FrozenLayer, path: str) -> None:
    """Refuses blocks that do not fit a layer.

    Raises:
        PeanutError: r is wider than the input, or, for "bat", divides not both dimensions.
    """
    out, inputs = layer.out_features, layer.in_features
    if init_weights == "bat" and (out % r or inputs % r):
        raise PeanutError(
            f"r={r} with init_weights='bat' for '{path}' of {out}×{inputs}",
            f"a divisor of both, that is of {math.gcd(out, inputs)}",
            "change r",
        )
    if r > inputs:
        raise PeanutError(f"r={r} for '{path}' with {inputs} inputs", f"at most {inputs}", "lower r")
