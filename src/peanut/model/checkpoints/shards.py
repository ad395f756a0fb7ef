"""Tensors that several processes hold together: DTensors, and those of FSDP's first version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from ...errors import PeanutError, nearest, warn
from ..adapters.adapter_set import AdapterSet
from .base_weights import WRAPPERS

__all__ = ["as_held", "load_into_shards", "local_parts"]


def local_parts(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """What this process has of each tensor of a state dict."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if hasattr(value, "local_shards"):
            found |= {f"{key}[{number}]": shard.tensor for number, shard in enumerate(value.local_shards())}
        else:
            found[key] = value.to_local() if type(value).__name__ == "DTensor" else value
    return found


def as_held(value: Tensor, own: Any) -> Tensor:
    """A tensor on the device of another, and spread over processes as that one; each takes its part of the whole."""
    value = value.to(own.device)
    if type(own).__name__ != "DTensor" or type(value) is type(own):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)


def load_into_shards(
    model: nn.Module, adapters: AdapterSet, name: str, state: Mapping[str, Tensor], strict: bool = True
) -> _IncompatibleKeys:
    """Loads adapter ``name`` of a model around which FSDP is, by ``load_state_dict`` of it; all processes call it.

    Raises:
        PeanutError: a key is missing or unexpected (with ``strict``).
    """
    own = {key: id(value) for key, value in adapters.parameters(name)}
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if not strict and (missing or unexpected):
        warn(f"the state dict lacks {missing} and has unexpected {unexpected}: what it lacks stays as it is here")
        state = {key: value for key, value in state.items() if key in own}
    elif missing or unexpected:
        wrong = min(own.keys() ^ state.keys())
        raise PeanutError(
            f"a state dict that {'lacks' if wrong in own else 'has an unexpected'} '{wrong}'",
            f"the {len(own)} tensors of adapter {name!r}",
            f"check the keys (nearest: {nearest(wrong, state if wrong in own else own, 1)})",
        )
    there = {id(value): _unwrapped(key) for key, value in model.named_parameters()}
    there |= {id(value): _unwrapped(key) for key, value in model.named_buffers()}
    model.load_state_dict({there[own[key]]: value for key, value in state.items()}, strict=False)
    return _IncompatibleKeys(missing, unexpected)


def _unwrapped(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)
