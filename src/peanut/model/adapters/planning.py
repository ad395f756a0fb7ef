"""Resolves a config to the layers that it changes, each with its method and its own config."""

from __future__ import annotations

from typing import Any

from ...errors import PeanutError, nearest
from ...protocols import PeftConfig, WeightMethod, method_of
from ...protocols.config import matching_pattern
from ...weights import kind_of
from ..targets.matching import biased_paths, target_paths
from ..targets.paths import bare, modules_by_path
from .starting import Target
from .surgery import Surgery

__all__ = ["check_patterns", "planned"]


def planned(on: Surgery, config: PeftConfig, method: WeightMethod[Any]) -> list[Target]:
    """Every layer that an adapter with ``config`` changes, with the method that does.

    Raises:
        PeanutError: the config does not fit a layer, or two methods of the adapter want one layer.
    """
    planned: dict[str, Target] = {}
    wanted_by: dict[str, PeftConfig] = {}
    for part, own in [(method, config), *method.companions(config)]:
        for path in target_paths(on.model, own, part):
            for place in [path, *(_tied_to(on, path) if part.follows_ties else ())]:
                if wanted_by.setdefault(place, own) is not own:
                    raise PeanutError(
                        f"'{place}' is a target of {planned[place].method.name} and of {part.name} in one adapter",
                        "one method for a layer",
                        "take it out of one of them, or use two adapters",
                    )
                resolved = own.for_layer(place)
                part.check(resolved, on.frozen(place), place)
                planned[place] = Target(place, on.frozen(place), part, resolved)
    if getattr(config, "bias", "none") == "all":
        biases = method_of("BITFIT")
        assert isinstance(biases, WeightMethod)
        for path in biased_paths(on.model, config, biases):
            if path not in planned:
                planned[path] = Target(path, on.frozen(path), biases, biases.config_class(target_modules=[path]))
    return list(planned.values())


def _tied_to(on: Surgery, path: str) -> list[str]:
    """The paths of the other layers that share the weight of the layer at ``path``."""
    weight = on.frozen(path).weight
    return [
        other
        for other, module in modules_by_path(on.model).items()
        if other != path and getattr(module, "weight", None) is weight and kind_of(bare(module)) is not None
    ]


def check_patterns(config: PeftConfig, paths: list[str]) -> None:
    """Refuses a pattern (of ranks, of feed-forward layers) that is for none of the adapted layers."""
    for field, patterns in config.patterns().items():
        for pattern in patterns:
            if not any(matching_pattern({pattern: None}, path) for path in paths):
                names = {path.rpartition(".")[2] for path in paths}
                raise PeanutError(
                    f"{field} names {pattern!r}, which none of the {len(paths)} adapted layers is called",
                    "names or regular expressions of adapted layers",
                    f"nearest: {nearest(pattern, names)}",
                )
