"""``Shared``: the tensors that the layers of a model share, by the names that files give them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from .parameters import Parameters

__all__ = ["Shared"]


class Shared(Mapping[str, Tensor]):
    """What layers share of one suffix, by adapter: ``base_model.vera_A["default"]``, as files call it."""

    def __init__(self, banks: Mapping[str, Parameters], suffix: str) -> None:
        self._banks = {name: bank for name, bank in banks.items() if suffix in bank.suffixes}
        self._suffix = suffix

    def __getitem__(self, name: str) -> Tensor:
        return self._banks[name].values_by_suffix()[self._suffix]

    def __setitem__(self, name: str, value: Tensor) -> None:  # ``+= 1`` does, with the tensor that is there
        if self[name] is not value:
            self._banks[name].assign(self._suffix, value)

    def __iter__(self) -> Iterator[str]:
        return iter(self._banks)

    def __len__(self) -> int:
        return len(self._banks)
