"""What is written to, and the shortest forms of a way to write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peanut import PeftModel

__all__ = ["Slot", "Target", "Values", "Way", "Write", "assign", "each", "on", "replaced", "slots_of", "through"]


@dataclass(frozen=True)
class Slot:
    """Where a module keeps a tensor; ``key`` is its name in the whole model."""

    owner: nn.Module
    name: str
    key: str

    @property
    def tensor(self) -> Tensor:
        found = self.owner._parameters.get(self.name)
        return self.owner._buffers[self.name] if found is None else found  # type: ignore[return-value]


@dataclass(frozen=True)
class Target:
    """Tensors of a model that are to be written.

    Args:
        model: the model.
        slots: the tensors.
        anew: a fresh model with the model's values, but these by key.
    """

    model: PeftModel
    slots: Sequence[Slot]
    anew: Callable[[dict[str, Tensor]], PeftModel]

    def tensors(self) -> list[Tensor]:
        return [slot.tensor for slot in self.slots]

    def by_owner(self, values: Iterable[Tensor]) -> Iterable[tuple[nn.Module, dict[str, Tensor]]]:
        """Each module with all of its tensors by name, those that are written among them."""
        found: dict[nn.Module, dict[str, Tensor]] = {}
        for slot, value in zip(self.slots, values, strict=True):
            found.setdefault(slot.owner, {})[slot.name] = value
        for owner, own in found.items():
            yield owner, owner.state_dict() | own


Values = list[Tensor]
Write = Callable[[Values], "dict[str, Tensor] | None"]
"""Writes; or returns tensors by key with which the model is to be called (``torch.func.functional_call``)."""
Way = Callable[[Target], Write]


def slots_of(model: nn.Module, wanted: Callable[[str, Tensor], bool]) -> list[Slot]:
    """The tensors of a model that are wanted, each once."""
    seen, found = set(), []
    for path, module in model.named_modules():
        for name, value in [*module._parameters.items(), *module._buffers.items()]:
            key = f"{path}.{name}"
            if value is not None and id(value) not in seen and wanted(key, value):
                seen.add(id(value))
                found.append(Slot(module, name, key))
    return found


def each(write: Callable[[Slot, Tensor], Any]) -> Way:
    """A way that writes one tensor after the other, without gradients."""

    def way(target: Target) -> Write:
        @torch.no_grad()
        def written(values: Values) -> None:
            for slot, value in zip(target.slots, values, strict=True):
                write(slot, value)

        return written

    return way


def on(write: Callable[[Tensor, Tensor], Any]) -> Way:
    """A way that needs the tensor alone."""
    return each(lambda slot, value: write(slot.tensor, value))


def through(take: Callable[[Tensor], Any], write: Callable[[Any, Tensor], Any]) -> Way:
    """A way that takes something of each tensor beforehand, and writes through it."""

    def way(target: Target) -> Write:
        taken = [take(tensor) for tensor in target.tensors()]

        @torch.no_grad()
        def written(values: Values) -> None:
            for each_taken, value in zip(taken, values, strict=True):
                write(each_taken, value)

        return written

    return way


def own_memory(tensor: Tensor) -> Tensor:
    """``tensor`` after it was given memory that nothing else lies in."""
    tensor.data = tensor.detach().clone(memory_format=torch.contiguous_format)
    return tensor


def assign(tensor: Tensor, value: Tensor) -> None:
    tensor[...] = value


def set_data(tensor: Tensor, value: Tensor) -> None:
    tensor.data = value.clone()


def replaced(slot: Slot, value: Tensor) -> Tensor:
    """What takes the place of a tensor: a parameter for a parameter."""
    own = slot.tensor
    return nn.Parameter(value.clone(), own.requires_grad) if isinstance(own, nn.Parameter) else value.clone()
