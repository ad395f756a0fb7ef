"""Embeddings of the base that an adapter's file holds: which are saved, and how they get into another base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from ...errors import PeanutError, warn
from ...weights.stored import stored as tensor_of
from ..adapters.acting import experts_of
from ..adapters.adapter_set import AdapterSet
from ..layers.layer import AdaptedLayer
from ..targets.matching import is_all_linear
from ..targets.paths import bare
from .base_weights import base_tensors, embedding_paths, has_other_vocabulary, plain_path, saved_module_paths
from .stored_adapter import StoredAdapter
from .tensor_files import check_kind

__all__ = ["SaveEmbeddings", "saved_embeddings", "without_base"]

SaveEmbeddings = bool | Literal["auto"]

_NAMED = ("embed_tokens", "lm_head")
"""The embeddings that the peer saves where they are targets, by name."""


def saved_embeddings(
    adapters: AdapterSet, name: str, save: SaveEmbeddings, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The base's embeddings that are saved with adapter ``name``, by the keys that Hugging Face PEFT gives them.

    Args:
        save: ``True``, ``False``, or ``"auto"``: those that are named as targets, and both if the base has another
            vocabulary than the model that it was loaded from.
        state_dict: base tensors by their plain path, to take the values from.

    Raises:
        PeanutError: ``save`` is something else, or an embedding is not there as numbers.
    """
    if save is not True and save is not False and save != "auto":
        raise PeanutError(f"save_embedding_layers={save!r}", "'auto', True or False", "change it")
    if save is False:
        return {}
    saved = saved_module_paths(adapters, name)
    paths = [path for path in embedding_paths(adapters) if path not in saved]
    layers = {path: layer for path, layer in adapters.layers(name) if path in paths}
    if save is True and not paths and not saved:
        warn(f"{type(adapters.model).__name__} has no embeddings that could be saved")
    needed = save is True or (bool(paths) and has_other_vocabulary(adapters, name))
    if not needed:
        paths = [path for path in layers if _is_named(adapters, name, path)]
    found: dict[str, Tensor] = {}
    for path, value in base_tensors(adapters).items() if paths else ():
        module, _, leaf = path.rpartition(".")
        if module not in paths:
            continue
        own = (state_dict or {}).get(path, value).detach()
        part = own.dim() < 2  # which FSDP has flattened, or DeepSpeed emptied
        if own.is_meta or part or not own.is_floating_point():
            if not needed:
                continue  # it is as it was, as codes are never changed
            found_as = "on the meta device" if own.is_meta else "in parts in several processes" if part else "quantised"
            raise PeanutError(
                f"'{path}' is {found_as}, and is to be saved",
                "embeddings that are numbers",
                "load the base without quantising or offloading it, or pass save_embedding_layers=False"
                if not part
                else "pass state_dict=, the full one, or save_embedding_layers=False",
            )
        inside = f"{_inside(adapters, name, layers[module])}." if module in layers else ""
        found[f"{module}.{inside}{leaf}"] = own
    return found


def _inside(adapters: AdapterSet, name: str, layer: AdaptedLayer) -> str:
    """What the peer's keys have before the weight of an embedding that is adapted, or has tokens trained beside."""
    return "base_layer" if layer.method_of(name)[0] == adapters.method(name) else "token_adapter.base_layer"


def _is_named(adapters: AdapterSet, name: str, path: str) -> bool:
    """Whether an adapted embedding is one that the config names, and not for the sake of some tokens."""
    config = adapters.configs[name]
    targets, tokens = config.target_modules, getattr(config, "trainable_token_indices", None)
    named = targets is not None and not is_all_linear(targets) and path.rpartition(".")[2] in _NAMED
    return named and tokens is None and config.peft_type != "TRAINABLE_TOKENS"


