"""OFT: the layer's input is rotated in blocks (Qiu et al. 2023, arXiv 2306.07280; input: 2025, arXiv 2506.19847)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from ..errors import PeanutError
from ..operators.block_factors import BlockFactors
from ..operators.cayley import cayley, cayley_neumann
from ..operators.rotation import Rotation
from ..protocols import Change, PeftConfig, Trial, Values, WeightMethod, register
from ..protocols.values import Bound, Positive, Probability, Whole
from ..weights import FrozenLayer

__all__ = ["OFT", "OFTConfig", "nearest_divisors", "turning"]

WEIGHT, OF_EMBEDDING = "oft_R.weight", "oft_embedding_R.weight"


_Terms = Annotated[int, Bound("a whole number between 1 and 1000", lambda value: 1 <= value <= 1000)]
"""A series that needs more terms does not converge."""


@dataclass(kw_only=True)
class OFTConfig(PeftConfig):
    """Config of OFT.

    Args:
        r: number of blocks; 0 if ``oft_block_size`` is given, 8 if neither is.
        oft_block_size: features of a block; 0 if ``r`` is given.
        module_dropout: probability with which, in a forward of training, a block is the identity.
        fan_in_fan_out: accepted and ignored: how a layer stores its weight is read off the layer.
        bias: ``"none"``, ``"oft_only"`` (the adapted layers' biases are trained too) or ``"all"``.
        init_weights: start with no rotation; else with a random one.
        coft: hold every block's S near 0: ‖S‖ ≤ eps/√blocks.
        eps: how near.
        block_share: one block for all.
        use_cayley_neumann: the first terms of a series for the rotation by −S, in place of the exact rotation by S. It
            is far from orthogonal once S is not small. (PEFT's default; here it is for files that have it.)
        num_cayley_neumann_terms: how many terms; three are taken as four.
    """

    method = "OFT"

    r: Whole | None = None
    oft_block_size: Whole | None = None
    module_dropout: Probability = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "oft_only"] = "none"
    init_weights: bool = True
    coft: bool = False
    eps: Positive = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: _Terms = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is None and self.oft_block_size is None:
            self.r = 8
        self.r = self.r or 0
        self.oft_block_size = self.oft_block_size or 0
        if bool(self.r) == bool(self.oft_block_size):
            raise PeanutError(
                f"r={self.r} and oft_block_size={self.oft_block_size}", "exactly one of them, the other 0", "choose one"
            )

    def block_size(self, width: int) -> int:
        """The features of a block in a layer with ``width`` of them."""
        return self.oft_block_size or width // (self.r or 1)


@register
class OFT(WeightMethod[OFTConfig]):
    """W' = W · R, R = diag(R₁, …, R_n), R_i = (I + S_i)(I − S_i)⁻¹ with S_i skew-symmetric (b, b), n·b = in.

    ``oft_R.weight`` (n, b(b−1)/2) holds the upper triangles of the S_i row by row; (1, b(b−1)/2) if they are shared. On
    a convolution in = in_channels/groups·∏k, the features of a patch. An embedding has its output rotated, y = R W e_id
    and n·b = out, by ``oft_embedding_R.weight``.
    """

    config_class = OFTConfig
    kinds = ("linear", "conv1d", "conv", "embedding")
    size = "d_in * (d_in // r - 1) // 2"

    def tried(self, on: Trial) -> dict[str, Any]:
        return {"oft_block_size": on.divisor(32), "r": 0}

    def check(self, config: OFTConfig, layer: FrozenLayer, path: str) -> None:
        (side, width), name = layer.features, "r" if config.r else "oft_block_size"
        value: int = getattr(config, name)
        if width % value or config.block_size(width) < 2:
            raise PeanutError(
                f"{name}={value} for '{path}', whose {side} has {width} features",
                f"a divisor of {width} that leaves blocks of at least 2",
                f"nearest divisors: {nearest_divisors(value, width, sizes=not config.r)}",
            )

    def start(self, config: OFTConfig, layer: FrozenLayer, generator: torch.Generator) -> dict[str, Tensor]:
        _, width = layer.features
        b = config.block_size(width)
        weight = torch.zeros(1 if config.block_share else width // b, b * (b - 1) // 2)
        if not config.init_weights:
            nn.init.normal_(weight, std=0.1, generator=generator)
        name = OF_EMBEDDING if layer.kind.name == "embedding" else WEIGHT
        return {name: held(weight, config.eps) if config.coft else weight}

    def change(self, config: OFTConfig, parameters: Values, layer: FrozenLayer) -> Change:
        _, width = layer.features
        weight, b = parameters[name_in(parameters)], config.block_size(width)
        if config.coft:
            # The gradient of the held point is handed on: a step from there, as in projected gradient descent.
            weight = held(weight, config.eps).detach() + (weight - weight.detach())
        S = skew(weight, b)
        blocks = cayley_neumann(-S, config.num_cayley_neumann_terms) if config.use_cayley_neumann else cayley(S)
        return turning(layer, BlockFactors.diagonal(blocks, width // (b * blocks.shape[0])))

    def sampled(self, config: OFTConfig, parameters: Values) -> Values:
        """Blocks dropped at random: with S = 0 a block is the identity."""
        if not config.module_dropout:
            return parameters
        name = name_in(parameters)
        weight = parameters[name]
        dropped = torch.rand(weight.shape[0], 1, device=weight.device) < config.module_dropout
        return {**parameters, name: torch.where(dropped, torch.zeros_like(weight), weight)}

    def after_step(self, config: OFTConfig, layers: Sequence[Values]) -> None:
        """Takes the parameters themselves back into the ball, so that an optimizer never runs away from it."""
        if config.coft:
            for values in layers:
                weight = values[name_in(values)]
                weight.copy_(held(weight, config.eps))


def name_in(values: Values) -> str:
    """The name of a layer's upper triangles."""
    return OF_EMBEDDING if OF_EMBEDDING in values else WEIGHT


def turning(layer: FrozenLayer, rotation: Rotation) -> Change:
    """The change that rotates a layer's input, or the output of one whose input is ids."""
    return Change(rotation=rotation) if layer.kind.takes_activations else Change(left=rotation)


def skew(weight: Tensor, b: int) -> Tensor:
    """Upper triangles (n, b(b−1)/2), row by row, as skew-symmetric matrices (n, b, b)."""
    row, column = torch.triu_indices(b, b, 1, device=weight.device)
    upper = weight.new_zeros(weight.shape[0], b, b)
    upper[:, row, column] = weight
    return upper - upper.transpose(1, 2)


def held(weight: Tensor, eps: float) -> Tensor:
    """The nearest upper triangles (n, …) with ‖S_i‖ ≤ eps/√n for every block (constrained OFT)."""
    limit = eps / math.sqrt(weight.shape[0])
    norm = math.sqrt(2) * weight.norm(dim=1, keepdim=True)  # each entry stands twice in S
    return torch.where(norm > limit, weight * (limit / norm.clamp_min(limit)), weight)


def nearest_divisors(value: int, width: int, *, sizes: bool) -> str:
    """The sizes (or numbers) of equal blocks of at least 2 of ``width`` features next to ``value``, in words."""
    possible = [size for size in range(2, width + 1) if width % size == 0]
    possible = possible if sizes else sorted(width // size for size in possible)
    below, above = [n for n in possible if n < value][-1:], [n for n in possible if n > value][:1]
    return " and ".join(map(str, below + above)) or "none"
