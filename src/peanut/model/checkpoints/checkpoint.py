"""Saves adapters in Hugging Face PEFT's format: ``adapter_config.json``, ``adapter_model.safetensors``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import PeanutError
from ...files import write_files
from ...hub import CARD_NAME
from ...protocols import Method, MixtureMethod, PeftConfig, WeightMethod, method_of
from ...protocols.config import CONFIG_NAME
from ..adapters.adapter_set import AdapterSet
from ..adapters.surgery import SHARED, key_of
from ..targets.matching import heads_of, is_all_linear
from .base_weights import WRAPPERS, plain_path
from .card import card_text
from .embeddings import SaveEmbeddings, saved_embeddings
from .fingerprint import FINGERPRINT, fingerprint
from .integrity import CONFIG, SAVE, TRAINS, checksums, config_digest, file_text, save_id, without_label
from .keys import PREFIX, KeyStyle, file_key, flat, plain_key
from .stored_adapter import PICKLE_NAME, TRAINING_NAME, WEIGHTS_NAME
from .tensor_files import refuse_not_finite, write_tensors
from .ties import mirrored

__all__ = [
    "adapter_state",
    "base_state",
    "by_place",
    "file_config",
    "in_parts",
    "keys_of",
    "parts_of",
    "paths_in_model",
    "save_adapter",
]


def adapter_state(
    adapters: AdapterSet, name: str, state_dict: Mapping[str, Tensor] | None = None
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """The config of adapter ``name`` and its tensors by key, without the prefix, in the form that files hold.

    Values are taken from ``state_dict`` if it is given: a full one of the model as FSDP and DeepSpeed gather it, or one
    with the keys of files.

    Raises:
        PeanutError: this process holds a part of a tensor that is not given, or some are given and others are not.
    """
    adapters.known(name)
    own, whole = {key: value.detach() for key, value in adapters.parameters(name)}, dict[str, Tensor]()
    parts = in_parts(adapters, name)
    if state_dict:
        given = {_plain(key): value for key, value in state_dict.items()}
        found = paths_in_model(adapters, name)
        whole = {key: given[path] for key, paths in found.items() for path in paths if path in given}
        whole |= {key: given[key] for key in parts if key in given}
        own |= whole
    if missing := sorted(parts - whole.keys()):
        raise PeanutError(
            f"adapter {name!r} with a part of '{missing[0]}' in each process (FSDP, or DeepSpeed's third stage)",
            "whole tensors",
            "pass state_dict=, the full one, as accelerator.get_state_dict(model) gathers it in all processes",
        )
    config, state = adapters.configs[name], dict[str, Tensor]()
    grouped = by_place(adapters, name, own)
    for method, part, paths in parts_of(adapters, name):
        held, stored = method.stored(part, {path: grouped.pop(path, {}) for path in paths})
        config = held if part is adapters.configs[name] else config
        state |= flat(stored)
    state |= mirrored(adapters, name, state)
    state |= flat(grouped)  # what no method knows: modules that are trained whole
    trained = {key for key, value in adapters.parameters(name) if isinstance(value, nn.Parameter)}
    if state_dict and not trained <= whole.keys():
        state = _by_file_keys(name, state, state_dict, KeyStyle.of(config))
    return config, state


def _by_file_keys(
    name: str, state: Mapping[str, Tensor], given: Mapping[str, Tensor], style: KeyStyle
) -> dict[str, Tensor]:
    """The tensors of an adapter's file, taken from those that are given by a file's keys.

    Raises:
        PeanutError: some are not given.
    """
    by_key = {plain_key(key, style): value for key, value in given.items()}
    if lacking := sorted(state.keys() - by_key.keys()):
        raise PeanutError(
            f"a state_dict of {len(given)} tensors without '{file_key(lacking[0], style)}' of adapter {name!r}",
            "all of the adapter's, by the keys of the model's state_dict() or of get_peft_model_state_dict()",
            "pass them all, or leave state_dict out",
        )
    return {key: by_key[key] for key in state}


def paths_in_model(adapters: AdapterSet, name: str) -> dict[str, list[str]]:
    """For the key in files of each tensor of adapter ``name``, its keys in a state dict of the model."""
    names = _names(adapters.model)
    return {key: names.get(id(value), []) for key, value in adapters.parameters(name)}


def in_parts(adapters: AdapterSet, name: str) -> set[str]:
    """The keys of the tensors of adapter ``name`` of which this process holds a part."""
    found = {
        key_of(path, suffix)
        for place in adapters.places(name)
        for path, held in ((place.path, place.adapters), (SHARED, place.banks))
        for suffix in (held[name].in_parts() if name in held else ())
    }
    # FSDP marks what it has flattened; modules that are trained whole are as the rest of the adapter is.
    return found | {
        key_of(path, suffix)
        for path, saved in adapters.saved_modules(name)
        for suffix, value in saved.modules_to_save[name].named_parameters()
        if (found and hasattr(value, "_fsdp_flattened")) or (value.numel() == 0)
    }


def _names(model: nn.Module) -> dict[int, list[str]]:
    """The keys of a state dict for each tensor, by its id. ``state_dict()`` itself would wait for other processes."""
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, value in (*module._parameters.items(), *module._buffers.items()):
            names.setdefault(id(value), []).append(_plain(f"{path}.{leaf}"))
    return names


def base_state(state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The base's tensors in a full state dict of the model, by the path that they have without adapters."""
    return {plain_path(_plain(key)): value for key, value in (state_dict or {}).items()}


