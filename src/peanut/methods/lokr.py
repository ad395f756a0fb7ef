"""LoKr: the update is a Kronecker product of two small matrices (Yeh et al. 2023, arXiv 2309.14859)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from ..operators import Between, Delta, Dense, Diagonal
from ..operators.kronecker import Kronecker
from ..protocols import Change, PeftConfig, Values, WeightMethod, register
from ..protocols.values import Bound, Count, Probability, Scale
from ..weights import FrozenLayer

__all__ = ["LoKr", "LoKrConfig"]

TRAINING = "training"
"""What stands among a layer's tensors in a forward of training, where outputs are dropped at random."""


_Factor = Annotated[
    int, Bound("at least 1, or -1 for the nearest to a square", lambda value: value >= 1 or value == -1)
]


@dataclass(kw_only=True)
class LoKrConfig(PeftConfig):
    """Config of LoKr.

    Args:
        r: rank of the larger of the two matrices, where that makes it smaller.
        alpha: α; the update is scaled by α/r.
        rank_dropout: probability with which, in training, an output keeps its old weights.
        rank_dropout_scale: scale what is left by its share.
        module_dropout: probability with which, in training, a whole layer keeps them.
        use_effective_conv2d: a low-rank kernel keeps its spatial dimensions apart (CP decomposition).
        decompose_both: the smaller matrix is of rank r, too, where that makes it smaller.
        decompose_factor: size of the smaller matrix, if it divides the layer's; -1 for about the square root.
        init_weights: ``True``: the smaller matrix starts at zero; ``"lycoris"``: the larger one; ``False``: neither.
        rank_pattern, alpha_pattern: r and α for particular layers, by name or regular expression.
    """

    method = "LOKR"
    by_layer = (("r", "rank_pattern"), ("alpha", "alpha_pattern"))

    r: Count = 8
    alpha: Scale = 8
    rank_dropout: Probability = 0.0
    module_dropout: Probability = 0.0
    use_effective_conv2d: bool = False
    decompose_both: bool = False
    decompose_factor: _Factor = -1
    rank_dropout_scale: bool = False
    init_weights: bool | Literal["lycoris"] = True
    rank_pattern: dict[str, Count] = field(default_factory=dict)
    alpha_pattern: dict[str, Scale] = field(default_factory=dict)


@register
class LoKr(WeightMethod[LoKrConfig]):
    """ΔW = s · W₁ ⊗ W₂ with s = α/r, W₁ (a, c), W₂ (b, d), a·b = out, c·d = in, a and c the smaller divisors.

    W₂, and with ``decompose_both`` W₁, is a product of rank r where r is below half of its larger side. Of a
    convolution, d counts a kernel's places too; of an ``nn.Conv1d`` with a whole W₂ the two change places,
    ΔW[(j, i), (l, k), t] = s · W₁[i, k] · W₂[j, l, t], as in Hugging Face PEFT's files.
    """

    config_class = LoKrConfig
    kinds = ("linear", "conv1d", "conv", "embedding")
    size = "a · c + r · (b + d), where a · b is d_out and c · d is d_in"

    def start(self, config: LoKrConfig, layer: FrozenLayer, generator: torch.Generator) -> dict[str, Tensor]:
        kernel = tuple(layer.module.weight.shape[2:]) if layer.kind.name == "conv" else ()
        a, b = divided(layer.out_features, config.decompose_factor)
        c, d = divided(layer.in_features // math.prod(kernel), config.decompose_factor)
        r, wide = config.r, config.use_effective_conv2d and math.prod(kernel) > 1
        shapes: dict[str, tuple[int, ...]] = {"lokr_w1": (a, c)}
        if config.decompose_both and r < max(a, c) / 2:
            shapes = {"lokr_w1_a": (a, r), "lokr_w1_b": (r, c)}
        if r >= max(b, d) / 2:
            shapes["lokr_w2"] = (b, d, *kernel)
        elif wide:
            kept = (*kernel, 1) if len(kernel) == 1 else kernel  # as in Hugging Face PEFT's files
            shapes |= {"lokr_t2": (r, r, *kept), "lokr_w2_a": (r, b), "lokr_w2_b": (r, d)}
        else:
            shapes |= {"lokr_w2_a": (b, r), "lokr_w2_b": (r, d * math.prod(kernel))}
        zero = {True: ("lokr_w1", "lokr_w1_a"), "lycoris": ("lokr_w2", "lokr_w2_b"), False: ()}[config.init_weights]
        values = {}
        for name, shape in shapes.items():
            values[name] = torch.zeros(shape)
            if name not in zero:
                nn.init.kaiming_uniform_(values[name], a=math.sqrt(5), generator=generator)
        return values

    def change(self, config: LoKrConfig, parameters: Values, layer: FrozenLayer) -> Change:
        W1, W2, down = parameters.get("lokr_w1"), parameters.get("lokr_w2"), None
        if W1 is None:
            W1 = parameters["lokr_w1_a"] @ parameters["lokr_w1_b"]
        if "lokr_t2" in parameters:
            core, a, b = (parameters[name] for name in ("lokr_t2", "lokr_w2_a", "lokr_w2_b"))
            W2 = torch.einsum("ij...,ib,jd->bd...", core, a, b)
        elif W2 is None:
            W2, down = parameters["lokr_w2_a"], parameters["lokr_w2_b"]
        delta: Delta = Kronecker(W1, W2.flatten(1), down, config.alpha / config.r)
        if "lokr_w2" in parameters and layer.kind.name == "conv" and W2.dim() == 3:
            kernel = torch.einsum("ik,jlt->jilkt", W1, W2) * (config.alpha / config.r)
            delta = Dense(kernel.reshape(layer.out_features, layer.in_features))
        return Change(delta=self._dropped(config, delta, W1) if TRAINING in parameters else delta)

    def sampled(self, config: LoKrConfig, parameters: Values) -> Values:
        drops = config.rank_dropout or config.module_dropout
        return {**parameters, TRAINING: torch.ones(())} if drops else parameters

    def _dropped(self, config: LoKrConfig, delta: Delta, like: Tensor) -> Between:
        """The update with some of its outputs, or all of them, left out."""
        mask = (torch.rand(delta.shape[0], device=like.device) >= config.rank_dropout).to(like.dtype)
        if config.rank_dropout_scale:
            mask = mask / mask.mean().clamp_min(1 / len(mask))  # also where none is left
        whole = (torch.rand((), device=like.device) >= config.module_dropout).to(like.dtype)
        return Between(Diagonal(mask * whole), delta, None)


def divided(size: int, factor: int) -> tuple[int, int]:
    """(m, n) with m · n = size: m is ``factor`` if that divides it, else the largest divisor up to it and the root."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    m = next(each for each in range(most, 0, -1) if size % each == 0)
    return m, size // m
