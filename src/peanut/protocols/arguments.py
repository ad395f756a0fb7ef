"""``checked``: arguments of public calls that are of another type than they say are refused before anything is done."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import cache, wraps
from types import NoneType
from typing import Any, ParamSpec, TypeVar, get_type_hints

from torch import nn

from ..errors import PeanutError, shown
from .values import check_value

__all__ = ["checked"]

P = ParamSpec("P")
R = TypeVar("R")

_EXPECTED: dict[Any, str] = {
    bool: "True or False",
    nn.Module: "a torch.nn.Module",
    str | os.PathLike[str]: "the path of a folder",
}
"""What is checked: a flag given as text would be true, and what is swapped or not set fails far from its call."""


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: checks the arguments that are flags, models and paths.

    Raises:
        PeanutError: one is something else.
    """
    signature = inspect.signature(function)
    made, _, method = function.__qualname__.rpartition(".")
    called = made if method == "__init__" else method

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        known = {name: value for name, value in kwargs.items() if name in signature.parameters}
        for name, value in signature.bind_partial(*args[: len(signature.parameters)], **known).arguments.items():
            hint = _hints(function).get(name)
            if hint in _EXPECTED:
                _check(called, name, hint, value)
        return function(*args, **kwargs)

    return call


@cache
def _hints(function: Any) -> dict[str, Any]:
    return get_type_hints(function)


def _check(function: str, name: str, hint: Any, value: Any) -> None:
    try:
        check_value(name, hint, value)
    except PeanutError:
        given = shown(value) if isinstance(value, (str, int, float, NoneType)) else f"a {type(value).__name__}"
        raise PeanutError(f"{function}({name}={given})", _EXPECTED[hint], f"change {name}") from None
