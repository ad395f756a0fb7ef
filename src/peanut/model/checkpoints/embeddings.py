"""Embeddings of the base in an adapter's file: put into the base that it is loaded on, or refused."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from ...errors import PeanutError
from ...weights.stored import stored as tensor_of
from ..adapters.adapter_set import AdapterSet, experts_of
from ..targets.paths import bare
from .base import base_tensors, embedding_paths, plain_path
from .checkpoint import StoredAdapter
from .reading import check_kind

__all__ = ["without_base"]


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
            left[key] = value  # it is told as unexpected
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
        warnings.warn(
            f"'{source}' holds a '{path}' of its own and no '{lacking[0]}': if the vocabulary was resized, as Hugging "
            "Face PEFT saves only one of them then, new rows of the other are lost",
            stacklevel=4,
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
