"""``convert_to_lora`` and ``save_as_lora``: an adapter as a LoRA in memory or in a folder, the model left as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PeanutError
from ..methods.lora import LoraConfig
from ..model.adapters.adapter_set import AdapterSet
from ..model.injection import get_peft_model_state_dict
from .lora import LoraExport, to_lora

__all__ = ["convert_to_lora", "save_as_lora"]

_NAME = "converted_to_lora"


def convert_to_lora(
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The config and the tensors of an adapter as a LoRA, by the keys of a file: see ``to_lora``.

    Args:
        rank: the largest rank; exact, of the adapter's own rank, where that is less. A float from 0 to 1: the smallest
            rank at which Σ σᵢ² of what is kept is that share of ‖ΔW‖² in every layer.
        progressbar, compile_kwargs: accepted for scripts.

    Raises:
        PeanutError: the rank is none, or there is no such adapter or it cannot be a LoRA.
    """
    with _converted(model, rank, adapter_name) as export:
        config = export.adapters.configs[export.name]
        assert isinstance(config, LoraConfig)
        state = get_peft_model_state_dict(model, adapter_name=export.name, save_embedding_layers=False)
        return config, {key: value.detach().clone() for key, value in state.items()}


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Writes what ``convert_to_lora`` gives into a folder; arguments and errors as there."""
    with _converted(model, rank, adapter_name) as export:
        export.save(path)


@contextmanager
def _converted(model: nn.Module, rank: float, name: str) -> Iterator[LoraExport]:
    """The LoRA of an adapter, in the model within the context."""
    share = isinstance(rank, float)
    if not rank > 0 or (share and rank > 1):
        raise PeanutError(f"rank={rank}", "a whole number, or a share of ΔW above 0 and at most 1.0")
    adapters = AdapterSet.of(model)
    adapters.known(name)
    most = (
        int(rank)
        if not share
        else max((_needed(layer.delta(name), rank) for _, layer in adapters.layers(name)), default=1)
    )
    export = to_lora(model, name, _NAME, most)
    try:
        yield export
    finally:
        adapters.delete(export.name)


def _needed(delta: Tensor, share: float) -> int:
    """The smallest rank that keeps a share of ‖Δ‖²."""
    energy = torch.linalg.svdvals(delta.double()).square().cumsum(0)
    return min(len(energy), int((energy < share * (1 - 1e-12) * energy[-1]).sum()) + 1)
