"""Values of configs are checked by their fields' annotations, and numbers by the bounds in them."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from types import SimpleNamespace
from typing import Annotated, Any, get_type_hints

from ..errors import PeanutError, shown
from .annotations import Bound, Check, WrongError, check_of

__all__ = [
    "Bound",
    "Count",
    "Depth",
    "Layers",
    "NonNegative",
    "Positive",
    "Probability",
    "Scale",
    "Whole",
    "check_types",
    "check_value",
    "takes_none",
]

Count = Annotated[int, Bound("a whole number of at least 1", lambda value: value >= 1)]
Whole = Annotated[int, Bound("a whole number of at least 0", lambda value: value >= 0)]
Depth = Annotated[int, Bound("a whole number from 0 to 10,000", lambda value: 0 <= value <= 10_000)]
Layers = Annotated[int, Bound("a whole number from 1 to 10,000", lambda value: 1 <= value <= 10_000)]
Positive = Annotated[float, Bound("a finite number above 0", lambda value: value > 0)]
NonNegative = Annotated[float, Bound("a finite number of at least 0", lambda value: value >= 0)]
Scale = Annotated[float, Bound("a finite number from -1,000,000 to 1,000,000", lambda value: abs(value) <= 1e6)]
Probability = Annotated[float, Bound("a probability of at least 0 and below 1", lambda value: 0 <= value < 1)]


def check_types(config: Any) -> None:
    """Checks every field of a dataclass by its annotation, and puts its value into the form that files have.

    Lists may be given as any collection, numbers as numpy's, strings as paths, flags as 0 or 1, members of an Enum by
    their value, and ``None`` for an empty collection or a flag that is not set. A class's own default needs no check.

    Raises:
        PeanutError: a value has another type, or is out of its bounds; a number does not fit into int64 or float32.
    """
    own: Any = type(config)
    for name, default, unset, check in _checks(own):
        value = getattr(config, name)
        if value is default:
            continue
        fitted = unset() if value is None and unset is not None else _checked(check, name, value)
        if fitted is not value:
            setattr(config, name, fitted)


def takes_none(config_class: Any) -> frozenset[str]:
    """The fields of a dataclass for which ``None`` is a value of its own."""
    found = set[str]()
    for name, _, unset, check in _checks(config_class):
        with suppress(WrongError):
            found |= {name} if unset is None and check(None) is None else set()
    return frozenset(found)


def check_value(name: str, hint: Any, value: Any) -> Any:
    """A value of an annotation, in the form that files have.

    Raises:
        PeanutError: it is something else.
    """
    return _checked(check_of(hint)[0], name, value)


def _checked(check: Check, name: str, value: Any) -> Any:
    """What ``check`` returns, or an error that names the value."""
    try:
        return check(value)
    except WrongError as wrong:
        found = f"{name}{wrong.where}={shown(wrong.value)}"
        raise PeanutError(found, wrong.expected, wrong.do or f"change {name}") from None


@cache
def _checks(config_class: Any) -> list[tuple[str, Any, Callable[[], Any] | None, Check]]:
    """By field: its name, its default, what ``None`` stands for if that is no value, and its annotation's check."""
    hints: dict[str, Any] = {}
    for base in reversed(config_class.__mro__):
        names = vars(sys.modules[base.__module__]) if base.__module__ in sys.modules else {}
        for name, hint in inspect.get_annotations(base).items():
            hints[name] = Any  # where it has a name that only type checkers import, or a local one
            with suppress(NameError, TypeError, AttributeError):
                hints |= get_type_hints(SimpleNamespace(__annotations__={name: hint}), names, include_extras=True)
    return [
        (
            field.name,
            field.default,
            _unset(field, hints[field.name]),
            check_of(hints[field.name])[0],
        )
        for field in dataclasses.fields(config_class)
    ]


def _unset(field: dataclasses.Field[Any], hint: Any) -> Callable[[], Any] | None:
    """What makes the value that ``None`` stands for: of a flag False, of a collection an empty one."""
    if hint is bool:
        return bool
    return None if field.default_factory is dataclasses.MISSING else field.default_factory