def without_base(
    adapters: AdapterSet, name: str, state: dict[str, Tensor], own: Mapping[str, Tensor], stored: StoredAdapter
) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    """Tensors without those of the base; and those of the base's embeddings that differ, each with the stored value.

    A file may hold embeddings, and Hugging Face PEFT writes frozen tensors of the base and a module that is trained
    whole twice (its biases, under bias="all").

    Raises:
        PeanutError: the embeddings do not fit this base, or another adapter of it uses others.
    """
    if state.keys() <= own.keys():
        return state, []
    parts = ("modules_to_save", "original_module")
    twice = tuple(f"{path}.{part}." for path, _ in adapters.saved_modules(name) for part in parts)
    base, embeddings, source = base_tensors(adapters), embedding_paths(adapters), stored.source
    left: dict[str, Tensor] = {}
    changed: dict[int, tuple[str, Tensor, Tensor]] = {}
    for key, value in state.items():
        path = plain_path(key)
        there = base.get(path)
        if key in own or (there is None and not key.startswith(twice)):
            left[key] = value
        elif key.startswith(twice) or (there is not None and _is_same(_values(adapters, path, there), value)):
            continue
        elif path.rpartition(".")[0] not in embeddings:
            left[key] = value  # reported as unexpected
        else:
            assert there is not None
            _check_embedding(path, there, value, source)
            if id(there) in changed and not _is_same(changed[id(there)][2], value):
                raise PeanutError(
                    f"'{source}' holds two different embeddings, '{changed[id(there)][0]}' and '{path}'",
                    "equal ones, as they are tied in this base",
                    "load the base with tie_word_embeddings=False",
                )
            changed[id(there)] = (path, there, value)
    others = [other for other in adapters.configs if other != name and other not in experts_of(adapters.configs[name])]
    path = next((path for path, *_ in changed.values()), "")
    if changed and (others or adapters.state.merged):
        raise PeanutError(
            f"'{source}' was saved with a '{path}' other than this base has, with which adapter {others[0]!r} works"
            if others
            else f"'{source}' holds a '{path}' of its own, and an adapter is merged into this base",
            "one set of embeddings for all adapters of a model",
            f"load it on a base of its own{'' if others else ', or call unmerge_adapter() first'}",
        )
    read = {plain_path(key) for key in state}
    lacking = [path for path in (f"{own}.weight" for own in embeddings) if path in base and path not in read]
    if changed and stored.base is None and lacking and id(base[lacking[0]]) not in changed:
        warn(
            f"'{source}' holds a '{path}' of its own and no '{lacking[0]}': if the vocabulary was resized, as Hugging "
            "Face PEFT saves only one of them then, new rows of the other are lost",
        )
    return left, [(there, value) for _, there, value in changed.values()]


def _values(adapters: AdapterSet, path: str, there: Tensor) -> Tensor:
    """A parameter of the base with its values, also where it is offloaded."""
    module, _, leaf = path.rpartition(".")
    return tensor_of(adapters.own(bare(adapters.at(module))), leaf) if there.is_meta else there


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same values in the dtype of one of them."""
    if a.shape != b.shape or a.is_meta:
        return False
    a = a.detach().cpu()
    return torch.equal(a.to(b.dtype), b) or torch.equal(a, b.to(a.dtype))


def _check_embedding(path: str, there: Tensor, value: Tensor, source: str) -> None:
    if there.is_meta or not there.is_floating_point():
        raise PeanutError(
            f"'{source}' holds the base's '{path}', which is {'on the meta device' if there.is_meta else 'quantised'}",
            "an embedding of numbers",
            "load the base without quantising or offloading it",
        )
    check_kind(source, path, value, there)
    if there.shape != value.shape:
        resizes = there.dim() == value.dim() and there.shape[1:] == value.shape[1:]
        raise PeanutError(
            f"'{source}' holds the base's '{path}' of shape {tuple(value.shape)}",
            f"{tuple(there.shape)} as in this base",
            f"call resize_token_embeddings({len(value)}) on the base first"
            if resizes
            else "load it on the base it was trained on",
        )
