"""Values of configs are checked by their fields' annotations: types, bounds, choices."""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import numbers
import operator
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from enum import Enum
from functools import cache
from types import NoneType, SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import PeanutError, nearest, shown

__all__ = [
    "Bound",
    "Count",
    "Depth",
    "Layers",
    "NonNegative",
    "Positive",
    "Probability",
    "Whole",
    "check_types",
    "check_value",
]

Check = Callable[[Any], Any]
"""Returns a value in the form that a config keeps, or raises ``_WrongError``."""


@dataclasses.dataclass(frozen=True)
class Bound:
    """What an annotated number must be besides its type.

    Args:
        text: what an error says was expected.
        holds: whether a number is so.
    """

    text: str
    holds: Callable[[Any], bool]


Count = Annotated[int, Bound("a whole number of at least 1", lambda value: value >= 1)]
Whole = Annotated[int, Bound("a whole number of at least 0", lambda value: value >= 0)]
Depth = Annotated[int, Bound("a whole number from 0 to 10,000", lambda value: 0 <= value <= 10_000)]
Layers = Annotated[int, Bound("a whole number from 1 to 10,000", lambda value: 1 <= value <= 10_000)]
Positive = Annotated[float, Bound("a finite number above 0", lambda value: value > 0)]
NonNegative = Annotated[float, Bound("a finite number of at least 0", lambda value: value >= 0)]
Probability = Annotated[float, Bound("a probability of at least 0 and below 1", lambda value: 0 <= value < 1)]

_FLOAT32 = (2 - 2**-23) * 2.0**127
"""The largest number that float32 holds: what is larger is infinite where it is used."""
_PLURAL = {int: "whole numbers", float: "finite numbers", str: "names", bool: "True or False"}


class _WrongError(Exception):
    """A value that is not what its annotation says; ``where`` it is in that of the field: ``['q_proj']``, ``[3]``."""

    def __init__(self, value: Any, expected: str, do: str = "") -> None:
        super().__init__(expected)
        self.value, self.expected, self.do, self.where = value, expected, do, ""

    def within(self, where: str) -> _WrongError:
        self.where = where + self.where
        return self


def check_types(config: Any) -> None:
    """Checks every field of a dataclass by its annotation, and puts its value into the form that files have.

    Lists may be given as any collection, numbers as numpy's, strings as paths, flags as 0 or 1, members of an Enum by
    their value, and an empty collection as ``None``. What a class has as its default needs no check.

    Raises:
        PeanutError: a value has another type, or is out of its bounds; a number does not fit into int64 or float32.
    """
    own: Any = type(config)
    for name, default, factory, check in _checks(own):
        value = getattr(config, name)
        if value is default and factory is None:
            continue
        fitted = factory() if value is None and factory is not None else _told(check, name, value)
        if fitted is not value:
            setattr(config, name, fitted)


def check_value(name: str, hint: Any, value: Any) -> Any:
    """A value of an annotation, in the form that files have.

    Raises:
        PeanutError: it is something else.
    """
    return _told(_check(hint)[0], name, value)


def _told(check: Check, name: str, value: Any) -> Any:
    """What ``check`` returns, or an error that names the value."""
    try:
        return check(value)
    except _WrongError as wrong:
        found = f"{name}{wrong.where}={shown(wrong.value)}"
        raise PeanutError(found, wrong.expected, wrong.do or f"change {name}") from None


@cache
def _checks(config_class: Any) -> list[tuple[str, Any, Callable[[], Any] | None, Check]]:
    """By field: its name, its default, what makes that, and the check of its annotation."""
    hints: dict[str, Any] = {}
    for base in reversed(config_class.__mro__):
        names = vars(sys.modules[base.__module__]) if base.__module__ in sys.modules else {}
        for name, hint in inspect.get_annotations(base).items():
            hints[name] = Any  # where it has a name that only type checkers import, or a local one
            with suppress(NameError, TypeError):
                hints |= get_type_hints(SimpleNamespace(__annotations__={name: hint}), names, include_extras=True)
    return [
        (
            field.name,
            field.default,
            None if field.default_factory is dataclasses.MISSING else field.default_factory,
            _check(hints[field.name])[0],
        )
        for field in dataclasses.fields(config_class)
    ]


