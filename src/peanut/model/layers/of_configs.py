"""What a layer tells of its adapters' configs, by adapter, as Hugging Face PEFT's layers keep it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

__all__ = ["OfConfigs", "TokenRows"]


class OfConfigs(Mapping[str, Any]):
    """A field of the configs of the adapters in a layer, by adapter, as they are when one looks."""

    def __init__(self, methods: Mapping[str, tuple[Any, Any]], field: str) -> None:
        self._methods, self._field = methods, field

    def __getitem__(self, name: str) -> Any:
        value = getattr(self._methods[name][1], self._field, None)
        if value is None:
            raise KeyError(name)
        return value

    def __iter__(self) -> Iterator[str]:
        return (name for name, (_, config) in self._methods.items() if getattr(config, self._field, None) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))


class TokenRows(OfConfigs):
    """The base's vectors of the tokens that adapters of a layer train, by adapter."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer._methods, "token_indices")
        self._layer = layer

    def __getitem__(self, name: str) -> Tensor:
        return self._layer.frozen.weight.detach()[super().__getitem__(name)]  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None
