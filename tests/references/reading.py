"""Reads the reference values of this folder: ``load("adapters_houlsby_bert")``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers as hf
from safetensors import safe_open
from torch import Tensor

FOLDER = Path(__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.safetensors") if not path.stem.startswith("base_"))
"""Every reference, for ``load``."""


@dataclass(frozen=True)
class Reference:
    """What another package computes with one adapter on one tiny model, in float32.

    Args:
        config: ``base`` (name of the model), ``model`` (how it is made), ``kind`` and ``options`` (of the adapter),
            ``padding`` (side), ``saved_config`` (the config file of the package), ``packages`` (their versions).
        base_state: The state dict of the model without the adapter.
        adapter: The tensors by the names that they have in the package's files; ``effective.…`` are orthogonal
            matrices that the file holds as two factors.
        inputs: ``input_ids``, ``attention_mask``, and for pyreft ``intervention_locations``, of shape
            (batch, interventions, positions).
        outputs: ``adapted`` and ``plain``: logits, or the last hidden state of BERT, with and without the adapter.
    """

    config: dict[str, Any]
    base_state: dict[str, Tensor]
    adapter: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    def base_model(self) -> hf.PreTrainedModel:
        """The model without the adapter, in eval mode."""
        made = self.config["model"]
        config = getattr(hf, made["config_class"])(**made["config"])
        model: hf.PreTrainedModel = getattr(hf, made["model_class"])(config, **made["arguments"]).eval()
        model.load_state_dict(self.base_state, strict=True)
        return model

    def call(self) -> dict[str, Tensor]:
        """What the model itself is called with."""
        return {name: self.inputs[name] for name in ("input_ids", "attention_mask")}

    def compared(self, outputs: Tensor) -> Tensor:
        """The rows of ``outputs`` that are compared: one a token that is no padding; all logits of a classifier."""
        return outputs[self.inputs["attention_mask"].bool()] if outputs.dim() == 3 else outputs


def load(name: str) -> Reference:
    """The reference called ``name``; its model comes from ``base_….safetensors``, which many references share."""
    tensors, (about,) = _read(name, "reference")
    parts: dict[str, dict[str, Tensor]] = {"adapter": {}, "inputs": {}, "outputs": {}}
    for key, value in tensors.items():
        part, _, rest = key.partition("/")
        parts[part][rest] = value
    base_state, (model,) = _read(f"base_{about['base']}", "model")
    return Reference({**about, "model": model}, base_state, **parts)


def _read(stem: str, *keys: str) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    with safe_open(FOLDER / f"{stem}.safetensors", framework="pt") as file:
        metadata = file.metadata()
        return {name: file.get_tensor(name) for name in file.keys()}, [json.loads(metadata[key]) for key in keys]  # noqa: SIM118
