"""Variational LoRA: a Gaussian posterior on LoRA's A (BLoB, Wang et al. 2024, arXiv 2406.11675).

The prior is the scale mixture of Bayes by Backprop (Blundell et al. 2015, arXiv 1505.05424).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..operators import LowRank
from ..protocols import Change, PeftConfig, Values, WeightMethod, register
from ..protocols.values import Bound, Count, NonNegative, Positive, Probability, Scale
from ..weights import FrozenLayer

__all__ = ["VariationalLora", "VariationalLoraConfig", "divergence_bound"]


_Share = Annotated[float, Bound("a share between 0 and 1", lambda value: 0 <= value <= 1)]


@dataclass(kw_only=True)
class VariationalLoraConfig(PeftConfig):
    """Config of variational LoRA.

    Args:
        vb_r: rank.
        vb_pi: π, the weight of the wide Gaussian in the prior π N(0, σ₁²) + (1 − π) N(0, σ₂²).
        vb_beta: β, the weight of the divergence from the prior in the loss; 1 is the variational bound.
        lora_alpha: α; the update is scaled by α/r.
        lora_dropout: dropout of the change's input.
        use_rslora: scale by α/√r instead.
        fan_in_fan_out: accepted and ignored: how a layer stores its weight is read off the layer.
        bias: ``"none"``, or the biases trained beside it: ``"lora_only"`` of the adapted layers, ``"all"``.
        prior_sigma_1, prior_sigma_2: σ₁ and σ₂.
        init_sigma: first deviation of the posterior.
        num_data: number of examples N in the training set: a loss that is a mean over examples wants the divergence
            divided by N. ``None`` takes the number of random weights, so that each counts as one example.
        rank_pattern, alpha_pattern: r and α for particular layers, by name or regular expression.
    """

    method = "VARIATIONAL_LORA"
    by_layer = (("vb_r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))

    vb_r: Count = 8
    vb_pi: _Share = 0.5
    vb_beta: NonNegative = 1.0
    lora_alpha: Scale = 8
    lora_dropout: Probability = 0.0
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    prior_sigma_1: Positive = 0.2
    prior_sigma_2: Positive = 0.0025
    init_sigma: Positive = 0.0025
    num_data: Count | None = None
    rank_pattern: dict[str, Count] = field(default_factory=dict)
    alpha_pattern: dict[str, Scale] = field(default_factory=dict)

    @property
    def scaling(self) -> float:
        """s = α/r, or α/√r."""
        return self.lora_alpha / (math.sqrt(self.vb_r) if self.use_rslora else self.vb_r)


@register
class VariationalLora(WeightMethod[VariationalLoraConfig]):
    """ΔW = s · B · A with A ~ N(M, softplus(ρ)²) entry by entry: M and ρ (r, in), B (out, r) certain and 0 at first.

    Training draws A = M + softplus(ρ) ε in each forward and adds β/N · KL to the loss; evaluation takes A = M.
    """

    config_class = VariationalLoraConfig
    kinds = ("linear", "conv1d", "conv", "embedding")
    size = "vb_r * (2 * d_in + d_out)"

    def start(self, config: VariationalLoraConfig, layer: FrozenLayer, generator: torch.Generator) -> dict[str, Tensor]:
        M, B = torch.empty(layer.down_shape(config.vb_r)), torch.zeros(layer.up_shape(config.vb_r))
        if layer.kind.name == "embedding":
            nn.init.normal_(M, std=1 / config.vb_r, generator=generator)  # a token reads one column: r entries, not in
        else:
            nn.init.kaiming_uniform_(M, a=math.sqrt(5), generator=generator)
        sigma = config.init_sigma
        rho = torch.full_like(M, sigma + math.log(-math.expm1(-sigma)))  # softplus(ρ) = σ
        return {"lora_A.weight": M, "lora_A.rho": rho, "lora_B.weight": B}

    def change(self, config: VariationalLoraConfig, parameters: Values, layer: FrozenLayer) -> Change:
        A, B = parameters["lora_A.weight"].flatten(1), parameters["lora_B.weight"].flatten(1)
        return Change(delta=LowRank(B, A, config.scaling), dropout=config.lora_dropout)

    def sampled(self, config: VariationalLoraConfig, parameters: Values) -> Values:
        M, sigma = parameters["lora_A.weight"], F.softplus(parameters["lora_A.rho"])
        return {**parameters, "lora_A.weight": M + sigma * torch.randn_like(M)}

    def penalty(self, config: VariationalLoraConfig, layers: Sequence[Values]) -> Tensor | None:
        bounds = [
            divergence_bound(
                values["lora_A.weight"],
                F.softplus(values["lora_A.rho"]),
                config.vb_pi,
                (config.prior_sigma_1, config.prior_sigma_2),
            ).sum()
            for values in layers
        ]
        if not bounds or config.vb_beta == 0:
            return None
        number = config.num_data or sum(values["lora_A.rho"].numel() for values in layers)
        return config.vb_beta / number * torch.stack([bound.to(bounds[0].device) for bound in bounds]).sum()


def divergence_bound(mean: Tensor, sigma: Tensor, pi: float, prior: tuple[float, float]) -> Tensor:
    """A bound from above on KL(N(mean, sigma²) ‖ π N(0, σ₁²) + (1 − π) N(0, σ₂²)), entry by entry.

    The divergence has no closed form, but by Jensen it is at most −log(π exp(−KL₁) + (1 − π) exp(−KL₂)), KLᵢ that
    from the i-th Gaussian alone (Hershey and Olsen 2007), which is exact where π is 0 or 1 or σ₁ = σ₂, and never above
    the better of the two with its weight, KLᵢ − log πᵢ. So the loss stays a bound on the evidence, and its penalty
    has no noise of its own.
    """
    terms = [
        math.log(weight) - (math.log(deviation) - sigma.log() + (sigma**2 + mean**2) / (2 * deviation**2) - 0.5)
        for weight, deviation in zip((pi, 1 - pi), prior, strict=True)
        if weight > 0
    ]
    return -torch.logaddexp(*terms) if len(terms) == 2 else -terms[0]
