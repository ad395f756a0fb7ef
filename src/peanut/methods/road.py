"""RoAd: pairs of a layer's outputs are rotated and scaled (Liao & Monz 2024, arXiv 2409.00119)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from ..errors import PeanutError
from ..operators.pair_rotation import PairRotation
from ..protocols import Change, PeftConfig, Values, WeightMethod, register
from ..protocols.values import Bound
from ..weights import FrozenLayer

__all__ = ["Road", "RoadConfig"]

SHARE = {"road_1": 0.5, "road_2": 1.0, "road_4": 2.0}
"""How many angles, and scales, each variant trains for an output."""


_Even = Annotated[int, Bound("an even number above 0", lambda value: value > 0 and value % 2 == 0)]


@dataclass(kw_only=True)
class RoadConfig(PeftConfig):
    """Config of RoAd.

    Args:
        variant: ``"road_1"``: a pair of outputs shares an angle and a scale; ``"road_2"``: each output has its own;
            ``"road_4"``: each has two, one for itself and one for its partner.
        group_size: outputs in a group, an even number that divides all of them; i is paired with i + group_size / 2.
        init_weights: start with angles 0 and scales 1, so that nothing changes at first; else both are random.
    """

    method = "ROAD"
    only_here = frozenset({"exclude_modules", "layers_pattern", "layers_to_transform"})

    variant: str = "road_1"
    group_size: _Even = 64
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in SHARE:
            raise PeanutError(f"variant={self.variant!r}", f"one of {', '.join(SHARE)}", "change variant")


@register
class Road(WeightMethod[RoadConfig]):
    """W' = R W and b' = R b with R y = (α cos θ) ⊙ y + (α sin θ) ⊙ ỹ, ỹ the partners of y, the first ones negative."""

    config_class = RoadConfig
    kinds = ("linear", "conv1d")
    size = "int(variant[-1]) * d_out"

    def start(self, config: RoadConfig, layer: FrozenLayer, generator: torch.Generator) -> dict[str, Tensor]:
        count = int(SHARE[config.variant] * layer.out_features)
        theta, alpha = torch.zeros(count), torch.ones(count)
        if not config.init_weights:
            nn.init.normal_(theta, std=0.5, generator=generator)
            nn.init.normal_(alpha, mean=1.0, std=0.5, generator=generator)
        return {"road_theta": theta, "road_alpha": alpha}

    def change(self, config: RoadConfig, parameters: Values, layer: FrozenLayer) -> Change:
        theta, alpha, g = parameters["road_theta"], parameters["road_alpha"], config.group_size
        if config.variant == "road_4":  # a group's own angles come first, then those for the partners
            (own, other), (scale, others) = (value.view(-1, 2, g).unbind(1) for value in (theta, alpha))
            cos, sin = scale * own.cos(), others * other.sin()
        else:
            cos, sin = alpha * theta.cos(), alpha * theta.sin()
        if config.variant == "road_1":
            cos, sin = (value.view(-1, 1, g // 2).expand(-1, 2, -1) for value in (cos, sin))
        return Change(left=PairRotation(cos.flatten(), sin.flatten(), g))

    def check(self, config: RoadConfig, layer: FrozenLayer, path: str) -> None:
        if layer.out_features % config.group_size:
            raise PeanutError(
                f"group_size={config.group_size} for '{path}', which has {layer.out_features} outputs",
                "a divisor of its outputs",
                "change group_size, or leave the layer out",
            )
