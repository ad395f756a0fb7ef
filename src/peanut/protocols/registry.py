"""The registry of methods, and ``PeftType``: their names, which scripts use as an Enum.

A method that is registered is trained, saved, listed, tested and measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, TypeVar

from ..errors import PeanutError, nearest

__all__ = ["CONFIG_CLASSES", "METHODS", "PeftType", "method_of", "name_of", "register", "registered"]

M = TypeVar("M", bound="type[Any]")

METHODS: dict[str, Any] = {}
"""Every method that was registered so far, by its name in ``adapter_config.json``; ``register`` fills it."""
CONFIG_CLASSES: dict[str, Any] = {}
"""The config class of each of them, for scripts that choose one by name."""


def register(method: M) -> M:
    """Class decorator: makes a method known everywhere, by the name that its config class gives it.

    The same class defined again (a cell that is run twice, a module that is reloaded) replaces itself.

    Raises:
        PeanutError: another method has that name, or it has none that can be used.
    """
    name = getattr(getattr(method, "config_class", None), "method", None)
    if not isinstance(name, str) or not re.fullmatch(r"[\w .+-]+", name):
        raise PeanutError(
            f"{_where(method)} registers the name {name!r}",
            "letters, digits, spaces and -._+",
            "give it a config_class, a PeftConfig whose ``method`` is the name",
        )
    instance = method()
    taken = next((each for own, each in METHODS.items() if own.casefold() == name.casefold()), None)
    if taken is not None and _where(type(taken)) != _where(method):
        raise PeanutError(
            f"{_where(method)} registers the name {name!r}, which {_where(type(taken))} has",
            "a name of its own",
            f"give {method.config_class.__name__} another ``method``",
        )
    METHODS[name], CONFIG_CLASSES[name] = instance, instance.config_class
    return method


def _where(method: type) -> str:
    return f"{method.__module__}.{method.__qualname__}"


def registered() -> dict[str, Any]:
    """``METHODS``, once it holds our own methods and those of installed packages."""
    import_module("..methods", __package__)
    return METHODS


def name_of(given: object) -> str | None:
    """A method's own name from its name in any case, or a member of an Enum; ``None`` if there is no such method."""
    name = str(getattr(given, "value", given))
    if name in METHODS:
        return name
    return next((own for own in registered() if own.casefold() == name.casefold()), None)


def method_of(peft_type: object, source: str = "the config") -> Any:
    """The method called ``peft_type``.

    Raises:
        PeanutError: there is none of that name.
    """
    name = name_of(peft_type)
    if name is None:
        raise PeanutError(
            f"{source} names the method {peft_type!r}",
            f"one of {', '.join(sorted(METHODS))}",
            f"nearest: {nearest(str(peft_type), METHODS, 1)}",
        )
    return METHODS[name]


class _Members(type):
    """What an Enum's class can do; the members are the registered methods."""

    @property
    def __members__(cls) -> Mapping[str, PeftType]:
        return {name: PeftType(name) for name in registered()}

    def __iter__(cls) -> Iterator[PeftType]:
        return map(PeftType, registered())

    def __len__(cls) -> int:
        return len(registered())

    def __contains__(cls, name: object) -> bool:
        return name_of(name) is not None

    def __getitem__(cls, name: str) -> PeftType:
        return PeftType(name)

    def __getattr__(cls, name: str) -> PeftType:
        if name.startswith("_") or name not in cls:
            raise AttributeError(f"PeftType has no member {name!r}")
        return PeftType(name)

    def __dir__(cls) -> list[str]:
        return [*super().__dir__(), *registered()]


class PeftType(str, metaclass=_Members):
    """The name of a registered method, for scripts that use Hugging Face PEFT's Enum of this name.

    ``PeftType.LORA``, ``PeftType("LORA")`` and ``PeftType["LORA"]`` are one object, equal to ``"LORA"``.

    Raises:
        PeanutError: no method has that name.
    """

    __slots__ = ()

    def __new__(cls, name: object) -> PeftType:
        own = method_of(name, cls.__name__).name
        return _MEMBERS.setdefault(own, super().__new__(cls, own))

    @property
    def name(self) -> str:
        """The method's name."""
        return str(self)

    @property
    def value(self) -> str:
        """The method's name."""
        return str(self)


_MEMBERS: dict[str, PeftType] = {}
