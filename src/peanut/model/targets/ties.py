"""Which layers of a model have one weight, as a head that is tied to the embedding, and are to have one adapter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from torch import nn

from ...errors import warn
from ...protocols import PeftConfig
from ...weights import kind_of
from ...weights.stored import offload_hook, same_tensor
from ..layers.saved_modules import SavedModule
from .paths import Modules, bare, each_once, kind_name, modules_by_path, starts

__all__ = ["are_to_be_tied", "one_weight", "tied_to", "warn_of_ties", "with_tied"]


def one_weight(modules: Modules, path: str) -> list[str]:
    """The paths of the other layers that have the weight of the layer at ``path``.

    Offloaded weights are compared number by number, so only where one of them is an embedding's.
    """
    own = _base(modules[path])
    reads = kind_name(own) == "embedding" or offload_hook(own) is None
    return [
        other
        for other in each_once(modules, modules)
        if (there := _base(modules[other])) is not own
        and (reads or kind_name(there) == "embedding")
        and same_tensor(own, there)
        and kind_of(there) is not None
    ]


def are_to_be_tied(config: PeftConfig) -> bool:
    """Whether the config asks for one adapter where layers have one weight."""
    return bool(getattr(config, "ensure_weight_tying", False))


def tied_to(model: nn.Module, modules: Modules, path: str) -> list[str]:
    """Of these the layers that are tied to it: no head, where the model's config unties heads from embeddings."""
    untied = getattr(getattr(model, "config", None), "tie_word_embeddings", None) is False
    kind = kind_name(_base(modules[path]))
    return [other for other in one_weight(modules, path) if not untied or kind_name(_base(modules[other])) == kind]


def with_tied(model: nn.Module, modules: Modules, paths: Sequence[str]) -> list[str]:
    """Modules that are trained whole, and after them the layers that are tied to one in them."""
    taken = frozenset(paths)
    inside = [path for path in modules if not taken.isdisjoint(starts(path)) and _has_weight(modules[path])]
    others = dict.fromkeys(other for path in inside for other in tied_to(model, modules, path))
    return [*paths, *(other for other in others if taken.isdisjoint(starts(other)))]


def warn_of_ties(model: nn.Module, config: PeftConfig, adapted: Collection[str]) -> None:
    """Says to a user who asks for ties that there are none, or none of what is adapted."""
    if not are_to_be_tied(config):
        return
    modules = modules_by_path(model)
    weights = {path: _base(modules[path])._parameters.get("weight") for path in each_once(modules, modules)}
    held = Counter(map(id, weights.values()))
    twice = [path for path, own in weights.items() if own is not None and (held[id(own)] > 1 or own.is_meta)]
    tied = {path: each for path in twice if kind_name(_base(modules[path])) and (each := tied_to(model, modules, path))}
    if not tied:
        warn(f"ensure_weight_tying=True, and no two layers of this {type(model).__name__} are tied")
    elif not any(start in adapted for path in tied for start in starts(path)):
        names = ", ".join(f"'{path}'" for path in list(tied)[:3])
        warn(f"ensure_weight_tying=True, and the adapter changes none of the layers that are tied ({names})")


def _base(module: nn.Module) -> nn.Module:
    return module.original_module if isinstance(module, SavedModule) else bare(module)


def _has_weight(module: nn.Module) -> bool:
    return kind_of(_base(module)) is not None and _base(module)._parameters.get("weight") is not None
