"""RandLoRA: a full-rank sum of rescaled random low-rank products (Albert et al. 2025, arXiv 2502.00987)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..operators.random_bases import RandomBases
from ..protocols import Change, PeftConfig, Values, WeightMethod, register
from ..protocols.values import Count, Probability, Scale, Whole
from ..weights import FrozenLayer

__all__ = ["RandLora", "RandLoraConfig"]

BASES = frozenset({"randlora_A", "randlora_B"})


@dataclass(kw_only=True)
class RandLoraConfig(PeftConfig):
    """Config of RandLoRA.

    Args:
        r: rank of one random product; the smaller, the more of them there are and the more is trained.
        projection_prng_key: seed of the random bases.
        save_projection: write the random bases to files, once; otherwise they are made again from the seed.
        sparse: bases of −1, 0 and 1 with probabilities 1/6, 2/3 and 1/6, before they are brought to deviation 1.
        very_sparse: the same with 1/(2√d), 1 − 1/√d and 1/(2√d), d the smaller width; it overrides ``sparse``.
        randlora_dropout: dropout of the change's input.
        randlora_alpha: α; the update is scaled by α/r.
        fan_in_fan_out: accepted and ignored: how a layer stores its weight is read off the layer.
        bias: ``"none"``, or the biases trained beside it: ``"randlora_only"`` of the adapted layers, ``"all"``.
        init_weights: start with λ = 0, so that nothing changes at first; else λ is normal.
    """

    method = "RANDLORA"
    only_here = frozenset({"exclude_modules"})

    r: Count = 32
    projection_prng_key: Whole = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: Probability = 0.0
    randlora_alpha: Scale = 640
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "randlora_only"] = "none"
    init_weights: bool = True


@register
class RandLora(WeightMethod[RandLoraConfig]):
    """ΔW = (α/r) · B · S, or its transpose where out < in: B random, S made of one small random A and its scalings.

    With m ≤ M the layer's two widths and n = ⌈m/r⌉: A (r, 1, m), B (M, n, r) flattened to (M, n·r), trained
    λ (r, n) and γ (n, m), S[(k, j)] = λ[k, j] · A[k] ⊙ γ[j] of shape (r·n, m), the rows counted with k outermost.
    (B's columns count the other way round. As both are random this pairs them no worse, and files rely on it.)
    """

    config_class = RandLoraConfig
    kinds = ("linear", "conv1d", "conv")  # of an embedding the larger basis would be as large as the embedding
    size = "ceil(min(d_in, d_out) / r) * (r + min(d_in, d_out))"

    def shared(
        self, config: RandLoraConfig, layers: Sequence[FrozenLayer], generator: torch.Generator
    ) -> dict[str, Tensor]:
        widest = max(layer.out_features for layer in layers), max(layer.in_features for layer in layers)
        m, M, r = min(widest), max(widest), config.r
        n = math.ceil(m / r)
        key = torch.Generator().manual_seed(config.projection_prng_key)
        # Everything on the CPU whatever the default device, A before B, and the dense ones in bfloat16 and one basis
        # at a time: the numbers that a seed stands for in files without the bases.
        if config.sparse or config.very_sparse:
            share = 1 / (2 * (math.sqrt(m) if config.very_sparse else 3))
            A = _signs(torch.rand(r, 1, m, generator=key, device="cpu"), share)
            B = _signs(torch.rand(M, n, r, generator=key, device="cpu"), share)
        else:
            A = _uniform((r, 1, m), key)
            B = torch.cat([_uniform((M, 1, r), key) for _ in range(n)], dim=1)
        return {"randlora_A": (A / A.std()).float(), "randlora_B": (B / B.std()).float()}

    def fixed(self, config: RandLoraConfig) -> frozenset[str]:
        return BASES if config.save_projection else frozenset()

    def rebuilt(self, config: RandLoraConfig) -> frozenset[str]:
        return frozenset() if config.save_projection else BASES

    def start(self, config: RandLoraConfig, layer: FrozenLayer, generator: torch.Generator) -> dict[str, Tensor]:
        m, M = sorted((layer.out_features, layer.in_features))
        n = math.ceil(m / config.r)
        scales = torch.zeros(config.r, n), torch.full((n, m), 1 / (max(n, m) if config.init_weights else M))
        if not config.init_weights:
            nn.init.normal_(scales[0], generator=generator)
        return {"randlora_lambda": scales[0], "randlora_gamma": scales[1]}

    def change(self, config: RandLoraConfig, parameters: Values, layer: FrozenLayer) -> Change:
        scales, gamma = parameters["randlora_lambda"], parameters["randlora_gamma"]
        n, m = gamma.shape
        A = parameters["randlora_A"][:, :, :m]
        B = parameters["randlora_B"][: max(layer.out_features, layer.in_features), :n].flatten(1)
        s = config.randlora_alpha / config.r
        if layer.in_features == m:
            delta = RandomBases(A, scales[:, :, None], gamma, B, "down", s)
        else:
            delta = RandomBases(A.permute(2, 0, 1), scales, gamma.T[:, None], B.T, "up", s)
        return Change(delta=delta, dropout=config.randlora_dropout)

    def restored(self, config: RandLoraConfig, layers: Mapping[str, Values]) -> dict[str, dict[str, Tensor]]:
        """Some files repeat the bases for every layer; the shared ones are enough."""
        return {
            path: {suffix: value for suffix, value in values.items() if suffix not in BASES or not _is_layer(values)}
            for path, values in layers.items()
        }


def _is_layer(values: Values) -> bool:
    """Whether these are a layer's tensors, not the shared ones alone."""
    return "randlora_lambda" in values


def _uniform(shape: tuple[int, int, int], key: torch.Generator) -> Tensor:
    return nn.init.kaiming_uniform_(
        torch.empty(shape, dtype=torch.bfloat16, device="cpu"), a=math.sqrt(5), generator=key
    )


def _signs(draws: Tensor, share: float) -> Tensor:
    """−1 where a draw from [0, 1) is below ``share``, 1 where it is above 1 − share, else 0."""
    return (draws > 1 - share).float() - (draws < share).float()
