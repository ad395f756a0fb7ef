"""``Mirrored``: the tensors of a head that is tied to an embedding and has that one's adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from .parameters import Parameters, way_to

__all__ = ["Mirrored"]


class Mirrored(Parameters):
    """The tensors of a head that is tied to an embedding: those of the embedding, transposed, under the head's names.

    They are the embedding's, so no file, optimizer or state dict is given them from here.

    Args:
        source: those of the embedding, at ``path``.
        names: for each suffix here that in the embedding.
    """

    def __init__(self, source: Parameters, path: str, names: Mapping[str, str]) -> None:
        super().__init__({})
        self.source, self.path = source, path
        self.names = {own: other for own, other in names.items() if other in source.shapes}
        self.shapes = {own: source.shapes[other][::-1] for own, other in self.names.items()}
        turned = _Turned(source, self.names)
        for suffix in self.names:
            self.places[suffix] = (turned, suffix)
            first, *branches = way_to(suffix)
            if branches:
                self._trees[first] = _Leaf(turned, suffix)

    def __iter__(self) -> Iterator[Tensor]:
        """The embedding's own, not transposed."""
        return iter(self.source)

    def in_parts(self) -> list[str]:
        return []

    def values_by_suffix(self) -> dict[str, Tensor]:
        values = self.source.values_by_suffix()
        return {own: values[other].T for own, other in self.names.items()}

    def assign(self, suffix: str, value: Tensor) -> None:
        """Leaves what is there: it is the embedding's."""


class _Turned(dict[str, Any]):
    """The transposed tensors of other parameters, as they are when one looks."""

    def __init__(self, source: Parameters, names: Mapping[str, str]) -> None:
        super().__init__()
        self.source, self.names = source, names

    def __getitem__(self, suffix: str) -> Tensor:
        owner, leaf = self.source.places[self.names[suffix]]
        return owner[leaf].T  # type: ignore[no-any-return]


class _Leaf(nn.Module):
    """A module whose weight is a tensor of another layer, transposed."""

    def __init__(self, turned: _Turned, suffix: str) -> None:
        super().__init__()
        self.__dict__["place"] = turned, suffix

    @property
    def weight(self) -> Tensor:
        turned, suffix = self.__dict__["place"]
        return turned[suffix]  # type: ignore[no-any-return]
