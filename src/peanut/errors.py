"""``PeanutError``: one line that says what was found, what was expected, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["PeanutError", "nearest"]


class PeanutError(ValueError):
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
        line = "; ".join(" ".join(part.split()) for part in parts if part)
        super().__init__(f"{line}\n{detail}" if detail else line)


def nearest(word: str, candidates: Iterable[str], count: int = 3) -> str:
    """The candidates most like ``word``, best first, as an error shows them: ``'q_proj', 'v_proj'``."""
    names = sorted(set(candidates))
    close = difflib.get_close_matches(word, names, n=count, cutoff=0.4) or names[:count]
    return ", ".join(repr(name) for name in close)
