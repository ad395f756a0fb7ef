"""X-LoRA: a trained gate mixes several adapters for each token (Buehler & Buehler 2024, arXiv 2402.07148)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import PeanutError, shown
from ..protocols import MixtureMethod, PeftConfig, Values, register
from ..protocols.values import Count, Layers, Positive, Probability, Scale

__all__ = ["XLora", "XLoraConfig"]

GATE = "internal_xlora_classifier.layers"
_LAYERS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(kw_only=True)
class XLoraConfig(PeftConfig):
    """Config of X-LoRA.

    Args:
        hidden_size: the size of the model's hidden states. Read off the model if ``None``.
        adapters: the experts by name, each with its folder, or ``None`` if it is in the model; all adapters in the
            model that change weights if left out. They are in the order of their names, as the gates are.
        enable_softmax: put the gates of a token through a softmax.
        enable_softmax_topk: put those that ``top_k_lora`` leaves through another one.
        layerwise_scalings: gates of its own for each layer; else one set for all.
        xlora_depth: how many linear layers the gate has.
        xlora_size: the width of those between.
        xlora_dropout_p: dropout after each of those but the last.
        use_trainable_adapters: train the experts too.
        softmax_temperature: what the softmax divides by first.
        top_k_lora: for each token and layer, leave only the k largest gates.
        scaling_pass_value: the gate of every expert in the first pass; with 0 it is the bare base's.
        global_scaling_weight: what all gates are multiplied by in the end.
        layernorm_type: ``"rms"``, accepted for scripts that give it. No norm is added, as the published gate has none:
            it reads the hidden states after the model's own last norm, of whatever type that is.
        use_bias: train the gate's biases. The gate always has them, as it does in files of PEFT; without this
            they stay as they are, which is zero in a new gate and the file's values in one that is loaded. So by
            default a new gate is one without biases, and a file of either library computes the same in both.

    Raises:
        PeanutError: a value is out of range.
    """

    method = "XLORA"
    only_here = frozenset({*_LAYERS, "modules_to_save", "layernorm_type", "use_bias"})

    hidden_size: Count | None = None
    adapters: dict[str, str | None] | None = None
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    layerwise_scalings: bool = False
    xlora_depth: Layers = 1
    xlora_size: Count = 2048
    xlora_dropout_p: Probability = 0.2
    use_trainable_adapters: bool = False
    softmax_temperature: Positive = 1.0
    top_k_lora: Count | None = None
    scaling_pass_value: Scale = 0.0
    global_scaling_weight: Scale = 1.0
    layernorm_type: Literal["rms"] = "rms"
    use_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in _LAYERS:
            if getattr(self, name) is not None:
                found = f"{name}={shown(getattr(self, name))} for X-LoRA"
                raise PeanutError(found, "the experts' layers", "leave it out")
        if self.enable_softmax_topk and self.top_k_lora is None:
            raise PeanutError("enable_softmax_topk=True without top_k_lora", "both", "set top_k_lora")
        if self.adapters is not None:
            self.adapters = dict(sorted(self.adapters.items()))  # as files keep them
            if self.adapters and (self.top_k_lora or 0) > len(self.adapters):
                raise PeanutError(
                    f"top_k_lora={self.top_k_lora} of {len(self.adapters)} experts",
                    f"at most {len(self.adapters)}",
                    "lower it",
                )

    @property
    def places(self) -> list[str]:
        """The suffixes of the gate's linear layers: files number the activations and dropouts between them too."""
        step = 3 if self.xlora_dropout_p else 2
        return [f"{GATE}.{step * number}" for number in range(self.xlora_depth)]


@register
class XLora(MixtureMethod[XLoraConfig]):
    """y = W x + w · Σ_e g_e Δ_e x, g (experts) of this token and layer = softmax(gate(h) / T), top-k of it if asked.

    h is the token's last hidden state in a first pass through the base alone; gate is L_d ∘ ReLU ∘ … ∘ L_1 with
    linear layers (xlora_size, hidden_size), …, (experts or layers · experts, xlora_size).
    """

    config_class = XLoraConfig
    size = "the gate: hidden_size * xlora_size + (xlora_depth - 2) * xlora_size² + xlora_size * experts, once"

    def experts(self, config: XLoraConfig) -> dict[str, Any]:
        return dict(config.adapters or {})

    def mixing(self, config: XLoraConfig, experts: dict[str, Any]) -> XLoraConfig:
        return replace(config, adapters=experts)

    def trains_experts(self, config: XLoraConfig) -> bool:
        return config.use_trainable_adapters

    def fitted(self, config: XLoraConfig, width: int) -> XLoraConfig:
        if config.hidden_size not in (None, width):
            raise PeanutError(
                f"hidden_size={config.hidden_size} for a model whose hidden states have {width}",
                str(width),
                "leave it out",
            )
        return replace(config, hidden_size=width)

    def start(
        self, config: XLoraConfig, width: int, experts: int, layers: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        last = experts * layers if config.layerwise_scalings else experts
        sizes = [width, *[config.xlora_size] * (config.xlora_depth - 1), last]
        values = {}
        for place, (inputs, outputs) in zip(config.places, pairwise(sizes), strict=True):
            bound = 1 / math.sqrt(inputs)
            values[f"{place}.weight"] = nn.init.uniform_(torch.empty(outputs, inputs), -bound, bound, generator)
            bias = torch.zeros(outputs)
            values[f"{place}.bias"] = nn.init.uniform_(bias, -bound, bound, generator) if config.use_bias else bias
        return values

    def fixed(self, config: XLoraConfig) -> frozenset[str]:
        return frozenset() if config.use_bias else frozenset(f"{place}.bias" for place in config.places)

    def first_pass(self, config: XLoraConfig) -> float:
        return config.scaling_pass_value

    def gates(self, config: XLoraConfig, parameters: Values, hidden: Tensor, layers: int, training: bool) -> Tensor:
        h = hidden
        for number, place in enumerate(config.places):
            if number:
                h = F.dropout(F.relu(h), config.xlora_dropout_p, training)
            h = F.linear(h, parameters[f"{place}.weight"].to(h.dtype), parameters[f"{place}.bias"].to(h.dtype))
        gates = h.to(torch.promote_types(h.dtype, torch.float32))  # few numbers, whose sum should be one
        gates = gates.unflatten(-1, (layers if config.layerwise_scalings else 1, -1))
        if config.enable_softmax:
            gates = torch.softmax(gates / config.softmax_temperature, dim=-1)
        return gates.expand(-1, -1, layers, -1)

    def applied(self, config: XLoraConfig, gates: Tensor) -> Tensor:
        layers = gates.shape[2]
        own = gates if config.layerwise_scalings else gates[:, :, :1]
        if config.top_k_lora is not None:
            largest = torch.topk(own, config.top_k_lora, dim=-1).indices
            own = own * torch.zeros_like(own).scatter(-1, largest, 1.0)
        if config.enable_softmax_topk:
            # A gate of exactly zero is out, too; where all are, all outputs are too.
            out = own == 0
            own = torch.softmax(own.masked_fill(out, -torch.inf), dim=-1).masked_fill(out, 0.0)
        return (own * config.global_scaling_weight).expand(-1, -1, layers, -1)
