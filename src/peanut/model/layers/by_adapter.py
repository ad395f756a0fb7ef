"""What holds the tensors of all adapters in one layer, by name; as Hugging Face PEFT's scripts read it."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from functools import partial
from itertools import chain
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from ...errors import PeanutError

__all__ = ["ByAdapter", "Factor", "Place", "TokenHolder", "View"]

Place = tuple[dict[str, Any], str]
"""Where a module stores a tensor: its parameters or buffers, and the name there.

This lookup takes a tenth of the time of a module's attribute, and finds a tensor that replaced the first one.
"""


class Factor(nn.Module):
    """A factor of an adapter's change, ``lora_A["default"]``; for scripts it can be called as a linear layer can.

    Layers read its tensors and never call it, so hooks on it do not run: they belong on the layer.
    """

    weight: Tensor
    bias: Tensor | None

    @property
    def in_features(self) -> int:
        return int(self.weight.shape[1])

    @property
    def out_features(self) -> int:
        return int(self.weight.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dim() != 2:
            raise PeanutError(
                "a call of one factor of a convolution", "a call of the layer", "call the layer around it"
            )
        return F.linear(x, self.weight, self.bias)


_VIEWS: dict[str, Any] = {"keys": KeysView, "values": ValuesView, "items": ItemsView}


def _or_adapter(name: str) -> Any:
    """What a mapping has of a name, where no adapter is called so."""

    def get(held: ByAdapter) -> Any:
        if name in held:
            return held[name]
        if name not in _VIEWS:
            raise AttributeError(name)  # adapters come and go with their model's add_adapter and delete_adapter
        return partial(_VIEWS[name], held)

    return property(get)


class ByAdapter(nn.ModuleDict):
    """What adapters have of one name in a layer, by adapter: modules (``lora_A``) or tensors (``vera_lambda_d``).

    An adapter may have any name without a dot: also ``0``, ``layers``, and ``keys``, which ``nn.ModuleDict`` refuses;
    where none has such a name, ``keys()``, ``values()`` and ``items()`` are those of a mapping.
    """

    keys, values, items, clear, pop, update = map(_or_adapter, (*_VIEWS, "clear", "pop", "update"))

    def _held(self) -> Iterator[dict[str, Any]]:
        yield from (self._modules, self._parameters, self._buffers)

    def __getitem__(self, name: str) -> Any:
        for held in self._held():
            if name in held:
                return held[name]
        raise KeyError(name)

    def __setitem__(self, name: str, module: Any) -> None:
        if not isinstance(module, Tensor):
            self._check_module(name, module)
            self._modules[name] = module
            return
        held: dict[str, Any] = self._buffers if name in self._buffers else self._parameters
        if getattr(held.get(name), "shape", None) != module.shape:
            raise PeanutError(
                f"a tensor of shape {tuple(module.shape)} put in the place of adapter {name!r}",
                "one of the shape that is there",
                "add the adapter first, and keep its shape",
            )
        if held is self._parameters and not isinstance(module, nn.Parameter):
            module = nn.Parameter(module, requires_grad=held[name].requires_grad)
        held[name] = module

    def __setattr__(self, name: str, value: Any) -> None:
        if type(value).__name__ == "FullyShardedDataParallel":
            raise PeanutError(
                f"FSDP around the tensors of adapter {name!r} alone, which the layer around them reads",
                "FSDP around the whole layer",
                "wrap by peanut.utils.fsdp_auto_wrap_policy(model), with use_orig_params=True",
            )
        if isinstance(value, nn.Module):
            self._check_module(name, value)
        super().__setattr__(name, value)

    def _check_module(self, name: str, module: nn.Module) -> None:
        """Refuses another module in the place of factors, whose tensors the layer reads."""
        there = self.__dict__.get("_modules", {}).get(name)
        if isinstance(there, (Factor, nn.ModuleList)) and there is not module:
            raise PeanutError(
                f"a {type(module).__name__} in the place of what adapter {name!r} has",
                "new tensors in what is there",
                f"set its tensors: [{name!r}].weight.data.copy_(…)",
            )

    def __delitem__(self, name: str) -> None:
        for held in self._held():
            held.pop(name, None)
        self._non_persistent_buffers_set.discard(name)

    def __contains__(self, name: object) -> bool:
        return any(name in held for held in self._held())

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(self._held())

    def __len__(self) -> int:
        return sum(map(len, self._held()))

    def train(self, mode: bool = True) -> Self:
        self.__dict__["training"] = mode  # past a module of that name
        for module in self._modules.values():
            module.train(mode)
        return self


class View(ByAdapter):
    """Tensors under other names than those by which they are stored; one that is put here is put there."""

    def __init__(self, places: Mapping[str, Place]) -> None:
        super().__init__()
        self.__dict__["_places"] = places
        for name, (owner, leaf) in places.items():
            held: dict[str, Any] = self._parameters if isinstance(owner[leaf], nn.Parameter) else self._buffers
            held[name] = owner[leaf]

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self._write(name)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        self._write(name)

    def _write(self, name: str) -> None:
        if name in self.__dict__.get("_places", ()):
            owner, leaf = self.__dict__["_places"][name]
            owner[leaf] = self[name]


class TokenHolder(nn.Module):
    """What Hugging Face PEFT has in a layer of its own where tokens are trained beside another method.

    It holds their tensors by adapter; what else is asked of it is the layer's.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "_layer" not in self.__dict__:  # how this is copied
                raise
            return getattr(self._layer, name)