def _check(hint: Any) -> tuple[Check, str]:
    """The check of an annotation, and what it expects in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _bounded(args[0], args[1:])
    if origin in (Union, UnionType):
        return _one_of(args)
    if origin is Literal:
        return _choice(args)
    kind = origin or hint
    if kind in (list, set, frozenset):
        return _list(*(args or (Any,)))
    if kind is tuple:
        return _tuple(args)
    if kind is dict:
        return _dict(*(args or (Any, Any)))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _member(kind)
    if kind in _PLAIN:
        return _PLAIN[kind]
    if kind in (Callable, collections.abc.Callable):
        return _called, "a function"
    return _instance(kind) if isinstance(kind, type) and kind is not Any else (_anything, "anything")


def _bool(value: Any) -> bool:
    if type(value) is not bool and not (isinstance(value, numbers.Integral) or _is_numpy(value, "bool")):
        raise _WrongError(value, "True or False")
    if value not in (0, 1):
        raise _WrongError(value, "True or False")
    return bool(value)


def _int(value: Any) -> int:
    try:
        whole = operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        whole = 2**63
    if isinstance(value, bool) or _is_numpy(value, "bool") or not -(2**63) <= whole < 2**63:
        raise _WrongError(value, "a whole number")
    return whole


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _WrongError(value, "a finite number")
    number: Any = value
    if not abs(number) <= _FLOAT32:
        raise _WrongError(value, "a finite number")
    return number if type(number) is int else float(number)  # files keep 16 as 16


def _str(value: Any) -> str:
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise _WrongError(value, "a string")
    return text


def _none(value: Any) -> None:
    if value is not None:
        raise _WrongError(value, "None")


def _anything(value: Any) -> Any:
    return value


def _called(value: Any) -> Any:
    if not callable(value):
        raise _WrongError(value, "a function")
    return value


def _is_numpy(value: Any, kind: str) -> bool:
    return type(value).__module__ == "numpy" and type(value).__name__.startswith(kind)


_PLAIN: dict[Any, tuple[Check, str]] = {
    bool: (_bool, "True or False"),
    int: (_int, "a whole number"),
    float: (_float, "a finite number"),
    str: (_str, "a string"),
    NoneType: (_none, "None"),
}


def _bounded(hint: Any, extras: Iterable[Any]) -> tuple[Check, str]:
    inner, text = _check(hint)
    bounds = [each for each in extras if isinstance(each, Bound)]
    text = bounds[0].text if bounds else text

    def check(value: Any) -> Any:
        try:
            fitted = inner(value)
        except _WrongError as wrong:
            raise _WrongError(value, text) from wrong
        for bound in bounds:
            if not bound.holds(fitted):
                raise _WrongError(value, bound.text)
        return fitted

    return check, text


def _one_of(hints: tuple[Any, ...]) -> tuple[Check, str]:
    if any(isinstance(hint, type) and issubclass(hint, Enum) for hint in hints):
        hints = tuple(hint for hint in hints if hint is not str)  # the string names a member
    checks = [_check(hint) for hint in hints]
    text = _either(text for _, text in checks if text != "None")

    def check(value: Any) -> Any:
        inside = None
        for each, _ in checks:
            try:
                return each(value)
            except _WrongError as wrong:  # noqa: PERF203
                if wrong.where or wrong.do:  # it is a list, say, with a wrong entry
                    inside = wrong
        raise inside or _WrongError(value, text)

    return check, text


def _either(texts: Iterable[str]) -> str:
    """``"a, b or c"``, of texts that may have several parts themselves."""
    return " or ".join(", ".join(texts).replace(" or ", ", ").rsplit(", ", 1))


def _choice(options: tuple[Any, ...]) -> tuple[Check, str]:
    text = _either(map(repr, options))

    def check(value: Any) -> Any:
        for option in options:
            if type(option) is type(value) and option == value:
                return value
        raise _WrongError(value, text)

    return check, text


def _member(enum: type[Enum]) -> tuple[Check, str]:
    values = [member.value for member in enum]
    text = f"one of {', '.join(map(str, values))}"

    def check(value: Any) -> Any:
        given = getattr(value, "value", value)
        if isinstance(given, str) and given in values:
            return enum(given)
        do = f"nearest: {nearest(given, values, 1)}" if isinstance(given, str) else ""
        raise _WrongError(value, text, do)

    return check, text


def _list(entry: Any) -> tuple[Check, str]:
    inner, _ = _check(entry)
    base = get_args(entry)[0] if get_origin(entry) is Annotated else entry
    text = f"a list of {_PLURAL[base]}" if base in _PLURAL else "a list"

    def check(value: Any) -> Any:
        if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
            raise _WrongError(value, text, f"write [{shown(value)}]" if isinstance(value, str) else "")
        fitted = [_inside(inner, each, "[{}]", index) for index, each in enumerate(value)]
        return sorted(fitted) if isinstance(value, (set, frozenset)) else fitted

    return check, text


def _tuple(entries: tuple[Any, ...]) -> tuple[Check, str]:
    if not entries or entries[-1] is Ellipsis:
        inner, text = _list(entries[0] if entries else Any)
        return lambda value: tuple(inner(value)), text
    checks = [_check(entry)[0] for entry in entries]
    text = f"a list of {len(checks)}"

    def check(value: Any) -> Any:
        if not isinstance(value, (list, tuple)) or len(value) != len(checks):
            raise _WrongError(value, text)
        return tuple(_inside(checks[index], own, "[{}]", index) for index, own in enumerate(value))

    return check, text


def _dict(key: Any, entry: Any) -> tuple[Check, str]:
    of_key, of_entry = _check(key)[0], _check(entry)[0]

    def check(value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise _WrongError(value, "a dictionary")
        return {_inside(of_key, own, " key", own): _inside(of_entry, each, "[{}]", own) for own, each in value.items()}

    return check, "a dictionary"


def _inside(check: Check, value: Any, where: str, place: Any) -> Any:
    """What ``check`` returns for a part of a value, or an error that says where it is."""
    try:
        return check(value)
    except _WrongError as wrong:
        raise wrong.within(where.format(shown(place))) from None


def _instance(kind: type) -> tuple[Check, str]:
    text = f"a {kind.__name__}"

    def check(value: Any) -> Any:
        if not isinstance(value, kind):
            raise _WrongError(value, text)
        return value

    return check, text
