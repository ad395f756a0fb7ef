"""How a method joins: what is registered is trained, saved, listed, tested and measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from ..errors import PeanutError
from .config import PeftConfig
from .input_method import InputMethod
from .method import Method
from .names import METHODS, registered

__all__ = ["get_peft_config", "model_name", "register", "registered"]

M = TypeVar("M", bound=type[Method[Any]])


def register(method: M) -> M:
    """Class decorator: makes a method known everywhere, by the name that its config class gives it.

    The same class defined again (a cell that is run twice, a module that is reloaded) replaces itself.

    Raises:
        PeanutError: another method has that name.
    """
    instance = method()
    name = instance.name
    taken = next((each for own, each in METHODS.items() if own.casefold() == name.casefold()), None)
    if taken is not None and _where(type(taken)) != _where(method):
        raise PeanutError(
            f"{_where(method)} registers the name {name!r}, which {_where(type(taken))} has",
            "a name of its own",
            f"give {method.config_class.__name__} another ``method``",
        )
    METHODS[name] = instance
    return method


def _where(method: type) -> str:
    return f"{method.__module__}.{method.__qualname__}"


def model_name(method: Method[Any]) -> str | None:
    """What the class of the models that a method adapts is called: ``LoraModel``, as its config is ``LoraConfig``.

    ``None`` for input methods, which put nothing into layers.
    """
    called = method.config_class.__name__.removesuffix("Config") + "Model"
    return None if isinstance(method, InputMethod) else called


def get_peft_config(values: Mapping[str, Any]) -> PeftConfig:
    """The config that a dictionary with a ``peft_type`` describes."""
    return PeftConfig.from_dict(values)
