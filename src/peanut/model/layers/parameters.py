"""The tensors of an adapter in one layer, and the containers that hold those of all adapters there, by name."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import chain
from typing import Any, NoReturn

from torch import Tensor, nn
from typing_extensions import Self

from ...errors import PeanutError
from ...weights.stored import onload

__all__ = ["ByAdapter", "NoParameters", "Parameters", "Place"]

Place = tuple[dict[str, Any], str]
"""Where a module stores a tensor: its parameters or buffers, and the name there.

This lookup takes a tenth of the time of a module's attribute, and finds a tensor that replaced the first one.
"""


class _Places(dict[str, Place]):
    """Where tensors are stored, by suffix; no plain dictionary, of which torch.export puts copies in its place."""


class ByAdapter(nn.Module):
    """What adapters have of one name in a layer, by adapter: modules (``lora_A``) or tensors (``vera_lambda_d``).

    An adapter may have any name without a dot: also ``0``, ``layers``, and ``keys``, which ``nn.ModuleDict`` refuses.
    """

    def _held(self) -> Iterator[dict[str, Any]]:
        yield from (self._modules, self._parameters, self._buffers)

    def __getitem__(self, name: str) -> Any:
        return next(held[name] for held in self._held() if name in held)

    def __setitem__(self, name: str, module: nn.Module) -> None:
        self._modules[name] = module

    def __setattr__(self, name: str, value: Any) -> None:
        if type(value).__name__ == "FullyShardedDataParallel":
            raise PeanutError(
                f"FSDP around the tensors of adapter {name!r} alone, which the layer around them reads",
                "FSDP around the whole layer",
                "wrap by peanut.utils.fsdp_auto_wrap_policy(model), with use_orig_params=True",
            )
        super().__setattr__(name, value)

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

    def __getattr__(self, name: str) -> Any:
        if name in ("keys", "values", "items") and not any(name in held for held in self._held()):
            return getattr({own: self[own] for own in self}, name)  # as of a dict, unless an adapter is called so
        return super().__getattr__(name)

    def train(self, mode: bool = True) -> Self:
        self.__dict__["training"] = mode  # past a module of that name
        for module in self._modules.values():
            module.train(mode)  # type: ignore[union-attr]
        return self


class Parameters:
    """The tensors of an adapter in one place, by the suffix under which files store them: ``lora_A.weight``.

    In a layer they are where Hugging Face PEFT has them, ``layer.lora_A["default"].weight``: ``put`` puts them there.

    Args:
        untrained: suffixes of those that are buffers.
        rebuilt: suffixes of buffers that a state dict leaves out.

    ``places`` tells where each tensor is stored, by suffix.
    """

    def __init__(
        self, values: Mapping[str, Tensor], untrained: Collection[str] = (), rebuilt: Collection[str] = ()
    ) -> None:
        self.shapes = {suffix: value.shape for suffix, value in values.items()}
        self.places = _Places()
        self._rebuilt = frozenset(rebuilt)
        self._trees: dict[str, nn.Module] = {}
        bare: dict[str, Tensor] = {}
        for suffix, value in values.items():
            own = value if suffix in untrained else nn.Parameter(value)
            first, *branches = _parts(suffix)
            if not branches:
                bare[suffix] = own
                self.places[suffix] = (bare, suffix)
                continue
            module = self._trees.setdefault(first, nn.Module())
            *branches, leaf = branches
            for branch in branches:
                if branch not in module._modules:
                    module.add_module(branch, nn.Module())
                module = module._modules[branch]  # type: ignore[assignment]
            if isinstance(own, nn.Parameter):
                module.register_parameter(leaf, own)
            else:
                module.register_buffer(leaf, own, persistent=suffix not in rebuilt)
            self.places[suffix] = (module._parameters if isinstance(own, nn.Parameter) else module._buffers, leaf)
        self._loose = bare
        self._homes: tuple[nn.Module, ...] = tuple(self._trees.values())

    @property
    def suffixes(self) -> tuple[str, ...]:
        return tuple(self.shapes)

    def in_parts(self) -> list[str]:
        """The suffixes of tensors of which this process holds a part: of FSDP, or of DeepSpeed's third stage."""
        return [suffix for suffix, (owner, leaf) in self.places.items() if owner[leaf].shape != self.shapes[suffix]]

    def put(self, layer: nn.Module, name: str) -> None:
        """Puts the tensors into a layer, under the name of the adapter; bare ones into the first layer alone."""
        for first, tree in self._trees.items():
            _by_adapter(layer, first)[name] = tree
        for suffix, value in self._loose.items():
            (first,) = _parts(suffix)
            home = _by_adapter(layer, first)
            held: dict[str, Any] = home._parameters if isinstance(value, nn.Parameter) else home._buffers
            held[name] = value
            if suffix in self._rebuilt:
                home._non_persistent_buffers_set.add(name)
            self.places[suffix] = (held, name)
            self._homes += (home,)
        self._loose = {}

    def take_out(self, layer: nn.Module, name: str) -> None:
        """Takes the tensors out of a layer."""
        for suffix in self.suffixes:
            first, *_ = _parts(suffix)
            home = layer._modules.get(first)
            if isinstance(home, ByAdapter):
                del home[name]
                if not len(home):
                    del layer._modules[first]

    def __iter__(self) -> Iterator[Tensor]:
        """The tensors as they are, offloaded ones too."""
        return (owner[leaf] for owner, leaf in self.places.values())

    def values_by_suffix(self) -> dict[str, Tensor]:
        """The tensors by suffix; those that accelerate has offloaded with the base are brought back for good."""
        values = {suffix: owner[leaf] for suffix, (owner, leaf) in self.places.items()}
        for value in values.values():  # asked in every forward, so without a generator
            if value.is_meta:
                for module in self._homes:
                    onload(module)  # each stays the object that it is
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
        own, self.shapes[suffix] = owner[leaf], value.shape
        owner[leaf] = nn.Parameter(value, requires_grad=own.requires_grad) if isinstance(own, nn.Parameter) else value


def _parts(suffix: str) -> list[str]:
    """The names on the way to a tensor; that of a trained bias does not hide the base layer or its bias."""
    if suffix == "lora_magnitude_vector":  # which files call so, and there is the weight of a module
        return [suffix, "weight"]
    return ["trained_bias"] if suffix in ("bias", "base_layer.bias") else suffix.split(".")


def _by_adapter(layer: nn.Module, name: str) -> ByAdapter:
    """What adapters have of a name in a layer."""
    home = layer._modules.setdefault(name, ByAdapter())
    assert isinstance(home, ByAdapter)
    return home


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
