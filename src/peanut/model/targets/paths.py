"""Module paths of a model, and which of them a name or a regular expression matches."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from itertools import accumulate

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ...errors import NoMatchingPeftModuleError, PeanutError, nearest
from ...protocols.patterns import ends, fullmatch
from ...weights import kind_of
from ..layers.layer import AdaptedLayer
from ..layers.saved_modules import SavedModule

__all__ = [
    "Modules",
    "adaptable",
    "bare",
    "each_once",
    "first_paths",
    "inside_attention",
    "kind_name",
    "last_names",
    "matched",
    "modules_by_path",
    "outside",
    "starts",
    "unknown_name",
    "unmatched",
]

Modules = dict[str, nn.Module]

_HOLDERS = ("adapted_output", "adapted_input", "adapted_mixture")
"""Names under which a model's modules hold the adapters that change no weight."""


def modules_by_path(model: nn.Module) -> Modules:
    """The base model's modules by path, a module that stands in several places by each of them.

    Of an adapted layer only the layer is there, not what is inside.
    """
    found: Modules = {}

    def visit(module: nn.Module, path: str) -> None:
        if path:
            found[path] = module
        if isinstance(module, AdaptedLayer):
            return
        inner = module.original_module if isinstance(module, SavedModule) else module
        for name, child in inner._modules.items():
            if (
                child is not None
                and name not in _HOLDERS
                and not (name == "parametrizations" and is_parametrized(inner))
            ):
                visit(child, f"{path}.{name}" if path else name)

    visit(model, "")
    return found


def first_paths(modules: Modules) -> dict[str, str]:
    """For every path the first one of the same module: another where it stands in several places."""
    firsts: dict[int, str] = {}
    return {path: firsts.setdefault(id(module), path) for path, module in modules.items()}


def each_once(paths: Iterable[str], modules: Modules) -> list[str]:
    """The first paths of the modules that ``paths`` lead to."""
    firsts = first_paths(modules)
    return list(dict.fromkeys(firsts[path] for path in paths))


def bare(module: nn.Module) -> nn.Module:
    """A layer without the adapters around it."""
    return module.base_layer if isinstance(module, AdaptedLayer) else module


def matched(paths: Iterable[str], names: Iterable[str] | str) -> list[str]:
    """The paths that a regular expression matches whole, or that end in one of some names."""
    if isinstance(names, str):
        return [path for path in paths if fullmatch(names, path)]
    wanted = frozenset(names)
    return [path for path in paths if not wanted.isdisjoint(ends(path))]


def unmatched(hits: list[str], names: list[str] | str) -> str | None:
    """The first of the names (or the regular expression) that none of its ``hits`` is called."""
    if isinstance(names, str):
        return None if hits else names
    known = set().union(*map(ends, hits))
    return next((name for name in names if name not in known), None)


def unknown_name(
    field: str, name: str, model: nn.Module, names: Iterable[str], given: Iterable[str] = ()
) -> PeanutError:
    """The error for a name in ``field`` that is none of the ``names`` that modules have.

    Of what is ``given`` it tells the pattern, parts of which may match nothing.
    """
    either = "|".join(map(re.escape, given))
    pattern = f"; where some may be missing, give one pattern: r'(.*\\.)?({either})'" if either else ""
    kind = NoMatchingPeftModuleError if field == "target_modules" else PeanutError
    return kind(
        f"{field} names {name!r}, which no module of {type(model).__name__} is called",
        "names of modules",
        f"nearest: {nearest(name, names)}{pattern}",
    )


def outside(paths: Iterable[str], outer: list[str]) -> list[str]:
    """The paths that are none of ``outer`` and lie in none of them."""
    taken = frozenset(outer)
    return [path for path in paths if taken.isdisjoint(starts(path))]


def starts(path: str) -> list[str]:
    """The paths that lead to a module, its own last: ``mlp`` and ``mlp.up_proj``."""
    return list(accumulate(path.split("."), "{}.{}".format))


def inside_attention(path: str, modules: Modules) -> bool:
    """Whether a path leads into an ``nn.MultiheadAttention``, which reads its weights and calls no layer."""
    return isinstance(modules.get(path.rpartition(".")[0]), nn.MultiheadAttention)


def kind_name(module: nn.Module) -> str | None:
    """What kind of layer a module is (``LayerKind.name``), ``None`` if none that is known."""
    kind = kind_of(bare(module))
    return None if kind is None else kind.name


def adaptable(module: nn.Module, kinds: Collection[str]) -> bool:
    """Whether a module is a layer of one of these kinds; an ``nn.MultiheadAttention`` is two linear ones."""
    own = bare(module)
    return kind_name(own) in kinds or ("linear" in kinds and isinstance(own, nn.MultiheadAttention))


def last_names(paths: Iterable[str]) -> set[str]:
    """The last names of paths, each once."""
    return {path.rpartition(".")[2] for path in paths}
