"""Restores the state of a call when gradient checkpointing reruns a block in the backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import PeanutError
from ..layers.calls import Running
from ..layers.state import AdapterState
from .prefix import PrefixView

__all__ = ["restore_in_checkpoints", "restore_no_more"]


def restore_in_checkpoints(model: nn.Module, state: AdapterState) -> None:
    """Makes each checkpointed block of a transformers model run again under the state of the call of its first run.

    Nothing happens where that is so already: it may be called before every forward.
    """
    if torch.compiler.is_compiling():
        return
    for module in model.modules():
        own = module.__dict__
        function = own.get("_gradient_checkpointing_func")
        if function is not None and own.get("gradient_checkpointing"):
            if isinstance(function, _Restoring):
                if function.state is state:
                    continue
                function = function.checkpoint
            own["_gradient_checkpointing_func"] = _Restoring(function, state)


def restore_no_more(model: nn.Module) -> None:
    """Undoes ``restore_in_checkpoints``."""
    for module in model.modules():
        function = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(function, _Restoring):
            module.__dict__["_gradient_checkpointing_func"] = function.checkpoint


@dataclass(frozen=True)
class _Restoring:
    """A checkpoint function whose block sees, whenever it runs, the call under which it was first given.

    Args:
        checkpoint: the function that transformers chose.
    """

    checkpoint: Callable[..., Any]
    state: AdapterState

    def __call__(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call, acting = self.state.call, self.state.acting_now()
        if torch.compiler.is_compiling() and call.plain:
            return self.checkpoint(block, *args, **kwargs)
        off = self.state.disabled  # also once the user has left the context in which it is
        # What is computed once and read by every block is an argument of each: a reentrant checkpoint sees no others.
        read = list(_read(call.running))

        def run(*inputs: Any, **options: Any) -> Any:
            if self.state.acting_now() != acting:
                raise PeanutError(
                    "other adapters are active or merged in a backward than in its forward with gradient checkpointing",
                    "the same ones",
                    "call backward() before you change them, or change them back",
                )
            running = _reading(call.running, iter(inputs[: len(read)]))
            with self.state.under(replace(call, off=off, running=running, again=True)):
                return block(*inputs[len(read) :], **options)

        return self.checkpoint(run, *read, *args, **kwargs)


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
