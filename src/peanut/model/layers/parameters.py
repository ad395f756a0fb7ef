"""The tensors of an adapter in one layer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NoReturn

from torch import Tensor, nn
from typing_extensions import Self

from ...errors import PeanutError
from ...weights.stored import onload
from .by_adapter import ByAdapter, Factor, Place, TokenHolder

__all__ = ["NoParameters", "Parameters", "way_to"]


class _Places(dict[str, Place]):
    """Where tensors are stored, by suffix; no plain dictionary, of which torch.export puts copies in its place."""


class Parameters:
    """The tensors of an adapter in one place, by the suffix under which files store them: ``lora_A.weight``.

    In a layer they are where Hugging Face PEFT has them, ``layer.lora_A["default"].weight``: ``put`` puts them there.

    Args:
        untrained: suffixes of those that are buffers.
        rebuilt: suffixes of buffers that a state dict leaves out.

    ``places`` tells where each tensor is stored, by suffix; ``homes`` the modules of the first layer that hold the bare
    ones, by name.
    """

    def __init__(
        self, values: Mapping[str, Tensor], untrained: Collection[str] = (), rebuilt: Collection[str] = ()
    ) -> None:
        self.shapes = {suffix: value.shape for suffix, value in values.items()}
        self.places = _Places()
        self._rebuilt = frozenset(rebuilt)
        self._trees: dict[str, nn.Module] = {}
        self.homes: dict[str, nn.Module] = {}
        bare: dict[str, Tensor] = {}
        for suffix, value in values.items():
            own = value if suffix in untrained else nn.Parameter(value)
            first, *branches = way_to(suffix)
            if not branches:
                bare[suffix] = own
                self.places[suffix] = (bare, suffix)
                continue
            numbered = branches[0].isdecimal()
            module = self._trees.setdefault(first, nn.ModuleList() if numbered else Factor())
            *branches, leaf = branches
            for branch in branches:
                if branch not in module._modules:
                    module.add_module(branch, Factor())
                module = module._modules[branch]  # type: ignore[assignment]
            if leaf == "weight" and f"{suffix[: -len(leaf)]}bias" not in values:
                module.register_parameter("bias", None)  # as a linear layer without one
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
            (first,) = way_to(suffix)
            outer = _holder(layer, suffix)
            home = _by_adapter(outer, first)
            self.homes |= {first: home} if outer is layer else {_TOKENS: outer}
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
            first, *_ = way_to(suffix)
            outer = layer._modules.get(_TOKENS) if suffix.startswith(_TOKENS) else layer
            home = None if outer is None else outer._modules.get(first)
            if outer is not None and isinstance(home, ByAdapter):
                del home[name]
                if not len(home):
                    del outer._modules[first]
        if (tokens := layer._modules.get(_TOKENS)) is not None and not tokens._modules:
            del layer._modules[_TOKENS]

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


_TOKENS = "token_adapter"
"""What the suffixes of tokens trained beside another method begin with."""


def _holder(layer: nn.Module, suffix: str) -> nn.Module:
    """What holds a bare tensor, by adapter: the layer, or what is in it for the sake of tokens."""
    if not suffix.startswith(_TOKENS):
        return layer
    if _TOKENS not in layer._modules:
        layer.add_module(_TOKENS, TokenHolder(layer))
    return layer._modules[_TOKENS]  # type: ignore[return-value]


def way_to(suffix: str) -> list[str]:
    """The names on the way to a tensor; that of a trained bias does not hide the base layer or its bias."""
    suffix = suffix.removeprefix(f"{_TOKENS}.")
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
