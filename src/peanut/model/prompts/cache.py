"""A model's cache under any of its names: transformers 5.24 renamed the older ones to ``cache``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["CACHE_NAMES", "cache_in", "cache_name", "put_cache"]

CACHE_NAMES = ("cache", "past_key_values", "cache_params")


def cache_name(module: nn.Module) -> str | None:
    """The name of the parameter of a module's forward that takes a cache, ``None`` if there is none."""
    parameters = inspect.signature(type(module).forward).parameters
    # XLM's and Flaubert's dictionary was called ``cache`` before.
    found = (name for name in CACHE_NAMES if name in parameters)
    return next((name for name in found if not str(parameters[name].annotation).startswith("dict")), None)


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a call, which may name it as earlier versions did."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def put_cache(arguments: dict[str, Any], name: str | None, cache: Any) -> None:
    """Puts a cache among the arguments of a call, under the name that the module knows."""
    assert name is not None  # a module without one is given none
    for each in CACHE_NAMES:
        arguments.pop(each, None)
    arguments[name] = cache