def training_state(adapters: AdapterSet, name: str) -> dict[str, Tensor]:
    """The training state of adapter ``name`` (statistics of a schedule, say), by key."""
    wanted = keys_of(adapters, name, lambda method, config: method.passing(config) | method.scaffold(config))
    return {key: value.detach() for key, value in adapters.parameters(name) if key in wanted} if wanted else {}


def keys_of(adapters: AdapterSet, name: str, suffixes: Callable[[Method[Any], PeftConfig], frozenset[str]]) -> set[str]:
    """The keys of the tensors of adapter ``name`` with the suffixes that are given for each of its methods."""
    return {
        key_of(path, suffix)
        for method, config, paths in parts_of(adapters, name)
        for suffix in suffixes(method, config)
        for path in paths
    }


def parts_of(adapters: AdapterSet, name: str) -> Iterator[tuple[Method[Any], PeftConfig, list[str]]]:
    """The methods of an adapter, each with its config and the paths where its tensors are."""
    main = adapters.method(name)
    parts: dict[Method[Any], tuple[PeftConfig, dict[str, None]]] = {main: (adapters.configs[name], {SHARED: None})}
    for place in adapters.places(name):
        method, config = place.method_of(name)
        parts.setdefault(method, (config, {}))[1][place.path] = None
    for method, (config, paths) in parts.items():
        yield method, config, list(paths)


