"""P-tuning: virtual tokens that a small network computes (Liu et al. 2021, arXiv 2103.10385)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import warn
from ..protocols import InputMethod, ModelShape, PromptConfig, Values, register
from ..protocols.values import Count, Layers, Probability

__all__ = ["PTuning", "PromptEncoderConfig", "PromptEncoderReparameterizationType", "written"]


class PromptEncoderReparameterizationType(str, Enum):
    """The network that writes the virtual tokens."""

    MLP = "MLP"
    LSTM = "LSTM"


WRITTEN = "prompt_embeddings"
EMBEDDING = "embedding.weight"


@dataclass(kw_only=True)
class PromptEncoderConfig(PromptConfig):
    """Config of P-tuning.

    Args:
        encoder_reparameterization_type: the network: ``"MLP"``, three linear layers with ReLU between them, or
            ``"LSTM"``, one that reads the virtual tokens in both directions, and two linear layers behind it.
        encoder_hidden_size: its hidden size; that of the model if ``None``.
        encoder_num_layers: layers of the LSTM.
        encoder_dropout: dropout between these, in training.
        without_encoder: train the virtual tokens themselves: how an adapter is trained on whose network is not there.
    """

    method = "P_TUNING"
    only_here = PromptConfig.only_here | {"without_encoder"}

    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: Count | None = None
    encoder_num_layers: Layers = 2
    encoder_dropout: Probability = 0.0
    without_encoder: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = self.encoder_reparameterization_type
        if kind == "MLP" and not self.inference_mode and (self.encoder_num_layers != 2 or self.encoder_dropout):
            warn("encoder_num_layers and encoder_dropout are for the LSTM; an MLP has three layers and no dropout")

    @property
    def encoded(self) -> bool:
        """Whether the network is there: it is not where the adapter is only used."""
        return not self.inference_mode and not self.without_encoder


@register
class PTuning(InputMethod[PromptEncoderConfig]):
    """[N(E); E_model x] in place of E_model x, E (p, width) and the network N trained.

    N is an MLP, W₂ relu(W₁ relu(W₀ e)), token by token, or W₁ relu(W₀ LSTM(E)) over all virtual tokens. Files hold
    what it writes, N(E); E and N are saved separately, for resuming. With two stacks (encoder and decoder) there are p
    rows for each, and the encoder's, the first p, are used.
    """

    config_class = PromptEncoderConfig
    size = "p * width + (2 * width + encoder_hidden_size) * encoder_hidden_size + 2 * encoder_hidden_size + width"

    def fitted(self, config: PromptEncoderConfig, shape: ModelShape) -> PromptEncoderConfig:
        fitted = config.fitted(shape)
        return replace(fitted, encoder_hidden_size=fitted.encoder_hidden_size or shape.width)

    def scaffold(self, config: PromptEncoderConfig) -> frozenset[str]:
        return frozenset({EMBEDDING, *_shapes(config, 1, 1)}) if config.encoded else frozenset()

    def without_scaffold(self, config: PromptEncoderConfig) -> PromptEncoderConfig:
        return replace(config, without_encoder=True)

    def start(self, config: PromptEncoderConfig, shape: ModelShape, generator: torch.Generator) -> dict[str, Tensor]:
        rows = torch.randn(config.rows, shape.width, generator=generator)
        if not config.encoded:
            return {WRITTEN: rows}
        values = {EMBEDDING: rows}
        hidden = config.encoder_hidden_size or shape.width
        for suffix, (size, inputs) in _shapes(config, shape.width, hidden).items():
            values[suffix] = (2 * torch.rand(size, generator=generator) - 1) * inputs**-0.5
        return values

    def prepended(self, config: PromptEncoderConfig, parameters: Values, training: bool) -> Tensor:
        return written(config, parameters, training)[: config.num_virtual_tokens]

    def stored(
        self, config: PromptEncoderConfig, layers: Mapping[str, Values]
    ) -> tuple[PromptEncoderConfig, dict[str, dict[str, Tensor]]]:
        with torch.no_grad():
            return config, {path: {WRITTEN: written(config, values, False)} for path, values in layers.items()}


def _shapes(config: PromptEncoderConfig, width: int, hidden: int) -> dict[str, tuple[tuple[int, ...], int]]:
    """The network's tensors by suffix: their sizes, and by how many inputs their start is scaled."""
    found: dict[str, tuple[tuple[int, ...], int]] = {}
    if config.encoder_reparameterization_type == "MLP":
        layers = {0: (width, hidden), 2: (hidden, hidden), 4: (hidden, width)}
    else:
        layers = {0: (2 * hidden, 2 * hidden), 2: (2 * hidden, width)}
        for layer in range(config.encoder_num_layers):
            for direction in ("", "_reverse"):
                name = f"l{layer}{direction}"
                found[f"lstm_head.weight_ih_{name}"] = ((4 * hidden, 2 * hidden if layer else width), hidden)
                found[f"lstm_head.weight_hh_{name}"] = ((4 * hidden, hidden), hidden)
                found[f"lstm_head.bias_ih_{name}"] = ((4 * hidden,), hidden)
                found[f"lstm_head.bias_hh_{name}"] = ((4 * hidden,), hidden)
    for number, (inputs, outputs) in layers.items():
        found[f"mlp_head.{number}.weight"] = ((outputs, inputs), inputs)
        found[f"mlp_head.{number}.bias"] = ((outputs,), inputs)
    return found


def written(config: PromptEncoderConfig, parameters: Values, training: bool) -> Tensor:
    """All rows of virtual tokens, (rows, width)."""
    if WRITTEN in parameters:
        return parameters[WRITTEN]
    x = parameters[EMBEDDING]
    lstm = [value for suffix, value in parameters.items() if suffix.startswith("lstm_head.")]
    if lstm:
        hidden = parameters["lstm_head.weight_hh_l0"].shape[1]
        zero = x.new_zeros(2 * config.encoder_num_layers, 1, hidden)
        dropout = config.encoder_dropout
        x = torch.lstm(x[None], (zero, zero), lstm, True, config.encoder_num_layers, dropout, training, True, True)[0][
            0
        ]
    weights = [suffix for suffix in parameters if suffix.startswith("mlp_head.") and suffix.endswith(".weight")]
    for suffix in weights:
        x = F.linear(x, parameters[suffix], parameters[f"{suffix.removesuffix('weight')}bias"])
        x = x if suffix == weights[-1] else F.relu(x)
    return x
