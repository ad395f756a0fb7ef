"""Weights that a layer makes anew in each forward: by a parametrisation, or by a hook (``weight_norm``, pruning)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..stack import in_a_forward
from .memory import storage_of

__all__ = ["about_to_change", "current", "is_made", "made_by", "made_by_users", "made_now", "made_once", "makes_tensor"]


def makes_tensor(hook: Any) -> bool:
    """Whether a hook is one of torch's that make a tensor of their module."""
    return isinstance(hook, (BasePruningMethod, SpectralNorm, WeightNorm))


def made_by(hook: Any) -> str | None:
    """The name of the tensor that a hook of torch makes: of ``weight_norm`` and ``spectral_norm``, or of pruning."""
    if not makes_tensor(hook):
        return None
    name: str = hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name
    return name


def is_made(module: nn.Module, name: str) -> bool:
    """Whether the tensor ``name`` is made anew before each forward, so that nothing can be written to it.

    By a parametrisation, a hook of this or another module, a property: it lies in no parameter or buffer of the module.
    """
    if name in module._parameters or name in module._buffers:
        return False
    if is_parametrized(module, name):
        return True
    value, held = getattr(module, name, None), [*module.parameters(), *module.buffers()]
    if value is None or any(value is own for own in held):
        return False
    storage = storage_of(value)
    return storage is None or storage not in map(storage_of, held)


def made_by_users(module: nn.Module, name: str) -> bool:
    """Whether, it seems, a hook that is none of torch's makes the tensor ``name`` before each forward."""
    made = [made_by(hook) for hook in module._forward_pre_hooks.values()]
    return None in made and name not in made and name in module.__dict__ and is_made(module, name)


def about_to_change(module: nn.Module, name: str) -> bool:
    """Whether a hook will make another tensor than the present one when the layer is called: in training."""
    hooks = () if name in module._parameters or not module.training else module._forward_pre_hooks.values()
    return any(isinstance(hook, SpectralNorm) and hook.name == name for hook in hooks) and in_a_forward()


_MADE: ContextVar[Mapping[tuple[nn.Module, str], Tensor]] = ContextVar("made", default=MappingProxyType({}))
"""What parametrisations have made for the calls that a thread is in, by the module and the tensor's name."""


def made_once(module: nn.Module) -> AbstractContextManager[None]:
    """Within the context this thread makes the parametrised tensors of a module once, for all that reads them.

    torch's own ``parametrize.cached`` is of the whole process: other threads would be given them.
    """
    return parametrize.cached() if torch.compiler.is_compiling() else _made_once(module)


@contextmanager
def _made_once(module: nn.Module) -> Iterator[None]:
    own = {(module, name): getattr(module, name) for name in module.parametrizations}  # type: ignore[union-attr]
    token = _MADE.set({**_MADE.get(), **own})
    try:
        yield
    finally:
        _MADE.reset(token)


def made_now(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module that were made for the call that this thread is in."""
    if torch.compiler.is_compiling():
        return {}
    return {name: value for (owner, name), value in _MADE.get().items() if owner is module}


def current(module: nn.Module, name: str) -> Any:
    """The tensor ``name`` of a module; what a hook makes of it before the forward is made first.

    Reading it does not move it on, as a forward of training does with ``spectral_norm``.
    """
    own = module._parameters
    if name in own:
        return own[name]
    if "parametrizations" in module._modules and is_parametrized(module, name):
        made = made_now(module)
        if name in made:
            return made[name]
        moving = [part for part in module.parametrizations[name].modules() if part.training]  # type: ignore[index,union-attr]
        for part in moving:
            part.training = False
        try:
            return getattr(module, name)
        finally:
            for part in moving:
                part.training = True
    for hook in module._forward_pre_hooks.values():
        if made_by(hook) != name:
            continue
        if isinstance(hook, SpectralNorm):
            setattr(module, name, hook.compute_weight(module, do_power_iteration=False))
        else:
            hook(module, ())
    return getattr(module, name, None)
