"""DiReFT: LoReFT without the subtracted projection of hidden states (Wu et al. 2024, arXiv 2404.03592)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..protocols import Call, OutputMethod, PlaceName, Site, Values, register
from .peanut import activation
from .reft import B, ReftFields, W, applied, at_the_ends, basis, random_start

__all__ = ["Direft", "DireftConfig"]


@dataclass(kw_only=True)
class DireftConfig(ReftFields):
    """Config of DiReFT: see ``ReftFields``. As published R is free; the authors' code keeps its rows orthonormal."""

    method = "DIREFT"

    orthogonality: bool = False

    def can_start_silent(self) -> bool:
        return not activation(self.act_fn, torch.device("cpu"))(torch.zeros(1)).any()


@register
class Direft(OutputMethod[DireftConfig]):
    """h + Rᵀ f(W h + b) at the ends of the prompt, R (r, d), W (r, d), b (r).

    A new adapter has random orthonormal rows in R, W = 0 and b = 0, which changes nothing where f(0) = 0.
    """

    config_class = DireftConfig
    size = "ends * (2 * r * width + r)"
    reads_prompt = True

    def places(self, config: DireftConfig) -> tuple[PlaceName, ...]:
        return ("block",)

    def start(self, config: DireftConfig, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        values = random_start(config, site, generator)
        if config.init_weights:
            values |= {W: torch.zeros_like(values[W]), B: torch.zeros_like(values[B])}
        return values

    def adapt(self, config: DireftConfig, parameters: Values, x: Tensor, y: Tensor, call: Call) -> Tensor:
        R_, W_ = basis(config, parameters).to(y.dtype), parameters[W].to(y.dtype)
        b = parameters[B].to(y.dtype)[:, None]
        return at_the_ends(config, y, call, lambda h: applied(config, h @ W_.mT + b) @ R_)

    def check(self, config: DireftConfig, site: Site) -> None:
        config.check(site)
