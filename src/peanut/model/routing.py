"""Per-sample adapters that survive gradient checkpointing, which runs a block's forward again during the backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn

from ..errors import PeanutError
from .adapter_set import AdapterSet
from .state import BASE, AdapterState

__all__ = ["per_sample"]


@contextmanager
def per_sample(adapters: AdapterSet, samples: Sequence[str] | None) -> Iterator[None]:
    """Within the context each sample of a batch goes through the adapter named for it.

    Raises:
        PeanutError: a name is unknown, or adapters are merged.
    """
    if samples is None:
        yield
        return
    adapters.known([name for name in samples if name != BASE])
    if adapters.state.merged:
        raise PeanutError(
            f"adapter_names given while {adapters.state.merged[0]!r} is merged",
            "an unmerged model",
            "call unmerge_adapter() first",
        )
    restored = _replayed(adapters.model, adapters.state) if torch.is_grad_enabled() else []
    try:
        with adapters.state.per_sample(samples):
            yield
    finally:
        for module, function in restored:
            module._gradient_checkpointing_func = function


def _replayed(model: nn.Module, state: AdapterState) -> list[tuple[Any, Callable[..., Any]]]:
    """Makes each checkpointed block of a transformers model run again under the names of its first run."""
    changed: list[tuple[Any, Callable[..., Any]]] = []
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None and getattr(module, "gradient_checkpointing", False):
            changed.append((module, function))
            module._gradient_checkpointing_func = _under_names_of_now(function, state)  # type: ignore[assignment]
    return changed


def _under_names_of_now(checkpoint: Callable[..., Any], state: AdapterState) -> Callable[..., Any]:
    @wraps(checkpoint)
    def checkpointed(block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        samples = state.samples

        def run(*inputs: Any, **options: Any) -> Any:
            with state.per_sample(samples):
                return block(*inputs, **options)

        return checkpoint(run, *args, **kwargs)

    return checkpointed
