"""What files hold of layers that have one set of tensors (``ensure_weight_tying``): there, as in PEFT, each has one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ...errors import warn
from ..adapters.adapter_set import AdapterSet
from ..adapters.surgery import key_of
from ..layers.adapted import Adapted
from ..layers.mirrored import Mirrored
from ..layers.parameters import Parameters
from ..targets.ties import are_to_be_tied

__all__ = ["mirrored", "without_mirrored"]


def mirrored(adapters: AdapterSet, name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of heads that are tied to embeddings, by key, from those that a file is given of the embeddings."""
    return {key: state[source].T for _, pairs in _heads(adapters, name) for key, source in pairs if source in state}


def without_mirrored(adapters: AdapterSet, name: str, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors of a file without those of heads that are tied to embeddings; layers that differ are untied.

    Hugging Face PEFT lets tied tensors drift apart: in 16 bits, on another device, and of embeddings always.
    """
    left, apart = dict(state), list[str]()
    if not are_to_be_tied(adapters.configs[name]):
        return left
    for place, pairs in _heads(adapters, name):
        there = [(key, other) for key, other in pairs if key in state]
        if any(other in state and not _are_same(state[key], state[other].T) for key, other in there):
            apart.append(_untie(place, name))
            continue
        for key, other in there:
            left.setdefault(other, left.pop(key).T)
    first: dict[int, Adapted] = {}
    for place in list(adapters.places(name)):
        own, before = place.adapters[name], first.setdefault(id(place.adapters[name]), place)
        keys = [(key_of(place.path, suffix), key_of(before.path, suffix)) for suffix in own.suffixes]
        both = ((state[key], state[other]) for key, other in keys if key in state and other in state)
        if before is not place and any(not _are_same(*pair) for pair in both):
            apart.append(_untie(place, name))
    if apart:
        warn(
            f"'{source}' holds other tensors of '{apart[0]}' than of a layer that it is tied to by "
            "ensure_weight_tying: they are loaded as they are, and so no longer tied",
        )
    return left


def _heads(adapters: AdapterSet, name: str) -> Iterator[tuple[Adapted, list[tuple[str, str]]]]:
    """The heads that have an embedding's tensors, each with its keys and those of the embedding."""
    for place in list(adapters.places(name)):
        own = place.adapters[name]
        if isinstance(own, Mirrored):
            yield place, [(key_of(place.path, suffix), key_of(own.path, there)) for suffix, there in own.names.items()]


def _untie(place: Adapted, name: str) -> str:
    """Gives a layer tensors of its own; returns its path."""
    shared = place.adapters[name]
    trained = any(value.requires_grad for value in shared)
    method, config = place.method_of(name)
    rebuilt = method.rebuilt(config)
    own = Parameters(
        {suffix: value.detach().clone() for suffix, value in shared.values_by_suffix().items()},
        untrained=method.fixed(config) | method.passing(config) | rebuilt,
        rebuilt=rebuilt,
    )
    shared.take_out(place, name)
    place.adapters[name] = own
    own.put(place, name)
    own.requires_grad_(trained)
    return place.path


def _are_same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)
