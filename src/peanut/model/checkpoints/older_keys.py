"""Keys of other layouts become those of files: of older models (``language_model.model…``), of a model's own state."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from ..adapters.adapter_set import AdapterSet
from ..adapters.surgery import SHARED
from ..targets.paths import starts
from .base_weights import embedding_paths, plain_path, saved_module_paths
from .checkpoint import paths_in_model

__all__ = ["renamed"]


def renamed(adapters: AdapterSet, name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file by the keys that the model gives them: only those that belong to no place in it change.

    transformers renames the keys of its models' own files, as their modules were moved; an adapter's have the same
    paths. A key that has the wrapper of DistributedDataParallel in it (``module.``) loses that, and one of the model's
    ``state_dict()`` the adapter's name.
    """
    if any(f".{name}" in key for key in state):
        own = {path: key for key, paths in paths_in_model(adapters, name).items() for path in paths}
        state = {own.get(re.sub(r"^(module|model)\.", "", key), own.get(key, key)): state[key] for key in state}
    places = {place.path for place in adapters.places(name)} | {SHARED}
    places |= {*saved_module_paths(adapters, name), *embedding_paths(adapters)}
    strange = [key for key in state if not _has_place(key, places)]
    if not strange:
        return dict(state)
    moves = _moves(adapters.model)
    found: dict[str, str] = {}
    for key in strange:
        inner = key.removeprefix("module.")
        moved = inner
        for move in moves:
            moved = move.rename_source_key(moved)[0]
        for new in (inner, moved):
            if _has_place(new, places) and new not in state:
                found.setdefault(key, new)
    return {found.get(key, key): value for key, value in state.items()}


def _has_place(key: str, places: Collection[str]) -> bool:
    return key.startswith(SHARED) or any(path in places for path in (*starts(key), *starts(plain_path(key))))


def _moves(model: nn.Module) -> list[Any]:
    """How the keys of a model's older files are renamed: as transformers does its models', or as the model says."""
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    if not isinstance(model, PreTrainedModel):
        own: Any = getattr(model, "_checkpoint_conversion_mapping", None) or {}
        return [WeightRenaming(old, new) for old, new in own.items()]
    return [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
