"""What other libraries raise over a damaged file, as one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import PeanutError

__all__ = ["foreign_errors"]


@contextmanager
def foreign_errors(found: str, expected: str, do: str) -> Iterator[None]:
    """Turns every error of another library into ``found``, its reason, ``expected`` and ``do``.

    pickle, zip, JSON, tokenizers and configs fail in many types over content that they do not expect. A missing module
    and a lack of memory stay what they are.
    """
    try:
        yield
    except (PeanutError, ModuleNotFoundError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        reason = text if " " in text else f"{type(error).__name__} {text}".strip()  # a key alone says nothing
        raise PeanutError(f"{found}: {reason}", expected, do) from error
