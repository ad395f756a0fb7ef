"""Modules that are trained whole beside the adapter, such as a classification head."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PeanutError
from .parameters import NamedModules
from .state import BASE, AdapterState

__all__ = ["SavedModule"]


class SavedModule(nn.Module):
    """A module of the base and, for each adapter that trains it, a copy; the active adapter's copy answers."""

    def __init__(self, original_module: nn.Module, path: str, state: AdapterState) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save: NamedModules[nn.Module] = NamedModules()
        self.path = path
        self.state = state

    def add(self, name: str) -> None:
        """Gives adapter ``name`` a copy of the module as it is in the base."""
        self.modules_to_save[name] = copy.deepcopy(self.original_module).requires_grad_(True)

    def delete(self, name: str) -> None:
        """Removes an adapter's copy."""
        del self.modules_to_save[name]

    def acting(self) -> nn.Module:
        """The module that answers now."""
        names = [name for name in self.state.active if name in self.modules_to_save]
        if self.state.disabled or not names:
            return self.original_module
        return self.modules_to_save[names[0]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.disabled or self.state.samples is None:
            return self.acting()(*args, **kwargs)
        return self._forward_per_sample(*args, **kwargs)

    def _forward_per_sample(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Each sample's rows through its own adapter's copy."""
        y: Tensor | None = None
        for name, rows in self.state.groups(x.shape[0]).items():
            own = name != BASE and name in self.modules_to_save
            module = self.modules_to_save[name] if own else self.original_module
            index = torch.tensor(rows, device=x.device)
            part = module(x[index], *args, **kwargs)
            if y is not None and part.shape[1:] != y.shape[1:]:
                raise PeanutError(
                    f"the copies of '{self.path}' give shapes {tuple(y.shape[1:])} and {tuple(part.shape[1:])}",
                    "the same shape for every sample of a batch",
                    "run adapters with different heads in different batches",
                )
            y = x.new_empty(x.shape[0], *part.shape[1:], dtype=part.dtype) if y is None else y
            y = y.index_copy(0, index, part)
        assert y is not None  # groups() raises on an empty batch
        return y

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save"):
                raise
            return getattr(self.acting(), name)
