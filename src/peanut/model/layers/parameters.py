"""Containers: the tensors of an adapter in one layer, and a ``ModuleDict`` that allows any name."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Generic, NoReturn, TypeVar

from torch import Tensor, nn
from typing_extensions import Self

from ...errors import PeanutError
from ...weights.stored import onload

__all__ = ["NamedModules", "NoParameters", "Parameters", "Place"]

M = TypeVar("M", bound=nn.Module)

Place = tuple[dict[str, Any], str]
"""Where a module stores a tensor: its parameters or buffers, and the name there.

This lookup takes a tenth of the time of a module's attribute, and finds a tensor that replaced the first one.
"""


class _Places(dict[str, Place]):
    """Where tensors are stored, by suffix; no plain dictionary, of which torch.export puts copies in its place."""


class NamedModules(nn.Module, Generic[M]):
    """Modules by any name without a dot: also ``0``, ``layers``, and ``keys``, which ``nn.ModuleDict`` refuses."""

    def __getitem__(self, name: str) -> M:
        return self._modules[name]  # type: ignore[return-value]

    def __setitem__(self, name: str, module: M) -> None:
        self._modules[name] = module

    def __delitem__(self, name: str) -> None:
        del self._modules[name]

    def __contains__(self, name: object) -> bool:
        return name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def train(self, mode: bool = True) -> Self:
        self.__dict__["training"] = mode  # past a module of that name
        for module in self._modules.values():
            module.train(mode)  # type: ignore[union-attr]
        return self


class Parameters(nn.Module):
    """Tensors by the suffix under which files store them: ``lora_A.weight`` is ``lora_A.weight`` here too.

    Args:
        untrained: suffixes of those that are buffers.
        rebuilt: suffixes of buffers that a state dict leaves out.

    ``places`` tells where each tensor is stored, by suffix.
    """

    def __init__(
        self, values: Mapping[str, Tensor], untrained: Collection[str] = (), rebuilt: Collection[str] = ()
    ) -> None:
        super().__init__()
        self.suffixes = tuple(values)
        self.places = _Places()
        for suffix, value in values.items():
            module: nn.Module = self
            *branches, leaf = suffix.split(".")
            for branch in branches:
                if branch not in module._modules:
                    module.add_module(branch, nn.Module())
                module = module._modules[branch]  # type: ignore[assignment]
            if suffix in untrained:
                module.register_buffer(leaf, value, persistent=suffix not in rebuilt)
            else:
                module.register_parameter(leaf, nn.Parameter(value))
            self.places[suffix] = (module._buffers if suffix in untrained else module._parameters, leaf)

    def values_by_suffix(self) -> dict[str, Tensor]:
        """The tensors by suffix; those that accelerate has offloaded with the base are brought back for good."""
        values = {suffix: owner[leaf] for suffix, (owner, leaf) in self.places.items()}
        for value in values.values():  # asked in every forward, so without a generator
            if value.is_meta:
                onload(self)  # each stays the object that it is
                break
        return values

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        for owner, leaf in self.places.values():
            if isinstance(owner[leaf], nn.Parameter):
                owner[leaf].requires_grad_(requires_grad)
        return self

    def assign(self, suffix: str, value: Tensor) -> None:
        """Puts a tensor in place of the one that is there, trained or not as that one."""
        owner, leaf = self.places[suffix]
        own = owner[leaf]
        owner[leaf] = nn.Parameter(value, requires_grad=own.requires_grad) if isinstance(own, nn.Parameter) else value


class NoParameters(dict[str, Any]):
    """The parameters of an adapted layer itself, which has no weight and no bias: they are those of its base layer."""

    def __missing__(self, name: str) -> NoReturn:
        raise PeanutError(
            f"{name!r} among the parameters of a layer with adapters itself",
            f"base_layer.{name}",
            f"read .{name}, or take its base_layer; reparametrise and prune before adapters are added",
        )

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith(("weight_", "bias_")):  # weight_orig, which pruning makes
            self.__missing__(name)
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        if name not in self:
            self.__missing__(name)
        super().__delitem__(name)
