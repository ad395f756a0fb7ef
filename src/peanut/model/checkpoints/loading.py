"""Loads saved tensors into an adapter: if anything is missing, unexpected or of another shape, nothing is changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from ...errors import PeanutError, nearest, warn
from ...protocols import PeftConfig, WeightMethod
from ...weights.stored import some_tensor
from ..adapters.adapter_set import AdapterSet
from ..adapters.surgery import SHARED, key_of
from ..layers.layer import AdaptedLayer
from ..layers.parameters import Parameters
from .base_weights import base_tensors, embedding_paths, embedding_weights
from .checkpoint import adapter_state, by_place, keys_of, parts_of
from .embeddings import without_base
from .fingerprint import check_base
from .integrity import CIRCUMSTANCES
from .keys import flat
from .older_keys import renamed
from .shards import as_held
from .stored_adapter import TRAINING_NAME, StoredAdapter
from .tensor_files import check_kind
from .ties import without_mirrored

__all__ = ["all_or_none", "load_state", "same_form"]

_WRITTEN: ContextVar[list[tuple[Tensor, Tensor]] | None] = ContextVar("peanut_written", default=None)
"""Weights of the base that were written within ``all_or_none``, each with its values before."""


@contextmanager
def all_or_none(adapters: AdapterSet) -> Iterator[None]:
    """Within the context adapters are added and loaded; if one is refused, the model is as it was before."""
    there, outer = set(adapters.configs), _WRITTEN.get()
    written = [] if outer is None else outer
    token, count = _WRITTEN.set(written), len(written)
    try:
        yield
    except BaseException:
        for name in [name for name in reversed(adapters.configs) if name not in there]:  # mixtures before experts
            adapters.delete(name)
        if len(written) > count:
            with torch.no_grad(), adapters.state.changing():
                for weight, before in reversed(written[count:]):
                    weight.copy_(before)
            del written[count:]
        raise
    finally:
        _WRITTEN.reset(token)


@torch.no_grad()
def load_state(
    adapters: AdapterSet,
    name: str,
    stored: StoredAdapter,
    *,
    check: bool = True,
    alias: bool = False,
    skip_sizes: bool = False,
    strict: bool = True,
) -> _IncompatibleKeys:
    """Copies stored tensors into adapter ``name``; nothing is copied unless everything fits.

    Embeddings of the base that are stored with the adapter, as its vocabulary grew, are put into the base.

    Args:
        check: refuse a base whose weights differ from those that the adapter was trained on.
        alias: where a parameter is on the meta device, put the tensor that was read in its place, and not a copy of it:
            it may lie in the file still.
        skip_sizes: warn of tensors of another shape and leave what is there; their keys are then the missing ones.
        strict: refuse keys that are missing or unexpected; else warn of them, and leave what is there.

    Raises:
        PeanutError: a key is missing or unexpected, a shape differs, or the base is another.
    """
    written = _WRITTEN.get()
    stored = replace(stored, state=renamed(adapters, name, stored.state))
    if name in adapters.state.merged:
        raise PeanutError(f"adapter {name!r} is merged", "an unmerged adapter", "call unmerge_adapter() first")
    if not stored.fits and not adapters.configs[name].inference_mode:
        raise PeanutError(
            f"{TRAINING_NAME} in '{stored.source}' is of another save than the adapter beside it",
            "files that were saved together",
            "delete it or load with is_trainable=False, or save the adapter again",
        )
    stored = replace(stored, state=without_mirrored(adapters, name, stored.state, stored.source))
    there = dict(adapters.parameters(name))
    left_out = keys_of(adapters, name, lambda method, config: method.unsaved(config))
    own = {key: value for key, value in there.items() if key not in left_out}
    grouped = by_place(adapters, name, stored.state)
    state: dict[str, Tensor] = {}
    for method, config, paths in parts_of(adapters, name):
        restored = method.restored(config, {path: grouped.pop(path) for path in paths if path in grouped})
        state |= flat(restored)
    state |= flat(grouped)
    computing = keys_of(adapters, name, lambda method, config: method.scaffold(config))
    scaffold = {key: value for key, value in there.items() if key in computing}
    made = _made_by_scaffold(adapters, name, scaffold, state, stored)
    state = {key: value for key, value in state.items() if key not in made}
    state, embeddings = without_base(adapters, name, state, own, stored)
    read = {id(own[key]): value for key, value in state.items() if key in own}
    state |= {key: read[id(value)] for key, value in own.items() if key not in state and id(value) in read}  # tied
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    found = [_listed("lacks", missing), _listed("has unexpected", unexpected)]
    if (missing or unexpected) and not strict:
        warn(f"'{stored.source}' {' and '.join(filter(None, found))}: what it lacks stays as it is here")
        own = {key: value for key, value in own.items() if key in state}
        state = {key: value for key, value in state.items() if key in own}
    elif missing or unexpected:
        near = f" (nearest to the first: {nearest(unexpected[0], own, 1)})" if unexpected and own else ""
        raise PeanutError(
            f"'{stored.source}' {' and '.join(filter(None, found))}",
            f"the {len(own)} tensors of its config on {type(adapters.model).__name__}",
            f"check the base model and the config{near}, or pass strict=False",
        )
    skipped = sorted(key for key, value in own.items() if skip_sizes and value.shape != state[key].shape)
    if skipped:
        here = ", ".join(f"{key} {tuple(state[key].shape)} for {tuple(own.pop(key).shape)}" for key in skipped)
        warn(f"'{stored.source}' holds tensors of another shape, which are not loaded: {here}")
        state = {key: value for key, value in state.items() if key in own}
    for key, parameter in own.items():
        if parameter.shape != state[key].shape:
            rows = _rows_of(adapters, key, state[key], parameter)
            raise PeanutError(
                f"'{stored.source}' holds {key} of shape {tuple(state[key].shape)}",
                f"{tuple(parameter.shape)}",
                f"call resize_token_embeddings({rows}) on the base first"
                if rows
                else "load it on the base it was trained on (for a head: with the same number of labels)",
            )
        check_kind(stored.source, key, state[key], parameter)
    for place in adapters.places(name):
        method, config = place.method_of(name)
        if isinstance(method, WeightMethod) and isinstance(place, AdaptedLayer):
            keys = {suffix: key_of(place.path, suffix) for suffix in place.adapters[name].suffixes}
            values = {suffix: state[key] for suffix, key in keys.items() if key in state}
            if values or not keys:
                method.check_read(config, place.frozen, values, place.path)
    passing = {
        key: value
        for key, value in stored.passing.items()
        if key in left_out and key in there and there[key].shape == value.shape
    }
    for key, value in passing.items():
        check_kind(f"{stored.source}/{TRAINING_NAME}", key, value, there[key])
    if check:
        check_base(adapters, name, stored.base, stored.config.base_model_name_or_path)
    waiting = _without_storage(adapters, name)
    with adapters.state.changing():
        _untie(adapters, name, own, state)
        for key, parameter in own.items():
            value = state[key]
            if key in waiting:
                holder, suffix, device = waiting[key]
                holder.assign(suffix, value.to(device, parameter.dtype, copy=not alias))
            elif parameter.is_meta:
                raise PeanutError(
                    f"'{key}' has no storage and is no adapter parameter", "a base model with its weights loaded"
                )
            else:
                parameter.copy_(as_held(value, parameter))
        for key, value in passing.items() if stored.fits else ():
            there[key].copy_(value.to(there[key].device))
        for weight, value in embeddings:
            if written is not None:
                written.append((weight, weight.clone()))
            weight.copy_(value.to(weight.device))
    return _IncompatibleKeys(skipped if strict else sorted({*skipped, *missing}), [] if strict else unexpected)


def _rows_of(adapters: AdapterSet, key: str, value: Tensor, own: Tensor) -> int:
    """How many tokens the base had for which a tensor of its embedding's adapter was made; 0 if that is not why."""
    if value.dim() != own.dim() or not key.startswith(tuple(f"{path}." for path in embedding_paths(adapters))):
        return 0
    embeddings = embedding_weights(adapters)
    here = {len(value) for path, value in base_tensors(adapters).items() if path in embeddings}
    return next((read for read, there in zip(value.shape, own.shape, strict=True) if read != there in here), 0)


