"""``PeanutError``: one line that says what was found, what was expected, and what to do."""

from __future__ import annotations

import difflib
import heapq
import re
import reprlib
import sys
import warnings
from collections.abc import Collection, Iterable, Mapping
from types import FrameType
from typing import Any

__all__ = [
    "NoMatchingPeftModuleError",
    "OutOfReachWarning",
    "PeanutError",
    "PeftError",
    "PeftWarning",
    "check_keywords",
    "nearest",
    "shown",
    "warn",
]

_LONGEST = 800
"""How many characters each of an error's three parts may have: what is longer is cut in the middle."""
_MOST = 1000
"""How many names are compared letter by letter to find the nearest."""


class PeftError(Exception):
    """Any error of this library, by the name that it has in Hugging Face PEFT."""


class PeanutError(PeftError, ValueError):
    """A wrong input, told in one line: what was found, what was expected, what to do.

    It is a ``ValueError`` so that scripts written for other PEFT libraries keep catching it.

    Args:
        found: what was found.
        expected: what was expected.
        do: what to do.
        detail: lines printed below, such as a module tree.
    """

    def __init__(self, found: str, expected: str = "", do: str = "", *, detail: str = "") -> None:
        self.found, self.expected, self.do, self.detail = found, expected, do, detail
        parts = [found, f"expected {expected}" if expected else "", do]
        line = "; ".join(_line(part) for part in parts if part)
        super().__init__(f"{line}\n{detail}" if detail else line)


class NoMatchingPeftModuleError(PeanutError):
    """A config's targets match no layer of the model."""


class PeftWarning(UserWarning):
    """A warning of this library, by the name that it has in Hugging Face PEFT."""


class OutOfReachWarning(PeftWarning):
    """A large share of a model's weights lies where no adapter reaches it, and the user may not expect so."""


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the line that called this library, however deep in it the reason was found."""
    frame: FrameType | None = sys._getframe(1)
    level = outside = 2
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] == __package__:
            outside = level + 1
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=outside)


def _line(text: str) -> str:
    """A text as one readable line: cut in the middle, and what cannot be printed is escaped."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST * 3 // 4]} … {text[-_LONGEST // 4 :]}"
    text = " ".join(text.split())
    return text if text.isprintable() else "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


class _Shown(reprlib.Repr):
    """``repr`` of a value that anybody may have made: it is short, and always there."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 4, 200, 200
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 20

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if abs(x) < 10**100 else f"a whole number of {x.bit_length()} bits"

    def repr_instance(self, x: object, level: int) -> str:
        try:
            return super().repr_instance(x, level)
        except Exception:  # its own repr fails
            return f"<{type(x).__name__}>"


shown = _Shown().repr
"""A value as an error shows it: ``repr``, cut where it is long."""


def nearest(word: str, candidates: Iterable[str], count: int = 3) -> str:
    """The candidates most like ``word``, best first, as an error shows them: ``'q_proj', 'v_proj'``.

    Of very many, those that share most parts with ``word`` are looked at.
    """
    names, word = sorted({str(name) for name in candidates}), str(word)[:200]
    if len(names) > _MOST:
        parts = set(_parts(word))
        names = sorted(heapq.nlargest(_MOST, names, key=lambda name: len(parts.intersection(_parts(name[:200])))))
    short = [name for name in names if len(name) <= 200]
    close = difflib.get_close_matches(word, short, n=count, cutoff=0.4) or names[:count]
    return ", ".join(shown(name) for name in close)


def _parts(name: str) -> list[str]:
    return re.split(r"[._]", name)


def check_keywords(
    call: str, given: Mapping[str, Any], known: Iterable[str], without_effect: Mapping[str, Collection[Any] | None]
) -> dict[str, Any]:
    """Of ``given`` what is ``known``; scripts may also give what has no effect here.

    Args:
        call: the function that was called.
        known: keywords that it takes.
        without_effect: keywords of Hugging Face PEFT's that change nothing here, each with the values of which that is
            so: ``None`` for any.

    Raises:
        PeanutError: a keyword is none of these, or its value asks for what is not done here.
    """
    known = set(known)
    for name in given.keys() - known:
        if name not in without_effect:
            raise PeanutError(
                f"{call} is given {name!r}",
                f"keywords that it knows ({', '.join(sorted(known))})",
                f"leave it out (nearest: {nearest(name, [*known, *without_effect], 1)})",
            )
        harmless = without_effect[name]
        if harmless is not None and not any(given[name] is each or given[name] == each for each in harmless):
            raise PeanutError(
                f"{call} is given {name}={shown(given[name])}, which it does not do",
                " or ".join(map(shown, harmless)),
                "leave it out",
            )
    return {name: value for name, value in given.items() if name in known}
