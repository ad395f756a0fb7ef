"""Restores adapter state when gradient checkpointing reruns a block in the backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import wraps
from typing import Any

from torch import Tensor, nn

from ..layers.state import AdapterState, Running
from .prefix import PrefixView

__all__ = ["Replayed", "put_back", "replayed"]

Replayed = list[tuple[Any, Callable[..., Any]]]


def replayed(model: nn.Module, state: AdapterState) -> Replayed:
    """Makes each checkpointed block of a transformers model run again under what held in its first run."""
    changed: Replayed = []
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None and getattr(module, "gradient_checkpointing", False):
            changed.append((module, function))
            module._gradient_checkpointing_func = _under_what_holds_now(function, state)  # type: ignore[assignment]
    return changed


def put_back(changed: Replayed) -> None:
    """Undoes ``replayed``."""
    for module, function in changed:
        module._gradient_checkpointing_func = function


def _under_what_holds_now(checkpoint: Callable[..., Any], state: AdapterState) -> Callable[..., Any]:
    @wraps(checkpoint)
    def checkpointed(block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        samples, tasks, running = state.samples, state.tasks, state.running
        # What is computed once and read by every block is an argument of each: a reentrant checkpoint sees no others.
        read = list(_read(running))

        def run(*inputs: Any, **options: Any) -> Any:
            with state.during(samples, tasks, _reading(running, iter(inputs[: len(read)]))):
                return block(*inputs[len(read) :], **options)

        return checkpoint(run, *read, *args, **kwargs)

    return checkpointed


def _read(running: Running) -> Iterator[Tensor]:
    """The tensors that are known of a batch and have gradients."""
    if running.prefix is not None:
        yield running.prefix.values
    for gates in running.gates.values():
        for pairs in gates.values():
            yield from (gate for _, gate in pairs)


def _reading(running: Running, read: Iterator[Tensor]) -> Running:
    """What is known of a batch, with these tensors in the place of ``_read``'s."""
    prefix = None if running.prefix is None else PrefixView(next(read))
    gates = {
        name: {path: [(expert, next(read)) for expert, _ in pairs] for path, pairs in own.items()}
        for name, own in running.gates.items()
    }
    return replace(running, prefix=prefix, gates=gates)
