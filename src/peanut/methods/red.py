"""RED: a layer's output is scaled and shifted (Wu et al. 2024, arXiv 2402.15179)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..operators import Diagonal
from ..protocols import Change, PeftConfig, Values, WeightMethod, register
from ..weights import FrozenLayer

__all__ = ["RED", "REDConfig"]


@dataclass(kw_only=True)
class REDConfig(PeftConfig):
    """Config of RED.

    Args:
        init_weights: start with gains of one and shifts of zero, so that nothing changes at first; else both are
            random, with a standard deviation of 0.1.
    """

    method = "RED"

    init_weights: bool = True


@register
class RED(WeightMethod[REDConfig]):
    """The representation h = W x + b becomes l ⊙ h + β: W' = diag(l) W, b' = l ⊙ b + β.

    ``red_scale`` holds l, ``red_shift`` β, both (out). The paper edits the output of the feed-forward blocks.
    """

    config_class = REDConfig
    kinds = ("linear", "conv1d", "conv")
    size = "2 * d_out"
    targets = "outputs"

    def start(self, config: REDConfig, layer: FrozenLayer, generator: torch.Generator) -> dict[str, Tensor]:
        scale, shift = torch.ones(layer.out_features), torch.zeros(layer.out_features)
        if not config.init_weights:
            nn.init.normal_(scale, mean=1.0, std=0.1, generator=generator)
            nn.init.normal_(shift, std=0.1, generator=generator)
        return {"red_scale": scale, "red_shift": shift}

    def change(self, config: REDConfig, parameters: Values, layer: FrozenLayer) -> Change:
        return Change(left=Diagonal(parameters["red_scale"]), shift=parameters["red_shift"])
