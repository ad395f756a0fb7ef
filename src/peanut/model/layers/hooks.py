"""Forward hooks that can be found again, to remove them or to move them to a module that wraps the first."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

__all__ = ["Hooking", "hook", "input_of", "move_hooks", "names_of", "unhook"]


def names_of(module: nn.Module) -> tuple[str, ...]:
    """The names of the parameters of a module's forward, for arguments that are given by position."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def input_of(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Any, Sequence[Any], Mapping[str, Any]]:
    """The first argument of a module's forward, given by position or by name, and the others."""
    if args:
        return args[0], args[1:], kwargs
    name = names_of(module)[0]
    if name not in kwargs:
        raise TypeError(f"{type(module).__name__} is called without {name!r}")
    return kwargs[name], (), {key: value for key, value in kwargs.items() if key != name}


class Hooking:
    """A class whose bound methods are registered as hooks of modules."""

    __slots__ = ()


def hook(module: nn.Module, function: Callable[..., Any], *, before: bool = False) -> None:
    """Registers a method of a ``Hooking`` as a module's forward hook, once."""
    hooks = module._forward_pre_hooks if before else module._forward_hooks
    if function in hooks.values():
        return
    register: Any = module.register_forward_pre_hook if before else module.register_forward_hook
    register(function, with_kwargs=True)


def unhook(module: nn.Module, owner: Hooking | None = None) -> list[tuple[Callable[..., Any], bool]]:
    """Removes a module's hooks of one ``Hooking``, or of all; returns them, each with whether it runs before."""
    taken: list[tuple[Callable[..., Any], bool]] = []
    for before in (True, False):
        hooks: Any = module._forward_pre_hooks if before else module._forward_hooks
        flags: Any = module._forward_pre_hooks_with_kwargs if before else module._forward_hooks_with_kwargs
        for key, function in list(hooks.items()):
            holder = getattr(function, "__self__", None)
            if isinstance(holder, Hooking) and (owner is None or holder is owner):
                del hooks[key]
                flags.pop(key, None)
                taken.append((function, before))
    return taken


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Moves this library's hooks from ``old`` to ``new``, which replaces it."""
    for function, before in unhook(old):
        hook(new, function, before=before)