def _untie(adapters: AdapterSet, name: str, own: dict[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Gives modules that are trained whole tensors of their own where they share one and the file has two values.

    Hugging Face PEFT trains tied modules apart.
    """
    first: dict[int, str] = {}
    for path, saved in adapters.saved_modules(name):
        copy = saved.modules_to_save[name]
        for suffix, value in copy.state_dict(keep_vars=True).items():
            key = key_of(path, suffix)
            if key not in state:  # it stays as it is here
                continue
            if first.setdefault(id(value), key) != key and not torch.equal(state[first[id(value)]], state[key]):
                holder, _, leaf = suffix.rpartition(".")
                own[key] = nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
                setattr(copy.get_submodule(holder), leaf, own[key])


def _made_by_scaffold(
    adapters: AdapterSet,
    name: str,
    scaffold: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    stored: StoredAdapter,
) -> dict[str, Tensor]:
    """What the file holds of what the adapter's ``scaffold`` computes: the scaffold itself is read instead.

    Raises:
        PeanutError: training's own file is not there, or does not belong to the adapter's.
    """
    if not scaffold:
        return {}
    missing = sorted(
        key for key, value in scaffold.items() if getattr(stored.passing.get(key), "shape", None) != value.shape
    )
    if missing:
        raise PeanutError(
            f"'{stored.source}' has no {missing[0]} in {TRAINING_NAME}",
            "the tensors that the training went on with",
            "load it with is_trainable=False, or give it the file that was saved beside it",
        )
    before = {key: value.clone() for key, value in scaffold.items()}
    for key, value in scaffold.items():
        value.copy_(stored.passing[key].to(value.device))
    own = dict(adapters.parameters(name))
    made = {key: value for key, value in adapter_state(adapters, name)[1].items() if key not in own}
    apart = [
        key
        for key, value in made.items()
        if key not in state or not torch.allclose(value.cpu(), state[key].to(value.dtype), rtol=1e-3, atol=1e-4)
    ]
    if apart:
        for key, value in scaffold.items():
            value.copy_(before[key])
        raise PeanutError(
            f"{TRAINING_NAME} in '{stored.source}' computes another '{apart[0]}' than the adapter's file holds",
            "files that were saved together",
            "delete it and load with is_trainable=False, or save the adapter again",
        )
    return made


def same_form(adapters: AdapterSet, name: str, config: PeftConfig) -> bool:
    """Whether ``config``, read from a file, is what adapter ``name`` would be saved with: then it stays as it is."""
    held, _ = adapter_state(adapters, name)
    mine, read = held.to_dict(), config.to_dict()
    aside = CIRCUMSTANCES | {"modules_to_save", "target_modules"}
    return all(mine.get(field) == read.get(field) for field in (mine.keys() | read.keys()) - aside)


def _without_storage(adapters: AdapterSet, name: str) -> dict[str, tuple[Parameters, str, torch.device]]:
    """The tensors on the meta device by key: what holds them, under which suffix, and the device where they belong."""
    some = some_tensor(adapters.model)
    first = torch.device("cpu") if some is None else some.device
    held: list[tuple[str, Parameters, torch.device]] = []
    for place in adapters.places(name):
        near = (place.frozen.weight,) if isinstance(place, AdaptedLayer) else place.parameters()
        beside = next((own.device for own in near if own.device.type != "meta"), first)
        held.append((place.path, place.adapters[name], beside))
        if name in place.banks:
            held.append((SHARED, place.banks[name], beside))
    return {
        key_of(path, suffix): (holder, suffix, device)
        for path, holder, device in held
        for suffix, value in holder.values_by_suffix().items()
        if value.is_meta
    }


def _listed(verb: str, keys: list[str]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"{verb} {', '.join(keys[:3])}{more}"
