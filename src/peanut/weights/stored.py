"""A module's tensors where they are stored: in the module, or where accelerate's hooks keep them between its forwards.

Such a hook replaces the forward of its module, puts the weights in before it and takes them out after it. Whoever
reads them at another time reads tensors without storage, from which torch makes arbitrary numbers, not an error.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PeanutError
from .made import current

__all__ = [
    "called_onloaded",
    "check_by_layer",
    "copied",
    "device_of",
    "offload_hook",
    "onload",
    "same_tensor",
    "some_tensor",
    "store",
    "stored",
]


def offload_hook(module: nn.Module) -> Any:
    """accelerate's hook that offloads the module's tensors between forwards, ``None`` if none does."""
    return next((hook for hook in _hooks(module.__dict__.get("_hf_hook")) if getattr(hook, "offload", False)), None)


def _hooks(hook: Any) -> Iterator[Any]:
    if hook is not None:
        yield hook
        for inner in getattr(hook, "hooks", ()):
            yield from _hooks(inner)


def stored(module: nn.Module, name: str) -> Any:
    """The tensor ``name`` of a module; an offloaded one is read onto the device of the forward."""
    value = current(module, name)
    if not isinstance(value, Tensor) or not value.is_meta:
        return value
    hook = offload_hook(module)
    if hook is None:
        return value
    with torch.device("cpu"):  # adapters may be being made on the meta device
        here = hook.weights_map[name]
    return here.to(hook.execution_device, value.dtype)


def device_of(module: nn.Module, name: str) -> torch.device:
    """Where ``stored`` finds the tensor."""
    value: Tensor = current(module, name)
    hook = offload_hook(module) if value.is_meta else None
    return value.device if hook is None else torch.empty(0, device=hook.execution_device).device


@torch.no_grad()
def store(module: nn.Module, name: str, value: Tensor) -> None:
    """Writes ``value`` into the tensor ``name`` of a module, or where that is offloaded to.

    Raises:
        PeanutError: it is offloaded to where nothing can be written.
    """
    own: Tensor = current(module, name)
    hook = offload_hook(module) if own.is_meta else None
    if hook is None:
        own.copy_(value)
        return
    # A new entry: others may share the old one, and a file stays as it is.
    held, prefix = hook.weights_map, ""
    while not isinstance(held, dict):
        prefix = getattr(held, "prefix", "") + prefix
        inner = getattr(held, "dataset", None)
        held = getattr(held, "state_dict", None) if inner is None else inner
        if not isinstance(held, Mapping):
            raise PeanutError(
                f"a weight that a {type(hook.weights_map).__name__} keeps",
                "weights in the model, or kept by accelerate",
                "load the base without offloading it",
            )
    held[prefix + name] = value.detach().to("cpu", own.dtype, copy=True)


def check_by_layer(model: nn.Module) -> None:
    """Refuses a model of which one hook brings all layers of a block at once: it would look for the adapters' too.

    Raises:
        PeanutError: there is such a hook.
    """
    for path, module in model.named_modules():
        hook = offload_hook(module)
        if hook is not None and getattr(hook, "place_submodules", False) and next(module.children(), None) is not None:
            raise PeanutError(
                f"'{path}', whose offloaded weights one hook brings together with those of all modules in it",
                "a hook for each layer",
                "dispatch the model without preload_module_classes",
            )


def same_tensor(one: nn.Module, other: nn.Module, name: str = "weight") -> bool:
    """Whether two modules share a tensor, also while it is offloaded."""
    a, b = current(one, name), current(other, name)
    if a is None or a is b:
        return a is b and a is not None
    offloaded = isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_meta and b.is_meta and a.shape == b.shape
    if not offloaded or offload_hook(one) is None or offload_hook(other) is None:
        return False
    return torch.equal(stored(one, name), stored(other, name))


def some_tensor(module: nn.Module) -> Tensor | None:
    """A parameter of a module (else a buffer), which tells where and in which precision what is beside it belongs."""
    for part in module.modules():
        for name in (*part._parameters, *part._buffers):
            found = stored(part, name)
            if isinstance(found, Tensor):
                return found
    return None


def onload(module: nn.Module) -> None:
    """Puts all offloaded tensors of a module into it for good, each as the object that it is."""
    for part in module.modules():
        if offload_hook(part) is None:
            continue
        for name, own in (*part._parameters.items(), *part._buffers.items()):
            if own is not None and own.is_meta:
                here = stored(part, name)
                here = nn.Parameter(here, own.requires_grad) if name in part._parameters else here
                torch.utils.swap_tensors(own, here)
        part.__dict__["_hf_hook"] = _without_offloading(part.__dict__["_hf_hook"])


def copied(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy of a module with all of its tensors in it, none of them offloaded."""
    memo = {} if memo is None else memo
    for part in module.modules():
        memo |= {
            id(hook): hook for hook in _hooks(part.__dict__.get("_hf_hook"))
        }  # they hold the whole model's weights
        made = (x for x in vars(part).values() if isinstance(x, Tensor) and not x.is_leaf)
        memo |= {id(x): x.detach().clone() for x in made}  # by hooks, of parameters: it is made again
    own = copy.deepcopy(module, memo)
    onload(own)
    return own


def called_onloaded(module: nn.Module, tensors: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """The output of a module whose tensors are offloaded, with some of them replaced; the module itself is left alone.

    Raises:
        PeanutError: its forward had been replaced before the hook came, by one that knows only that module.
    """
    forward = module.__dict__["_old_forward"]
    if getattr(forward, "__self__", None) is not module:
        raise PeanutError(
            f"a {type(module).__name__} whose forward was replaced and whose weights are offloaded",
            "one of the two",
            "load the base without offloading it",
        )
    hook = _without_offloading(module.__dict__["_hf_hook"])
    made: Any = type(module)
    twin = made.__new__(made)

    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = hook.pre_forward(twin, *args, **kwargs)
        return hook.post_forward(twin, MethodType(forward.__func__, twin)(*args, **kwargs))

    twin.__dict__ = {
        **module.__dict__,
        "forward": run,
        "_parameters": {**{name: stored(module, name) for name in module._parameters}, **tensors},
        "_buffers": {name: stored(module, name) for name in module._buffers},
    }
    return twin(*args, **kwargs)


def _without_offloading(hook: Any) -> Any:
    """A hook that moves inputs and outputs as ``hook`` does, and no weights."""
    own = copy.copy(hook)
    own.__dict__ |= {name: value for name, value in (("offload", False),) if name in own.__dict__}
    if hasattr(own, "hooks"):
        own.hooks = tuple(_without_offloading(inner) for inner in own.hooks)
    return own
