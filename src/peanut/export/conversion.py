"""``convert_to_lora`` and ``save_as_lora``: an adapter as a LoRA in memory or in a folder, the model left as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PeanutError, warn
from ..methods.lora import LoraConfig
from ..model.adapters.adapter_set import AdapterSet
from ..model.injection import get_peft_model_state_dict
from .holding import is_lora
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
    """The config and the tensors of an adapter as a LoRA, by the keys of a file, of its dtype: see ``to_lora``.

    Args:
        rank: the largest rank; exact, of the adapter's own rank, where that is less. A float from 0 to 1: the smallest
            rank at which Σ σᵢ² of what is kept is that share of ‖ΔW‖² in every layer.
        progressbar: show how many layers are done.
        compile_kwargs: accepted for scripts.

    Raises:
        PeanutError: the rank is none, or there is no such adapter or it cannot be a LoRA.
    """
    with _converted(model, rank, adapter_name, progressbar) as export:
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
    with _converted(model, rank, adapter_name, progressbar) as export:
        export.save(path)


@contextmanager
def _converted(model: nn.Module, rank: float, name: str, progressbar: bool) -> Iterator[LoraExport]:
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
    if is_lora(adapters, name) and not adapters.configs[name].use_dora:  # type: ignore[attr-defined]
        warn(f"adapter {name!r} is a LoRA already: it is written as one of rank {most} at most")
    export = to_lora(model, name, _NAME, most, progressbar)
    try:
        for _, layer in adapters.layers(name):
            kept = next(own.dtype for own in layer.values(name).values() if own.is_floating_point())
            for suffix, value in layer.values(export.name).items():
                layer.adapters[export.name].assign(suffix, value.detach().to(kept))
        yield export
    finally:
        adapters.delete(export.name)


def _needed(delta: Tensor, share: float) -> int:
    """The smallest rank that keeps a share of ‖Δ‖²."""
    energy = torch.linalg.svdvals(delta.double()).square().cumsum(0)
    return min(len(energy), int((energy < share * (1 - 1e-12) * energy[-1]).sum()) + 1)