def by_place(adapters: AdapterSet, name: str, state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors by key, grouped by the path of the layer that they belong to, then by suffix."""
    paths = {place.path for place in adapters.places(name)}
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key.startswith(SHARED):
            grouped.setdefault(SHARED, {})[key.removeprefix(SHARED)] = value
            continue
        path = key.rpartition(".")[0]
        while path and path not in paths:
            path = path.rpartition(".")[0]
        grouped.setdefault(path, {})[key.removeprefix(f"{path}.")] = value
    return grouped


def save_adapter(
    folder: str | os.PathLike[str],
    adapters: AdapterSet,
    name: str,
    state_dict: Mapping[str, Tensor] | None = None,
    save_embedding_layers: SaveEmbeddings = "auto",
    pickled: bool = False,
) -> Path:
    """Writes adapter ``name`` into ``folder``: its files, or, if that fails, none.

    The tensors get their name first: a save that is killed then is whole (see ``read_adapter``).

    Args:
        pickled: write the tensors with torch.save, which has no place for checksums and for what is known of the base.

    Raises:
        PeanutError: a value is not finite, or the folder cannot be written.
    """
    config, state = adapter_state(adapters, name, state_dict)
    base = base_state(state_dict)
    embeddings = saved_embeddings(adapters, name, save_embedding_layers, base)
    state |= embeddings
    training = training_state(adapters, name)
    for held in (state, training):
        refuse_not_finite(held, f"adapter {name!r}", "it is not saved; lower the learning rate or find the bad batch")
    method = method_of(config.peft_type)
    if isinstance(method, MixtureMethod):  # its experts are saved beside it
        config = method.mixing(config, {expert: str(Path(folder) / expert) for expert in method.experts(config)})
    config, _ = without_label(file_config(adapters, name, config))
    style = KeyStyle.of(config)
    tensors, passing = _for_file(state, style), _for_file(training, style)
    sums, passing_sums = checksums(tensors), checksums(passing)
    save = "" if pickled else save_id(config, sums, passing_sums)
    metadata = {"format": "pt"} if pickled else {"format": "pt", SAVE: save}
    recorded = fingerprint(
        adapters, name, {*map(plain_path, embeddings)}, base, new_rows_may_differ=save_embedding_layers is False
    )
    more = {CONFIG: config_digest(config)} | ({} if recorded is None else {FINGERPRINT: recorded})
    more |= {TRAINS: "true"} if passing else {}
    card = card_text(adapters, config, Path(folder))
    files: dict[str, Callable[[Path], object]] = {}
    if card is not None:
        files[CARD_NAME] = lambda path: path.write_text(card, encoding="utf-8")
    text = file_text(config, save) if save else f"{config}\n"
    files[CONFIG_NAME] = lambda path: path.write_text(text, encoding="utf-8")
    if passing:
        files[TRAINING_NAME] = lambda path: write_tensors(passing, path, metadata, passing_sums)
    outdated = () if passing else (TRAINING_NAME,)
    if pickled:
        files[PICKLE_NAME] = lambda path: torch.save(tensors, path)
        return write_files(folder, files, outdated=(*outdated, WEIGHTS_NAME))
    files[WEIGHTS_NAME] = lambda path: write_tensors(tensors, path, metadata | more, sums)
    return write_files(folder, files, outdated=outdated)


def file_config(adapters: AdapterSet, name: str, held: PeftConfig) -> PeftConfig:
    """The config of adapter ``name`` as files hold it, from what ``adapter_state`` says of it."""
    config, model_config = adapters.configs[name], getattr(adapters.model, "config", None)
    base = type(adapters.model)
    known = config.task_type is None and base.__module__.startswith("transformers.")
    made_by = {"base_model_class": base.__name__, "parent_library": base.__module__} if known else None
    return replace(
        held,
        inference_mode=True,
        auto_mapping=config.auto_mapping or made_by,
        base_model_name_or_path=config.base_model_name_or_path or getattr(model_config, "_name_or_path", None) or None,
        modules_to_save=sorted({*(config.modules_to_save or []), *heads_of(config)}) or None,
        target_modules=_target_modules(adapters, name, held),
    )


def _for_file(state: Mapping[str, Tensor], style: KeyStyle) -> dict[str, Tensor]:
    """Tensors by the keys of files. No two share memory, which safetensors refuses: a head may have two names."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, value in sorted(state.items()):
        own = value.cpu().contiguous()
        place = own.untyped_storage().data_ptr()
        tensors[file_key(key, style)] = own.clone() if place in seen else own
        seen.add(place)
    return tensors


def _target_modules(adapters: AdapterSet, name: str, held: PeftConfig) -> list[str] | str | None:
    """The config's targets; where it left them open, the layers whose weight is changed."""
    if not isinstance(method_of(held.peft_type), WeightMethod):
        return held.target_modules
    targets = adapters.configs[name].target_modules
    if targets is not None and not is_all_linear(targets):
        return targets
    _, _, paths = next(parts_of(adapters, name))
    return sorted(path for path in paths if path != SHARED) or None


def _plain(key: str) -> str:
    """A state dict's key without what wrappers put before and into it."""
    for token in WRAPPERS:
        key = key.replace(f"{token}.", "")
    return key.removeprefix("module.").removeprefix(PREFIX)
