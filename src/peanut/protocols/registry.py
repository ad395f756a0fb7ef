"""The list of methods: what the laws test, the benchmark measures and the documentation tabulates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from .config import CONFIG_CLASSES, PeftConfig, config_class_of
from .method import Method

__all__ = ["METHODS", "get_peft_config", "method_of", "register"]

METHODS: dict[str, Method[Any]] = {}
"""Every method by its name in ``adapter_config.json``; ``methods/`` fills it."""

M = TypeVar("M", bound=type[Method[Any]])


def register(method: M) -> M:
    """Class decorator: makes a method known everywhere."""
    instance = method()
    METHODS[instance.name] = instance
    CONFIG_CLASSES[instance.name] = instance.config_class
    return method


def method_of(peft_type: Any, source: str = "the config") -> Method[Any]:
    """The method called ``peft_type``.

    Raises:
        PeanutError: there is none of that name.
    """
    return METHODS[config_class_of(peft_type, source).method.value]


def get_peft_config(values: Mapping[str, Any]) -> PeftConfig:
    """The config that a dictionary with a ``peft_type`` describes."""
    return PeftConfig.from_dict(values)
