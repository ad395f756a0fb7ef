"""``Names``: the names of modules in a config, a list as files hold it that is used as a set, too."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, MutableSet
from typing import Any

__all__ = ["Names"]


def _compared(how: str) -> Any:
    def compare(self: Names, other: object) -> Any:
        return getattr(set(self) if isinstance(other, (set, frozenset)) else super(Names, self), how)(other)

    return compare


class Names(list[str], MutableSet[str]):  # noqa: PLW1641 - no list has a hash
    """Names in order, each once: a list, so that the same config is the same file and indices mean something.

    It equals a set of the same names, and scripts may add to it and take from it as from one: ``names |= {"v_proj"}``.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        super().__init__(sorted(set(names)))

    def __eq__(self, other: object) -> bool:
        return set(self) == other if isinstance(other, (set, frozenset)) else super().__eq__(other)

    __le__, __lt__, __ge__, __gt__ = map(_compared, ("__le__", "__lt__", "__ge__", "__gt__"))

    def __ne__(self, other: object) -> bool:
        return not self == other

    def add(self, name: str) -> None:
        if name not in self:
            insort(self, name)

    def discard(self, name: str) -> None:
        if name in self:
            self.remove(name)

    def update(self, *others: Iterable[str]) -> None:
        for name in (name for other in others for name in other):
            self.add(name)
