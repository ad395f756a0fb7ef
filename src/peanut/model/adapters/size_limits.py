"""Bounds what a new adapter may make, so that sizes in a config take neither the memory nor the time of a machine.

An adapter that is read may make what its own file makes believable; one that is new, what the machine's memory holds.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...errors import PeanutError

__all__ = ["Limited", "SizeLimit", "limit_for", "limited_by_file"]

_ALWAYS = 2**26
"""How many numbers a file's config may always ask for (256 MB), however small model and file are."""
_TIMES = 16
"""How many times the numbers of the model and the file together it may ask for: rebuilt tensors are in no file."""
_CALLS = 100_000
"""How many calls of torch may make the tensors of one place."""

_file: ContextVar[tuple[str, int, int] | None] = ContextVar("file", default=None)
"""The file that is being read: its name, and how many tensors and numbers it holds."""


@contextmanager
def limited_by_file(source: str, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the context adapters are added whose tensors are ``state``, read from ``source``."""
    token = _file.set((source, len(state), sum(value.numel() for value in state.values())))
    try:
        yield
    finally:
        _file.reset(token)


def limit_for(model: nn.Module, name: str) -> SizeLimit:
    """What adapter ``name``, which is new, may make."""
    read = _file.get()
    if read is None:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf
        return SizeLimit(f"adapter {name!r}", "what this machine's memory holds", pages / 4, _CALLS, _CALLS)
    source, tensors, numbers = read
    numbers += sum(parameter.numel() for parameter in model.parameters())
    return SizeLimit(
        f"the config of '{source}'",
        f"sizes that the file's {tensors} tensors have",
        max(_ALWAYS, _TIMES * numbers),
        _CALLS // 10 + 50 * tensors,
        100 + 2 * tensors,
    )


@dataclass
class SizeLimit:
    """What may be made of an adapter still.

    Args:
        whose: who asks, for an error.
        expected: what it may ask for, in words.
        numbers: how many numbers in memory: those that other places keep are taken off.
        calls: how many calls of torch in one place.
        tensors: how many tensors in one place.
    """

    whose: str
    expected: str
    numbers: float
    calls: int
    tensors: int

    def refuse(self, what: str) -> PeanutError:
        return PeanutError(f"{self.whose} asks for {what}", self.expected, "lower its sizes (r, depth and the like)")

    def charge(self, made: Mapping[str, Tensor]) -> None:
        """Takes the tensors off that a place keeps.

        Raises:
            PeanutError: there are more of them than there may be.
        """
        if len(made) > self.tensors:
            raise self.refuse(f"{len(made)} tensors in one layer")
        self.numbers -= sum(value.numel() for value in made.values() if not value.is_meta)


class Limited(TorchFunctionMode):
    """Within the context the tensors of one place are made, within a limit; without storage they cost the call alone.

    Raises:
        PeanutError: they, and what is made on the way to them, are more.
    """

    def __init__(self, limit: SizeLimit, *, meta: bool) -> None:
        super().__init__()
        self.limit, self.meta, self.calls, self.numbers = limit, meta, 0, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if self.calls > self.limit.calls:
            raise self.limit.refuse(f"more than {self.limit.calls:,} steps in one layer")
        options = kwargs or {}
        device = options.get("device")  # some are made on the CPU wherever the others are
        if getattr(func, "__name__", "") in _MAKING and not (self.meta if device is None else str(device) == "meta"):
            asked = _numbers(func.__name__, args, options)
            self.numbers += asked
            if self.numbers > self.limit.numbers:
                raise self.limit.refuse(f"a tensor of {asked:,} numbers")
        return func(*args, **options)


_SHAPED = {
    "empty",
    "zeros",
    "ones",
    "full",
    "rand",
    "randn",
    "randint",
    "new_empty",
    "new_zeros",
    "new_ones",
    "new_full",
}
_LONG = {"randperm", "arange", "linspace"}
_MAKING = {*_SHAPED, *_LONG, "eye"}
"""Names of the functions of torch that make a tensor from sizes."""


def _numbers(name: str, args: tuple[Any, ...], options: Mapping[str, Any]) -> int:
    """How many numbers a call of one of them asks for."""
    given = [*args, options.get("size")]
    shape = next((each for each in given if isinstance(each, (tuple, list))), None)
    sizes = [abs(size) for size in (given if shape is None else shape) if isinstance(size, int)]
    if name == "eye":
        return sizes[0] * sizes[-1] if sizes else 0
    return max(sizes, default=0) if name in _LONG else math.prod(sizes)
