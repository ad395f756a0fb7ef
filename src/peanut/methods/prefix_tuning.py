"""Prefix tuning: trained keys and values in every attention layer (Li and Liang 2021, arXiv 2101.00190)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..protocols import InputMethod, ModelShape, PromptConfig, Values, register
from ..protocols.values import Count

__all__ = ["PrefixTuning", "PrefixTuningConfig", "written"]

WRITTEN = "prompt_embeddings"
EMBEDDING = "embedding.weight"
FIRST, SECOND = "transform.0", "transform.2"


@dataclass(kw_only=True)
class PrefixTuningConfig(PromptConfig):
    """Config of prefix tuning.

    Args:
        prefix_projection: train an MLP that writes keys and values from one vector a virtual token.
        encoder_hidden_size: its hidden size; that of a token's keys if ``None``.
        init_weights: ``"zero"`` starts from keys and values of zero, which the attention still looks at; ``None`` from
            random ones.
    """

    method = "PREFIX_TUNING"

    prefix_projection: bool = False
    encoder_hidden_size: Count | None = None
    init_weights: Literal["zero"] | None = None

    @property
    def encoded(self) -> bool:
        """Whether the MLP is there: it is not where the adapter is only used."""
        return self.prefix_projection and not self.inference_mode


@register
class PrefixTuning(InputMethod[PrefixTuningConfig]):
    """softmax(q [P_k; K]ᵀ / √d) [P_v; V] in every layer's self-attention, P_k and P_v (p, heads, d) trained.

    A row of ``prompt_embeddings`` (p, layers · 2 · heads · d) holds a virtual token's keys and values, layer by layer.
    With ``prefix_projection`` an MLP writes it, W₂ tanh(W₁ e), e (heads · d); files hold what the MLP writes, e and
    the MLP are saved separately, for resuming.

    Of an encoder and a decoder only the decoder's self-attention sees a prefix, and layer j of L takes what is stored
    at place 2j mod L: for an even L every second place is not used. This is the order of Hugging Face PEFT's files.
    """

    config_class = PrefixTuningConfig
    size = "2 * layers * p * key_value_heads * head_size"
    prepends = "keys_values"

    def fitted(self, config: PrefixTuningConfig, shape: ModelShape) -> PrefixTuningConfig:
        fitted = config.fitted(shape, key_value=True)
        return replace(fitted, encoder_hidden_size=fitted.encoder_hidden_size or fitted.token_dim)

    def scaffold(self, config: PrefixTuningConfig) -> frozenset[str]:
        if not config.encoded:
            return frozenset()
        return frozenset({EMBEDDING, *(f"{layer}.{leaf}" for layer in (FIRST, SECOND) for leaf in ("weight", "bias"))})

    def without_scaffold(self, config: PrefixTuningConfig) -> PrefixTuningConfig:
        return replace(config, prefix_projection=False)

    def start(self, config: PrefixTuningConfig, shape: ModelShape, generator: torch.Generator) -> dict[str, Tensor]:
        tokens = config.num_virtual_tokens or 0
        size = shape.key_value_heads * shape.head_size
        whole, hidden = 2 * shape.layers * size, config.encoder_hidden_size or size
        nothing = config.init_weights == "zero"
        if not config.encoded:
            rows = torch.randn(tokens, whole, generator=generator)
            return {WRITTEN: torch.zeros(tokens, whole) if nothing else rows}
        values = {EMBEDDING: torch.randn(tokens, size, generator=generator)}
        for layer, inputs, outputs in ((FIRST, size, hidden), (SECOND, hidden, whole)):
            for leaf, sizes in (("weight", (outputs, inputs)), ("bias", (outputs,))):
                value = (2 * torch.rand(sizes, generator=generator) - 1) * inputs**-0.5
                values[f"{layer}.{leaf}"] = torch.zeros(sizes) if nothing and layer == SECOND else value
        return values

    def prepended(self, config: PrefixTuningConfig, parameters: Values, training: bool) -> Tensor:
        rows = written(parameters)
        heads = config.num_attention_heads or 1
        layers = config.num_layers or 1
        places = rows.view(len(rows), layers, 2, heads, -1).permute(1, 2, 3, 0, 4)
        if config.num_transformer_submodules == 2:
            return places[[2 * layer % layers for layer in range(layers)]]
        return places

    def stored(
        self, config: PrefixTuningConfig, layers: Mapping[str, Values]
    ) -> tuple[PrefixTuningConfig, dict[str, dict[str, Tensor]]]:
        with torch.no_grad():
            return config, {path: {WRITTEN: written(values)} for path, values in layers.items()}


def written(parameters: Values) -> Tensor:
    """(p, layers · 2 · heads · head_size)."""
    if WRITTEN in parameters:
        return parameters[WRITTEN]
    hidden = torch.tanh(F.linear(parameters[EMBEDDING], parameters[f"{FIRST}.weight"], parameters[f"{FIRST}.bias"]))
    return F.linear(hidden, parameters[f"{SECOND}.weight"], parameters[f"{SECOND}.bias"])
