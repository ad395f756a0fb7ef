"""Configs under which the laws test each method."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

__all__ = ["PEER", "VARIANTS", "Variant"]


@dataclass(frozen=True)
class Variant:
    """A config of a method.

    Args:
        name: its name in test ids.
        options: the config's fields.
        silent: whether it promises that a new adapter changes nothing.
        peer: whether the peer can do the same.
        kinds: the kinds of layer to test it on; all of the method's if ``None``.
    """

    name: str = "default"
    options: dict[str, Any] = field(default_factory=dict)
    silent: bool = True
    peer: bool = True
    kinds: tuple[str, ...] | None = None


VARIANTS: dict[str, list[Variant]] = {}
"""Configs by method; a method that is not listed is tested with its default alone."""
PEER: dict[str, tuple[str, ...]] = {}
"""The kinds of layer on which the peer does the same, by method."""

for _module in iter_modules(__path__):
    _found = import_module(f"{__name__}.{_module.name}")
    VARIANTS.update(_found.VARIANTS)
    PEER.update(_found.PEER)
