"""What an annotation says of a value, as a function that takes the forms that mean the same and refuses others."""

from __future__ import annotations

import collections.abc
import json
import numbers
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from ..errors import nearest, shown

__all__ = ["Bound", "Check", "WrongError", "check_of"]

Check = Callable[[Any], Any]
"""Returns a value in the form that a config keeps, or raises ``WrongError``."""


@dataclass(frozen=True)
class Bound:
    """What an annotated number must be besides its type.

    Args:
        text: what an error says was expected.
        holds: whether a number is so.
    """

    text: str
    holds: Callable[[Any], bool]


_FLOAT32 = (2 - 2**-23) * 2.0**127
"""The largest number that float32 holds: what is larger is infinite where it is used."""
_PLURAL = {int: "whole numbers", float: "finite numbers", str: "names", bool: "True or False"}


class WrongError(Exception):
    """A value that is not what its annotation says; ``where`` it is in that of the field: ``['q_proj']``, ``[3]``."""

    def __init__(self, value: Any, expected: str, do: str = "") -> None:
        super().__init__(expected)
        self.value, self.expected, self.do, self.where = value, expected, do, ""

    def within(self, where: str) -> WrongError:
        self.where = where + self.where
        return self


def check_of(hint: Any) -> tuple[Check, str]:
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
        raise WrongError(value, "True or False")
    if value not in (0, 1):
        raise WrongError(value, "True or False")
    return bool(value)


def _own_bool(value: Any) -> bool:
    if type(value) is not bool and not _is_numpy(value, "bool"):
        raise WrongError(value, "True or False")
    return bool(value)


def _int(value: Any) -> int:
    try:
        whole = operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        whole = 2**63
    if isinstance(value, bool) or _is_numpy(value, "bool") or not -(2**63) <= whole < 2**63:
        raise WrongError(value, "a whole number")
    return whole


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise WrongError(value, "a finite number")
    number: Any = value
    if not abs(number) <= _FLOAT32:
        raise WrongError(value, "a finite number")
    return number if type(number) is int else float(number)  # files keep 16 as 16


def _str(value: Any) -> str:
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise WrongError(value, "a string")
    return text


def _none(value: Any) -> None:
    if value is not None:
        raise WrongError(value, "None")


def _anything(value: Any) -> Any:
    return value


def _called(value: Any) -> Any:
    if not callable(value):
        raise WrongError(value, "a function")
    return value


def _is_numpy(value: Any, kind: str) -> bool:
    return type(value).__module__ == "numpy" and type(value).__name__.startswith(kind)


_OWN_BOOL: tuple[Check, str] = (_own_bool, "True or False")
_PLAIN: dict[Any, tuple[Check, str]] = {
    bool: (_bool, "True or False"),
    int: (_int, "a whole number"),
    float: (_float, "a finite number"),
    str: (_str, "a string"),
    NoneType: (_none, "None"),
}


def _bounded(hint: Any, extras: Iterable[Any]) -> tuple[Check, str]:
    inner, text = check_of(hint)
    bounds = [each for each in extras if isinstance(each, Bound)]
    text = bounds[0].text if bounds else text

    def check(value: Any) -> Any:
        try:
            fitted = inner(value)
        except WrongError as wrong:
            raise WrongError(value, text) from wrong
        for bound in bounds:
            if not bound.holds(fitted):
                raise WrongError(value, bound.text)
        return fitted

    return check, text


def _one_of(hints: tuple[Any, ...]) -> tuple[Check, str]:
    if any(isinstance(hint, type) and issubclass(hint, Enum) for hint in hints):
        hints = tuple(hint for hint in hints if hint is not str)  # the string names a member
    # Where a flag may be a number too, a number is no flag.
    flag = not any((get_args(hint)[0] if get_origin(hint) is Annotated else hint) in (int, float) for hint in hints)
    checks = [_OWN_BOOL if hint is bool and not flag else check_of(hint) for hint in hints]
    text = _either(text for _, text in checks if text != "None")

    def check(value: Any) -> Any:
        inside = None
        for each, _ in checks:
            try:
                return each(value)
            except WrongError as wrong:  # noqa: PERF203
                if wrong.where or wrong.do:  # it is a list, say, with a wrong entry
                    inside = wrong
        raise inside or WrongError(value, text)

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
        raise WrongError(value, text)

    return check, text


def _member(enum: type[Enum]) -> tuple[Check, str]:
    values = [member.value for member in enum]
    text = f"one of {', '.join(map(str, values))}"

    def check(value: Any) -> Any:
        given = getattr(value, "value", value)
        if isinstance(given, str) and given in values:
            return enum(given)
        do = f"nearest: {nearest(given, values, 1)}" if isinstance(given, str) else ""
        raise WrongError(value, text, do)

    return check, text


def _list(entry: Any) -> tuple[Check, str]:
    inner, _ = check_of(entry)
    base = get_args(entry)[0] if get_origin(entry) is Annotated else entry
    text = f"a list of {_PLURAL[base]}" if base in _PLURAL else "a list"

    def check(value: Any) -> Any:
        if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
            raise WrongError(value, text, f"write [{shown(value)}]" if isinstance(value, str) else "")
        fitted = [_inside(inner, each, "[{}]", index) for index, each in enumerate(value)]
        return sorted(fitted) if isinstance(value, (set, frozenset)) else fitted

    return check, text


def _tuple(entries: tuple[Any, ...]) -> tuple[Check, str]:
    if not entries or entries[-1] is Ellipsis:
        inner, text = _list(entries[0] if entries else Any)
        return lambda value: tuple(inner(value)), text
    checks = [check_of(entry)[0] for entry in entries]
    text = f"a list of {len(checks)}"

    def check(value: Any) -> Any:
        if not isinstance(value, (list, tuple)) or len(value) != len(checks):
            raise WrongError(value, text)
        return tuple(_inside(checks[index], own, "[{}]", index) for index, own in enumerate(value))

    return check, text


def _dict(key: Any, entry: Any) -> tuple[Check, str]:
    of_key, of_entry = check_of(key)[0], check_of(entry)[0]

    def check(value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise WrongError(value, "a dictionary")
        if entry is Any and not _is_plain(value):
            raise WrongError(value, "a dictionary of what JSON can hold", "leave out what no file holds")
        return {_inside(of_key, own, " key", own): _inside(of_entry, each, "[{}]", own) for own, each in value.items()}

    return check, "a dictionary"


def _is_plain(value: Any) -> bool:
    """Whether a file can hold a value."""
    try:
        json.dumps(dict(value))
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _inside(check: Check, value: Any, where: str, place: Any) -> Any:
    """What ``check`` returns for a part of a value, or an error that says where it is."""
    try:
        return check(value)
    except WrongError as wrong:
        raise wrong.within(where.format(shown(place))) from None


def _instance(kind: type) -> tuple[Check, str]:
    text = f"a {kind.__name__}"

    def check(value: Any) -> Any:
        if not isinstance(value, kind):
            raise WrongError(value, text)
        return value

    return check, text
