"""BOFT: the layer's input is rotated by a butterfly product of block rotations (Liu et al. 2023, arXiv 2311.06243)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from ..errors import PeanutError
from ..operators import Diagonal
from ..operators.block_factors import BlockFactors
from ..operators.cayley import cayley
from ..protocols import Change, PeftConfig, Trial, Values, WeightMethod, register
from ..protocols.values import Bound, Probability, Whole
from ..weights import FrozenLayer
from .oft import nearest_divisors, turning

__all__ = ["BOFT", "BOFTConfig"]


_Factors = Annotated[int, Bound("a whole number from 1 to 64", lambda value: 1 <= value <= 64)]


@dataclass(kw_only=True)
class BOFTConfig(PeftConfig):
    """Config of BOFT.

    Args:
        boft_block_size: features of a block; 0 if ``boft_block_num`` is given.
        boft_block_num: number of blocks; 0 if ``boft_block_size`` is given.
        boft_n_butterfly_factor: number of factors; with f of them every output sees 2^(f-1) blocks.
        boft_dropout: probability with which, in a forward of training, a block of one factor drawn at random is
            the identity.
        fan_in_fan_out: accepted and ignored: how a layer stores its weight is read off the layer.
        bias: ``"none"``, ``"boft_only"`` (the adapted layers' biases are trained too) or ``"all"``.
        init_weights: start with no change; else with a random one.
    """

    method = "BOFT"

    boft_block_size: Whole = 4
    boft_block_num: Whole = 0
    boft_n_butterfly_factor: _Factors = 1
    boft_dropout: Probability = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "boft_only"] = "none"
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.boft_block_size) == bool(self.boft_block_num):
            raise PeanutError(
                f"boft_block_size={self.boft_block_size} and boft_block_num={self.boft_block_num}",
                "exactly one of them, the other 0",
                "choose one",
            )

    def block_size(self, width: int) -> int:
        """The features of a block in a layer with ``width`` of them."""
        return self.boft_block_size or width // self.boft_block_num


@register
class BOFT(WeightMethod[BOFTConfig]):
    """W' = diag(s) · W · R, R = F₀ F₁ … with F_i = P_i diag(R_i1, …, R_in) P_iᵀ; the bias is not scaled.

    R_ij = (I + S)(I − S)⁻¹ with S the skew-symmetric half (M − Mᵀ)/2 of M = ``boft_R[i, j]``. ``boft_R`` is
    (factors, n, b, b) with n·b = in; ``boft_s`` holds s: (out, 1), of a convolution (1, out). An embedding has
    its output rotated, y = diag(s) · R · W e_id and n·b = out, which Hugging Face PEFT's does not.
    """

    config_class = BOFTConfig
    kinds = ("linear", "conv1d", "conv", "embedding")
    size = "boft_n_butterfly_factor * boft_block_size * d_in + d_out"

    def tried(self, on: Trial) -> dict[str, Any]:
        return {"boft_block_size": on.divisor(4)}

    def check(self, config: BOFTConfig, layer: FrozenLayer, path: str) -> None:
        (side, width), name = layer.features, "boft_block_size" if config.boft_block_size else "boft_block_num"
        value: int = getattr(config, name)
        if width % value or config.block_size(width) < 2:
            raise PeanutError(
                f"{name}={value} for '{path}', whose {side} has {width} features",
                f"a divisor of {width} that leaves blocks of at least 2",
                f"nearest divisors: {nearest_divisors(value, width, sizes=bool(config.boft_block_size))}",
            )
        b, f = config.block_size(width), config.boft_n_butterfly_factor
        if f > 1 and (b % 2 or width % (b * 2 ** (f - 1))):
            raise PeanutError(
                f"boft_n_butterfly_factor={f} with {width // b} blocks of {b} for '{path}', whose {side} has {width} "
                "features",
                f"blocks of even size, their number a multiple of {2 ** (f - 1)}",
                "take fewer factors or other blocks",
            )

    def start(self, config: BOFTConfig, layer: FrozenLayer, generator: torch.Generator) -> dict[str, Tensor]:
        _, width = layer.features
        b = config.block_size(width)
        R = torch.zeros(config.boft_n_butterfly_factor, width // b, b, b)
        s = torch.ones((1, layer.out_features) if layer.kind.name == "conv" else (layer.out_features, 1))
        if not config.init_weights:
            nn.init.normal_(R, std=0.1, generator=generator)
            nn.init.normal_(s, mean=1.0, std=0.1, generator=generator)
        return {"boft_R": R, "boft_s": s}

    def change(self, config: BOFTConfig, parameters: Values, layer: FrozenLayer) -> Change:
        M = parameters["boft_R"]
        rotations = cayley(0.5 * (M - M.transpose(2, 3)))
        gains, bias = parameters["boft_s"].flatten(), layer.bias()
        shift = None if bias is None else bias - gains.to(bias.dtype) * bias  # the bias itself is not scaled
        change = turning(layer, BlockFactors.butterfly(rotations))
        return Change.together([change, Change(left=Diagonal(gains), shift=shift)])

    def sampled(self, config: BOFTConfig, parameters: Values) -> Values:
        """Blocks of one factor dropped at random: with M = 0 a block is the identity."""
        if not config.boft_dropout:
            return parameters
        M = parameters["boft_R"]
        f, n = M.shape[:2]
        chosen = torch.arange(f, device=M.device) == torch.randint(f, (1,), device=M.device)
        dropped = chosen[:, None] & (torch.rand(f, n, device=M.device) < config.boft_dropout)
        return {**parameters, "boft_R": torch.where(dropped[:, :, None, None], torch.zeros_like(M), M)}

    def restored(self, config: BOFTConfig, layers: Mapping[str, Values]) -> dict[str, dict[str, Tensor]]:
        """As in the file; where PEFT found no compiler and kept one factor of several, the others are the identity."""
        restored = super().restored(config, layers)
        for values in restored.values():
            M = values.get("boft_R")
            missing = config.boft_n_butterfly_factor - 1
            if M is not None and M.dim() == 4 and M.shape[0] == 1 and missing:
                values["boft_R"] = torch.cat([M, M.new_zeros(missing, *M.shape[1:])])
        return restored
