"""Forward hooks that can be found again, to remove them or to move them to a module that wraps the first."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...weights.made import makes_tensor

__all__ = ["Hooking", "has_hooks", "hook", "input_of", "move_hooks", "names_of", "unhook"]


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


@dataclass(frozen=True)
class _Carried:
    """A user's hook of a module that is wrapped now; it is called with the module that the wrapper holds."""

    hook: Callable[..., Any]
    name: str

    def __call__(self, wrapper: nn.Module, *args: Any) -> Any:
        return self.hook(getattr(wrapper, self.name), *args)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks are called with a module, other than those of torch that make a tensor of it."""
    return any(not makes_tensor(function) for name in _HOOKS for function in module.__dict__[name].values())


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Moves the hooks of ``old`` to ``new``, which replaces it: they run around what the model computes there.

    The dictionary itself moves, so that the handles that users hold go on removing their hooks (not those of hooks that
    ``new`` had beside them). Hooks of torch that make a tensor of ``old`` (``weight_norm``, pruning) stay.
    """
    wraps = next((name for name, child in new.named_children() if child is old), None)
    for name in _HOOKS:
        moving, there = old.__dict__[name], new.__dict__[name]
        staying = {key: function for key, function in moving.items() if makes_tensor(function)}
        if len(staying) == len(moving):
            continue
        for key in staying:
            del moving[key]
        for key, function in moving.items():
            if isinstance(function, _Carried):
                moving[key] = function.hook
            elif wraps is not None and not isinstance(getattr(function, "__self__", None), Hooking):
                moving[key] = _Carried(function, wraps)
        both = {**there, **moving}
        moving.clear()
        moving.update(both)
        old.__dict__[name], new.__dict__[name] = OrderedDict(staying), moving
    for name in _FLAGS:
        new.__dict__[name].update(old.__dict__[name])
    if new._is_full_backward_hook is None:
        new._is_full_backward_hook, old._is_full_backward_hook = old._is_full_backward_hook, None
