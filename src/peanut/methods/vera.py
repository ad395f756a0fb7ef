"""VeRA: trained scaling vectors around one shared pair of random matrices (Kopiczko et al. 2023, arXiv 2310.11454)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..operators.random_bases import RandomBases
from ..protocols import Change, PeftConfig, Values, WeightMethod, register
from ..protocols.values import Count, Probability, Scale, Whole
from ..weights import FrozenLayer

__all__ = ["Vera", "VeraConfig"]


@dataclass(kw_only=True)
class VeraConfig(PeftConfig):
    """Config of VeRA.

    Args:
        r: rank of the random matrices; larger than LoRA's, as only r + out numbers a layer are trained.
        projection_prng_key: seed of the random matrices.
        save_projection: write the random matrices to files, once; otherwise they are made again from the seed.
        vera_dropout: dropout of the change's input.
        d_initial: first value of λ_d.
        fan_in_fan_out: accepted and ignored: how a layer stores its weight is read off the layer.
        bias: ``"none"``, or the biases trained beside it: ``"vera_only"`` of the adapted layers, ``"all"``.
        init_weights: start with λ_b = 0, so that nothing changes at first; else λ_b = 1 and λ_d is normal.
    """

    method = "VERA"
    only_here = frozenset({"exclude_modules"})

    r: Count = 256
    projection_prng_key: Whole = 0
    save_projection: bool = True
    vera_dropout: Probability = 0.0
    d_initial: Scale = 0.1
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "vera_only"] = "none"
    init_weights: bool = True


@register
class Vera(WeightMethod[VeraConfig]):
    """ΔW = diag(λ_b) · B · diag(λ_d) · A with A (r, in), B (out, r) the first columns and rows of shared random ones.

    Trained: λ_d (r), λ_b (out). With both folded into B's side the forward costs what LoRA's does, and the backward
    less, as A has no gradient.
    """

    config_class = VeraConfig
    kinds = ("linear", "conv1d", "conv", "embedding")
    size = "r + d_out"

    def shared(
        self, config: VeraConfig, layers: Sequence[FrozenLayer], generator: torch.Generator
    ) -> dict[str, Tensor]:
        key = torch.Generator().manual_seed(config.projection_prng_key)
        widest = max(layer.in_features for layer in layers), max(layer.out_features for layer in layers)
        # On the CPU whatever the default device: the seed must give the same values everywhere. A is drawn first.
        A = nn.init.kaiming_uniform_(torch.empty(config.r, widest[0], device="cpu"), generator=key)
        B = nn.init.kaiming_uniform_(torch.empty(widest[1], config.r, device="cpu"), generator=key)
        return {"vera_A": A, "vera_B": B}

    def fixed(self, config: VeraConfig) -> frozenset[str]:
        return frozenset({"vera_A", "vera_B"}) if config.save_projection else frozenset()

    def rebuilt(self, config: VeraConfig) -> frozenset[str]:
        return frozenset() if config.save_projection else frozenset({"vera_A", "vera_B"})

    def start(self, config: VeraConfig, layer: FrozenLayer, generator: torch.Generator) -> dict[str, Tensor]:
        d, b = torch.empty(config.r), torch.empty(layer.out_features)
        if config.init_weights:
            return {"vera_lambda_d": d.fill_(config.d_initial), "vera_lambda_b": b.zero_()}
        return {"vera_lambda_d": nn.init.normal_(d, generator=generator), "vera_lambda_b": b.fill_(1)}

    def change(self, config: VeraConfig, parameters: Values, layer: FrozenLayer) -> Change:
        A, B = parameters["vera_A"][:, : layer.in_features], parameters["vera_B"][: layer.out_features]
        b, d = parameters["vera_lambda_b"][:, None], parameters["vera_lambda_d"]
        return Change(delta=RandomBases(B, b, d, A, "up"), dropout=config.vera_dropout)
