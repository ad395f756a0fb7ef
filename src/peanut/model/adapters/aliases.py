"""Finds what else in a model holds the weights that an adapter changes, and would compute without the adapter."""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...weights import kind_of
from ...weights.kind import is_plain
from ..targets.paths import bare, first_paths, modules_by_path
from .starting import Target

__all__ = ["warn_of_aliases"]


def warn_of_aliases(model: nn.Module, targets: Sequence[Target]) -> None:
    """Says which modules go on computing with the base's weight of an adapted layer.

    They are layers of the same kind that share the parameter and are not adapted (T5's ``shared`` is never called: its
    encoder and decoder have embeddings of their own), and modules that keep the parameter, or a view of it, in an
    attribute. What a closure, a global or another object keeps is not found.
    """
    modules = {"": model, **modules_by_path(model)}
    firsts = first_paths(modules)
    weights: dict[str, Any] = {}
    adapted: dict[tuple[int, str], list[str]] = {}
    for target in targets:
        path = firsts[target.path]
        weight = weights[path] = target.frozen.module._parameters.get("weight")
        if weight is not None:
            adapted.setdefault((id(weight), target.frozen.kind.name), []).append(path)
    memory = _Memory(weights)
    others: dict[tuple[int, str], list[str]] = {}
    kept: list[tuple[str, str]] = []
    for path, module in modules.items():
        if path in weights or firsts[path] != path:
            continue
        layer = bare(module)
        kind = kind_of(layer)
        key = (id(layer._parameters.get("weight")), "" if kind is None else kind.name)
        if key in adapted:
            others.setdefault(key, []).append(path)
        for name, value in _attributes(layer):
            if kind is None or name != "weight":
                owner = next(filter(None, map(memory.owner, _tensors(value))), None)
                kept += [] if owner is None else [(f"{path}.{name}" if path else name, owner)]
    for key, paths in others.items():
        if len(adapted[key]) <= len(paths):
            warnings.warn(
                f"{_listed(adapted[key])} shares its weight with {_listed(paths)}, which the adapter does not change: "
                "name those in target_modules too, or instead if the model calls only them",
                stacklevel=2,
            )
    if kept:
        owner = kept[0][1]
        warnings.warn(
            f"{_listed([holder for holder, _ in kept])} holds the weight of '{owner}', and what computes with that "
            f"computes without the adapter: read {owner}.weight in each forward, or leave the layer out",
            stacklevel=2,
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


def _tensors(value: Any, depth: int = 3) -> Iterator[Tensor]:
    """A tensor, or those in lists, tuples, sets and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, (list, tuple, set, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner, depth - 1)


class _Memory:
    """Where weights lie, by the path of their layer."""

    def __init__(self, weights: Mapping[str, Any]) -> None:
        self._paths = {id(weight): path for path, weight in weights.items() if weight is not None}
        plain = ((weight.data_ptr(), weight, path) for path, weight in weights.items() if is_plain(weight))
        self._spans = sorted((span for span in plain if span[0]), key=lambda span: span[0])

    def owner(self, tensor: Tensor) -> str | None:
        """The layer of which a tensor is the weight, or shows a part of it."""
        if id(tensor) in self._paths or not self._spans or not is_plain(tensor):
            return self._paths.get(id(tensor))
        place = bisect_right(self._spans, tensor.data_ptr(), key=lambda span: span[0]) - 1
        start, weight, path = self._spans[place]
        inside = start <= tensor.data_ptr() < start + weight.nbytes and tensor.device == weight.device
        return path if inside else None
