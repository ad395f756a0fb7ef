"""Weights that a layer makes anew in each forward: by a parametrisation, or by a hook (``weight_norm``, pruning)."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..stack import in_a_forward

__all__ = ["about_to_change", "current", "is_made", "made_by", "makes_tensor"]


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
    """Whether the tensor ``name`` is made anew before each forward, so that nothing can be written to it."""
    if name in module._parameters:
        return False
    return is_parametrized(module, name) or (
        bool(module._forward_pre_hooks) and getattr(module, name, None) is not None
    )


def about_to_change(module: nn.Module, name: str) -> bool:
    """Whether a hook will make another tensor than the present one when the layer is called: in training."""
    hooks = () if name in module._parameters or not module.training else module._forward_pre_hooks.values()
    return any(isinstance(hook, SpectralNorm) and hook.name == name for hook in hooks) and in_a_forward()


def current(module: nn.Module, name: str) -> Any:
    """The tensor ``name`` of a module; what a hook makes of it before the forward is made first.

    Reading it does not move it on, as a forward of training does with ``spectral_norm``.
    """
    if name in module._parameters:
        return module._parameters[name]
    if "parametrizations" in module._modules and is_parametrized(module, name):
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
