"""Finds what else in a model holds the layers that an adapter changes, or their weights, and computes without it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor, nn

from ...errors import warn
from ...weights.memory import span
from ..targets.paths import bare, first_paths, kind_name, modules_by_path
from .surgery import Surgery

__all__ = ["warn_of_aliases"]

_LONG = 1000
"""A container with more entries is a vocabulary or a table if the first of them holds nothing."""


def warn_of_aliases(model: nn.Module, targets: Mapping[str, nn.Module]) -> None:
    """Says what goes on computing with the base's weight of the layers at the paths ``targets``.

    They are layers of the same kind that share the parameter and are not adapted (T5's ``shared`` is never called: its
    encoder and decoder have embeddings of their own), and modules that keep the parameter, a view of it, the layer or
    a method of the layer in an attribute. What a closure, a global or another object keeps is not found.
    """
    modules = {"": model, **modules_by_path(model)}
    firsts = first_paths(modules)
    layers = {firsts.get(path, path): layer for path, layer in targets.items()}
    paths_of = {id(layer): path for path, layer in layers.items()}
    weights = {path: layer._parameters.get("weight") for path, layer in layers.items()}
    adapted: dict[tuple[int, str], list[str]] = {}
    for path, weight in weights.items():
        if weight is not None:
            adapted.setdefault((id(weight), kind_name(layers[path]) or ""), []).append(path)
    memory = _Memory(weights)
    others: dict[tuple[int, str], list[str]] = {}
    kept: list[tuple[str, str]] = []
    called: list[tuple[str, str]] = []
    for path, module in modules.items():
        if path in layers or firsts[path] != path:
            continue
        layer = bare(Surgery.own(module))
        kind = kind_name(layer)
        key = (id(layer._parameters.get("weight")), kind or "")
        if key in adapted:
            others.setdefault(key, []).append(path)
        for name, value in _attributes(layer):
            holder, held = f"{path}.{name}" if path else name, list(_held(value))
            if kind is None or name != "weight":
                owner = next(filter(None, (memory.owner(each) for each in held if isinstance(each, Tensor))), None)
                kept += [] if owner is None else [(holder, owner)]
            called += [(holder, paths_of[id(each)]) for each in held if id(each) in paths_of]
    for key, paths in others.items():
        if len(adapted[key]) <= len(paths):
            warn(
                f"{_listed(adapted[key])} shares its weight with {_listed(paths)}, which the adapter does not change: "
                "name those too, or instead if the model calls only them",
            )
    if kept:
        owner = kept[0][1]
        warn(
            f"{_listed([holder for holder, _ in kept])} holds the weight of '{owner}', and what computes with that "
            f"computes without the adapter: read {owner}.weight in each forward, or leave the layer out",
        )
    if called:
        holders, owners = (_listed(list(dict.fromkeys(each))) for each in zip(*called, strict=True))
        warn(
            f"{holders} holds {owners} itself, and what calls it there computes without the adapter: look it up in "
            "each forward, hold it in an nn.ModuleList or nn.ModuleDict, or leave it out",
        )


def _listed(paths: Sequence[str]) -> str:
    shown = ", ".join(f"'{path}'" for path in paths[:3])
    return f"{shown} and {len(paths) - 3} more" if len(paths) > 3 else shown


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if name in ("_parameters", "_buffers"):
            yield from value.items()
        elif name != "_modules":
            yield name, value


def _held(value: Any, depth: int = 3) -> Iterator[Tensor | nn.Module]:
    """A tensor or module, or those in lists, tuples, sets, dictionaries, bound methods and partial functions."""
    if isinstance(value, (Tensor, nn.Module)):
        yield value
        return
    inside: Any = ()
    if isinstance(value, (list, tuple, set)):
        inside = value
    elif isinstance(value, dict):
        inside = value.values()
    elif isinstance(value, partial):
        inside = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        inside = (value.__self__,)
    if depth and not (len(inside) > _LONG and next(_held(next(iter(inside)), depth - 1), None) is None):
        for each in inside:
            yield from _held(each, depth - 1)


class _Memory:
    """Where weights lie, by the path of their layer."""

    def __init__(self, weights: Mapping[str, Any]) -> None:
        self._paths = {id(weight): path for path, weight in weights.items() if weight is not None}
        places = ((span(weight), path) for path, weight in weights.items())
        self._spans = sorted((*place, path) for place, path in places if place is not None)

    def owner(self, tensor: Tensor) -> str | None:
        """The layer of which a tensor is the weight, or shows a part of it."""
        place = span(tensor)
        if id(tensor) in self._paths or place is None or not self._spans:
            return self._paths.get(id(tensor))
        before = bisect_right(self._spans, place[:2], key=lambda each: each[:2]) - 1
        device, start, stop, path = self._spans[before]
        return path if device == place[0] and start <= place[1] < stop else None
