"""The table of methods, made from the registry: what each changes, its size, and whether it merges."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import methods as _methods  # noqa: F401 - registers them
from ..protocols import METHODS, InputMethod, Method, MixtureMethod, OutputMethod, Trial, WeightMethod
from ..weights import FrozenLayer, kind_of

__all__ = ["Entry", "catalogue", "markdown"]


@dataclass(frozen=True)
class Entry:
    """One row of the table.

    Args:
        name: the name in ``adapter_config.json``.
        title: what the method is called, and its source.
        config: its config class.
        change: the change of a layer, as its page states it.
        parameters: how many it trains in a layer.
        mergeable: whether it can be written into the weights.
        exact_as_lora: whether ``to_lora`` loses nothing.
        kinds: the kinds of layer that it changes.
    """

    name: str
    title: str
    config: str
    change: str
    parameters: str
    mergeable: bool
    exact_as_lora: bool
    kinds: tuple[str, ...]


def catalogue(methods: Iterable[Method[Any]] | None = None) -> list[Entry]:
    """These methods, or every one, by name."""
    chosen = METHODS.values() if methods is None else methods
    return [_entry(method) for method in sorted(chosen, key=lambda method: method.name)]


def markdown(entries: Iterable[Entry] | None = None) -> str:
    """The table as a page of Markdown."""
    rows = [
        "# The methods",
        "",
        "Generated from the registry by `peanut methods --markdown`. W is the frozen weight, of shape (d_out, d_in).",
        "The code of each method is one file in `src/peanut/methods/`.",
        "",
        "| method | config | what it changes | trained parameters per place | merges | exact as LoRA | acts on |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in catalogue() if entries is None else entries:
        cells = (
            entry.title,
            f"`{entry.config}`",
            entry.change,
            entry.parameters,
            "yes" if entry.mergeable else "no",
            "yes" if entry.exact_as_lora else "no",
            ", ".join(entry.kinds) or "whole modules",
        )
        rows.append(f"| {' | '.join(cell.replace('|', '∣') for cell in cells)} |")
    return "\n".join(rows) + "\n"


def _entry(method: Method[Any]) -> Entry:
    module = inspect.getmodule(type(method))
    title = " ".join((getattr(module, "__doc__", None) or type(method).__name__).split()).rstrip(".")
    change = " ".join(inspect.cleandoc(type(method).__doc__ or "").partition("\n\n")[0].split())
    return Entry(
        name=method.name,
        title=title,
        config=method.config_class.__name__,
        change=change,
        parameters=_pretty(method.size),
        mergeable=isinstance(method, WeightMethod),  # what changes a weight can be written into it
        exact_as_lora=_exact(method),
        kinds=_where(method),
    )


def _where(method: Method[Any]) -> tuple[str, ...]:
    """What a method acts on: kinds of layer, or a part of the model."""
    if isinstance(method, OutputMethod):
        return ("outputs of modules",)
    if isinstance(method, InputMethod):
        return ("keys and values",) if method.prepends == "keys_values" else ("the input",)
    return ("other adapters",) if isinstance(method, MixtureMethod) else method.kinds


def _exact(method: Method[Any]) -> bool:
    """Whether the default config's change of a layer is a product of factors thinner than the layer."""
    if not isinstance(method, WeightMethod) or "linear" not in method.kinds or method.follows_ties or method.mixes:
        return False
    layer = nn.Linear(512, 1024)
    kind = kind_of(layer)
    assert kind is not None
    frozen, config = FrozenLayer(layer, kind), method.config_class(**method.tried(Trial(shapes=[(1024, 512)])) or {})
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        values = method.start(config, frozen, generator) | method.shared(config, [frozen], generator)
        factors = method.change(config, values, frozen).factors(frozen.matrix())
    return factors is not None and factors[0].shape[1] < min(factors[0].shape[0], factors[1].shape[1])


def _pretty(size: str) -> str:
    return re.sub(r"\s*\*\s*", " · ", size.replace("**2", "²")).replace("//", "/").replace("_", "\\_")
