"""Regular expressions from configs and files, each matched within a bound on time, whoever wrote them.

All patterns that do not come from this library's own code are matched here.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from functools import lru_cache
from time import monotonic, thread_time
from typing import Any, TypeVar

from ..errors import PeanutError, shown

__all__ = ["check_pattern", "fullmatch", "matching_pattern"]

T = TypeVar("T")

SECONDS = 5.0
"""How much of a thread's time slow patterns may take, all together, in one minute. Others take microseconds."""
_USUAL = {"compile": 1e-3, "match": 1e-4}
"""What compiling and matching may take without being slow."""
_LARGEST = 100_000
"""How many characters a pattern may have with its repetitions written out, as ``regex`` compiles them."""
_FUZZY = re.compile(r"(?<!\\)\{(?!\d*(?:,\d*)?\})")
"""Braces that ``re`` takes for text, and ``regex`` for a match that need not be exact."""
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(\d+)(?:,\d*)?\}|.", re.DOTALL)


class _Clock(threading.local):
    """What slow patterns took in this minute."""

    slow, until = 0.0, 0.0


_clock = _Clock()


def _timed(doing: str, pattern: str, run: Callable[[float], T]) -> T:
    """Runs ``run`` with the time that is left.

    Raises:
        PeanutError: it takes longer.
    """
    now, start = monotonic(), thread_time()
    if now > _clock.until:
        _clock.slow, _clock.until = 0.0, now + 60
    try:
        if _clock.slow >= SECONDS:
            raise TimeoutError
        return run(SECONDS - _clock.slow)
    except TimeoutError:
        _clock.until = 0.0
        raise PeanutError(
            f"{shown(pattern)} takes more than {SECONDS:g} seconds",
            "a regular expression that ends soon",
            "write it without repetitions inside repetitions",
        ) from None
    finally:
        _clock.slow += max(0.0, thread_time() - start - _USUAL[doing])


@lru_cache(maxsize=2**16)
def _compiled(pattern: str, before: str, after: str) -> Any:
    """``pattern``, which is one for ``re``, as the library ``regex`` compiles it: its matches can be given a time."""
    import regex

    try:
        if _written_out(pattern) > _LARGEST:
            raise OverflowError("it is too large")
        re.compile(pattern)
        return _timed(
            "compile", pattern, lambda _: regex.compile(f"{before}(?:{pattern}){after}", regex.V0, cache_pattern=False)
        )
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        raise PeanutError(f"{shown(pattern)} is no regular expression ({error})", do="correct it") from None


def _written_out(pattern: str) -> int:
    """About how many characters ``pattern`` has with its repetitions written out."""
    open_groups, size, last = list[int](), 0, 0
    for token in _TOKEN.finditer(pattern):
        if token[1]:
            size += last * (max(0, int(token[1]) - 1) if len(token[1]) < 10 else _LARGEST)
        elif token[0] == "(":
            open_groups.append(size)
            size = 0
        elif token[0] == ")" and open_groups:
            last = size + 1
            size = open_groups.pop() + last
        else:
            last = 1
            size += 1
    return size + sum(open_groups)


def check_pattern(name: str, pattern: str) -> None:
    """Refuses what is no regular expression."""
    try:
        _compiled(pattern, "", "")
    except PeanutError as error:
        raise PeanutError(f"{name}={error.found}", error.expected, error.do) from None
    if _FUZZY.search(pattern):
        raise PeanutError(
            f"{name}={shown(pattern)} has braces that are no repetition",
            "a{2}, a{2,} or a{2,5}",
            "write \\{ for a brace",
        )


def fullmatch(pattern: str, text: str, before: str = "", after: str = "") -> Any:
    """The match of a whole text with ``pattern``, and own parts before and after it; ``None`` if there is none.

    Raises:
        PeanutError: it is no regular expression, or takes too long.
    """
    compiled = _compiled(pattern, before, after)
    return _timed("match", pattern, lambda left: compiled.fullmatch(text, timeout=left))


def matching_pattern(patterns: Mapping[str, Any], path: str) -> str | None:
    """The key (a name or a regular expression) of a ``rank_pattern`` or its like that matches the end of ``path``."""
    return next((key for key in patterns if fullmatch(key, path, before=r"(?:.*\.)?")), None)
