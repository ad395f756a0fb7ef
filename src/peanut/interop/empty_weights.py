"""Makes modules whose parameters have no storage, to be filled by loading."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.nn.parameter import is_lazy

__all__ = ["init_empty_weights", "skip_init_on_device"]

P = ParamSpec("P")
R = TypeVar("R")

_EMPTY: ContextVar[bool] = ContextVar("peanut_empty", default=False)
"""Whether modules that are made now have no storage."""


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Within the context the parameters that modules are given, and their buffers if asked, are on the meta device."""

    def parameter(module: nn.Module, name: str, value: nn.Parameter) -> nn.Parameter | None:
        if not _EMPTY.get() or is_lazy(value):
            return None
        kind: Any = type(value)
        return kind(value.to("meta"), **{**vars(value), "requires_grad": value.requires_grad})  # type: ignore[no-any-return]

    def buffer(module: nn.Module, name: str, value: Tensor | None) -> Tensor | None:
        return value.to("meta") if value is not None and _EMPTY.get() else None

    registrars: list[tuple[Any, Any]] = [(hooks.register_module_parameter_registration_hook, parameter)]
    if include_buffers:
        registrars.append((hooks.register_module_buffer_registration_hook, buffer))
    held, token = [register(hook) for register, hook in registrars], _EMPTY.set(True)
    try:
        yield
    finally:
        _EMPTY.reset(token)
        for each in held:
            each.remove()


def skip_init_on_device(func: Callable[P, R]) -> Callable[P, R]:
    """A function that makes modules with storage also within ``init_empty_weights``."""

    @functools.wraps(func)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        token = _EMPTY.set(False)
        try:
            return func(*args, **kwargs)
        finally:
            _EMPTY.reset(token)

    return called
