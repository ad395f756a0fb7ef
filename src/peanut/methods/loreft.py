"""LoReFT: hidden states are changed in a trained subspace (Wu et al. 2024, arXiv 2404.03592)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..protocols import Call, OutputMethod, PlaceName, Site, Values, register
from ..weights.stored import some_tensor
from .reft import B, R, ReftFields, W, applied, at_the_ends, basis, orthonormal, random_start

__all__ = ["Loreft", "LoreftConfig"]


@dataclass(kw_only=True)
class LoreftConfig(ReftFields):
    """Config of LoReFT: see ``ReftFields``. Without ``orthogonality`` it is NoReFT."""

    method = "LOREFT"


@register
class Loreft(OutputMethod[LoreftConfig]):
    """h + Rᵀ(f(W h + b) − R h) at the ends of the prompt, R (r, d) with orthonormal rows, W (r, d), b (r).

    R is made of the trained tensor by Gram and Schmidt. A new adapter has W = R and b = 0, which changes nothing where
    f is linear.
    """

    config_class = LoreftConfig
    size = "ends * (2 * r * width + r)"
    reads_prompt = True

    def places(self, config: LoreftConfig) -> tuple[PlaceName, ...]:
        return ("block",)

    def start(self, config: LoreftConfig, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        values = random_start(config, site, generator)
        if config.init_weights:
            rows = values[R]
            beside = some_tensor(site.module)
            if beside is not None and not rows.is_meta:
                rows = rows.to(beside.device)  # as there, so that W is R bit for bit
            values |= {W: orthonormal(rows) if config.orthogonality else rows, B: torch.zeros_like(values[B])}
        return values

    def adapt(self, config: LoreftConfig, parameters: Values, x: Tensor, y: Tensor, call: Call) -> Tensor:
        rows = basis(config, parameters)
        R_, W_, b = rows.to(y.dtype), parameters[W].to(y.dtype), parameters[B].to(y.dtype)[:, None]
        difference = (parameters[W] - rows).to(y.dtype)

        def change(h: Tensor) -> Tensor:
            """(batch, 2, p, d) → the same; W h − R h is (W − R) h, which does not cancel."""
            if config.act_fn == "linear":
                return (h @ difference.mT + b) @ R_
            return (applied(config, h @ W_.mT + b) - h @ R_.mT) @ R_

        return at_the_ends(config, y, call, change)

    def check(self, config: LoreftConfig, site: Site) -> None:
        config.check(site)
