"""Regular expressions from configs and files, each matched within a bound on time, whoever wrote them.

All patterns that do not come from this library's own code are matched here.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from time import monotonic, thread_time
from typing import Any, TypeVar

from ..errors import PeanutError, shown

__all__ = [
    "MOST_EXPRESSIONS",
    "OUT_PROJECTION",
    "check_pattern",
    "check_patterns",
    "ends",
    "fullmatch",
    "matching_pattern",
    "outer",
    "pattern_of_none",
]

T = TypeVar("T")

OUT_PROJECTION = ".base_layer.out_proj"
"""What follows the path of an ``nn.MultiheadAttention`` in that of its output projection, as in files of others."""
SECONDS = 5.0
"""How much of a thread's time slow patterns may take, all together, in one minute. Others take microseconds."""
_USUAL = {"compile": 1e-3, "match": 1e-4}
"""What compiling and matching may take without being slow."""
_LARGEST = 100_000
"""How many characters a pattern may have with its repetitions written out, as ``regex`` compiles them."""
_MOST_NAMES, MOST_EXPRESSIONS = 100_000, 1_000
"""How many names, and how many regular expressions, a config may have for one value that differs between layers."""
_BEFORE = r"(?:.*\.)?"
"""What comes before the end of a path that they match."""
_NAME = re.compile(r"(?:[\w-]|\\?\.)+")
"""A key that is a name."""
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
        if len(pattern) > _LARGEST or _written_out(pattern) > _LARGEST:
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


def check_pattern(name: str, pattern: str, before: str = "") -> None:
    """Refuses what is no regular expression."""
    try:
        _compiled(pattern, before, "")
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


def ends(path: str) -> list[str]:
    """All names that a path ends in: ``mlp.up_proj`` in itself and in ``up_proj``."""
    names = path.split(".")
    return [".".join(names[first:]) for first in range(len(names))]


@dataclass(frozen=True)
class _Index:
    """Keys of a ``rank_pattern`` or its like, so that a path need not be compared with each.

    Most are names, in which a dot stands for any character: they are looked up, once for each of their ``forms``.

    Args:
        names: by a name without its dots, the place of its key.
        forms: by length, where names of this length have dots.
        expressions: the places of the keys that are more than names.
    """

    names: dict[str, int]
    forms: dict[int, set[tuple[int, ...]]]
    expressions: list[int]

    @classmethod
    def of(cls, keys: tuple[str, ...]) -> _Index:
        found = cls({}, {}, [])
        for place, key in enumerate(keys):
            if not _NAME.fullmatch(key):
                found.expressions.append(place)
                continue
            name = re.sub(r"(?<!\\)\.", "\0", key).replace("\\.", ".")
            found.names.setdefault(name, place)
            found.forms.setdefault(len(name), set()).add(tuple(at for at, each in enumerate(name) if each == "\0"))
        return found

    def places(self, path: str) -> Iterator[int]:
        """The places of the names that ``path`` ends in."""
        for end in ends(path):
            for form in self.forms.get(len(end), ()):
                letters = list(end)
                for at in form:
                    letters[at] = "\0"
                place = self.names.get("".join(letters))
                if place is not None:
                    yield place


_indexed = lru_cache(maxsize=16)(_Index.of)


def check_patterns(name: str, patterns: Collection[str]) -> None:
    """Refuses a ``rank_pattern`` or its like with a key that is no regular expression, or with too many.

    Raises:
        PeanutError: it has.
    """
    keys = tuple(patterns)
    index = _indexed(keys[:_MOST_NAMES])
    many = len(index.expressions) + sum(map(len, index.forms.values()))
    if len(keys) > _MOST_NAMES or many > MOST_EXPRESSIONS:
        raise PeanutError(
            f"{name} has {len(keys):,} keys, {len(index.expressions):,} of them regular expressions",
            f"at most {_MOST_NAMES:,} names, and {MOST_EXPRESSIONS:,} regular expressions or forms of names",
            "write layers that have one value as one expression",
        )
    for place in index.expressions:
        check_pattern(name, keys[place], _BEFORE)


def outer(path: str) -> str:
    """The path of the layer that a layer belongs to: of the attention, for its output projection."""
    return path.removesuffix(OUT_PROJECTION)


def matching_pattern(patterns: Collection[str], path: str) -> str | None:
    """The first key (a name or a regular expression) of a ``rank_pattern`` or its like that ``path`` ends in."""
    keys = tuple(patterns)
    index = _indexed(keys)
    first = min(index.places(path), default=len(keys))
    earlier = (place for place in index.expressions if place < first)
    first = next((place for place in earlier if fullmatch(keys[place], path, _BEFORE)), first)
    return keys[first] if first < len(keys) else None


def pattern_of_none(patterns: Collection[str], paths: Sequence[str]) -> str | None:
    """The first key that none of ``paths`` ends in."""
    keys = tuple(patterns)
    index = _indexed(keys)
    used = {place for path in paths for place in index.places(path)}
    alone = (place for place in index.expressions if any(fullmatch(keys[place], path, _BEFORE) for path in paths))
    left = sorted({*range(len(keys))} - used - {*alone})
    return keys[left[0]] if left else None
