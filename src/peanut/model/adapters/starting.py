"""An adapter's tensors at their start: the same on every device and in every order of layers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...protocols import Method, PeftConfig, WeightMethod
from ...weights import FrozenLayer
from ..layers.layer import BIAS
from ..layers.parameters import Parameters

__all__ = ["Place", "kept", "made_here", "shared_start", "started", "starting"]


@dataclass(frozen=True)
class Place:
    """A layer that an adapter is to change, the method that does, and its config there."""

    path: str
    frozen: FrozenLayer
    method: WeightMethod[Any]
    config: PeftConfig


def started(
    place: Place, seed: str, *, meta: bool, wide: bool, alike: dict[Any, dict[str, Tensor]] | None = None
) -> Parameters:
    """A layer's tensors at their start, where and as precise as they are kept.

    Args:
        place: the layer.
        seed: where its randomness comes from.
        meta: leave them without storage.
        wide: keep them in float32 at least.
        alike: such tensors of layers that were started before: those of a layer with the same look are the same.
    """
    method, config, frozen = place.method, place.config, place.frozen
    meta = meta and not made_here(method, config)
    module, weight = frozen.module, frozen.weight
    look = (method, id(config), type(module), module.extra_repr(), weight.shape, weight.dtype)
    values = alike.get(look) if alike is not None and meta else None
    if values is None:
        with starting(seed, meta or frozen.weight.is_meta) as generator:
            values = method.start(config, frozen, generator)
            bias = frozen.bias()
            if getattr(config, "bias", "none") != "none" and bias is not None:
                values[BIAS] = bias.detach().clone()
        if alike is not None and meta:
            alike[look] = values
    return kept(method, config, values, frozen.weight, meta=meta, wide=wide)


def shared_start(
    method: WeightMethod[Any], config: PeftConfig, layers: list[FrozenLayer], seed: str, *, meta: bool, wide: bool
) -> Parameters | None:
    """The tensors that an adapter's layers share, or ``None`` if there are none."""
    meta = meta and not method.rebuilt(config)
    with starting(seed, meta) as generator:
        values = method.shared(config, layers, generator)
    return kept(method, config, values, layers[0].weight, meta=meta, wide=wide) if values else None


def made_here(method: Method[Any], config: PeftConfig) -> bool:
    """Whether some tensors are not in the file, so that they have to be made where others wait to be loaded."""
    return bool(method.rebuilt(config) | method.passing(config) | method.scaffold(config))


@contextmanager
def starting(seed: str, meta: bool) -> Iterator[torch.Generator]:
    """A generator for a method's start, seeded from one number drawn from torch's generator and the layer's path.

    So the same seed gives the same adapter on every device and in every order of layers.
    """
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big") >> 1)
    with torch.no_grad(), torch.device("meta" if meta else "cpu"):
        yield generator


def kept(
    method: Method[Any], config: PeftConfig, values: dict[str, Tensor], beside: Tensor, *, meta: bool, wide: bool
) -> Parameters:
    """Started tensors as an adapter keeps them: on the device of the base's weight ``beside``, as precise as asked."""
    device = torch.device("meta") if meta else beside.device
    dtype = torch.promote_types(beside.dtype, torch.float32) if wide else beside.dtype
    if not dtype.is_floating_point:  # codes of a quantised weight
        dtype = torch.float32
    rebuilt = method.rebuilt(config)
    return Parameters(
        {
            suffix: value.to(device=device, dtype=dtype if value.is_floating_point() else value.dtype)
            for suffix, value in values.items()
        },
        untrained=method.fixed(config) | method.passing(config) | rebuilt,
        rebuilt=rebuilt,
    )
