"""An adapter as files: ``adapter_config.json`` and ``adapter_model.safetensors``, in Hugging Face PEFT's format."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import PeanutError, nearest
from ..files import write_files
from ..hub import locate
from ..protocols import Method, MixtureMethod, PeftConfig, WeightMethod, method_of
from ..protocols.config import CONFIG_NAME
from .adapter_set import AdapterSet
from .defaults import HEADS
from .fingerprint import check_base, fingerprint
from .surgery import SHARED
from .targets import ALL_LINEAR

__all__ = [
    "PREFIX",
    "TRAINING_NAME",
    "WEIGHTS_NAME",
    "KeyStyle",
    "StoredAdapter",
    "adapter_state",
    "file_key",
    "load_state",
    "plain_key",
    "read_adapter",
    "same_form",
    "save_adapter",
]

WEIGHTS_NAME = "adapter_model.safetensors"
TRAINING_NAME = "adapter_training.safetensors"
"""What only training needs, to go on from: statistics of schedules. Loading an adapter for use ignores it."""
PREFIX = "base_model.model."
"""What every key in a file begins with."""
_FINGERPRINT = "peanut_base"


@dataclass(frozen=True)
class StoredAdapter:
    """What an adapter's folder holds.

    Args:
        config: its config.
        state: its tensors by key, without the prefix.
        base: the fingerprint of the base that it was trained on, if its writer recorded one.
        source: the folder, for messages.
        passing: what only training needs, by key.
    """

    config: PeftConfig
    state: dict[str, Tensor]
    base: str | None
    source: str
    passing: Mapping[str, Tensor] = field(default_factory=dict)


def adapter_state(
    adapters: AdapterSet, name: str, state_dict: Mapping[str, Tensor] | None = None
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """The config of adapter ``name`` and its tensors by key, without the prefix, in the form that files hold.

    Args:
        adapters: the model's adapters.
        name: which.
        state_dict: full state dict of the model (as gathered by FSDP or DeepSpeed) to take the values from.
    """
    adapters.known(name)
    own = {key: value.detach() for key, value in adapters.parameters(name)}
    if state_dict is not None:
        inner = {_plain(key): value for key, value in state_dict.items()}
        names = {id(value): _plain(key) for key, value in adapters.model.state_dict(keep_vars=True).items()}
        own = {key: inner.get(names.get(id(value), ""), value.detach()) for key, value in adapters.parameters(name)}
    config, state = adapters.configs[name], dict[str, Tensor]()
    grouped = _by_layer(adapters, name, own)
    for method, part, paths in _parts(adapters, name):
        held, stored = method.stored(part, {path: grouped.pop(path, {}) for path in paths})
        config = held if part is adapters.configs[name] else config
        state |= _flat(stored)
    return config, state | _flat(grouped)  # what no method knows: modules that are trained whole


def training_state(adapters: AdapterSet, name: str) -> dict[str, Tensor]:
    """The tensors of adapter ``name`` that only training needs (statistics of a schedule), by key."""
    grouped = _by_layer(adapters, name, {key: value.detach() for key, value in adapters.parameters(name)})
    return {
        _key(path, suffix): grouped[path][suffix]
        for method, config, paths in _parts(adapters, name)
        for path in paths
        for suffix in method.passing(config) | method.scaffold(config)
        if suffix in grouped.get(path, {})
    }


def _parts(adapters: AdapterSet, name: str) -> Iterator[tuple[Method[Any], PeftConfig, list[str]]]:
    """The methods of an adapter, each with its config and the paths where its tensors are."""
    main = method_of(adapters.configs[name].peft_type)
    paths: dict[Method[Any], list[str]] = {main: [SHARED]}
    configs: dict[Method[Any], PeftConfig] = {main: adapters.configs[name]}
    for place in adapters.places(name):
        method, config = place.method_of(name)
        configs.setdefault(method, config)
        if place.path not in paths.setdefault(method, []):
            paths[method].append(place.path)
    for method, own in paths.items():
        yield method, configs[method], own


def _by_layer(adapters: AdapterSet, name: str, state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors by key, grouped by the path of the layer that they belong to, then by suffix."""
    paths = {place.path for place in adapters.places(name)}
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key.startswith(SHARED):
            grouped.setdefault(SHARED, {})[key.removeprefix(SHARED)] = value
            continue
        names = key.split(".")
        path = next((p for i in range(len(names) - 1, 0, -1) if (p := ".".join(names[:i])) in paths), "")
        grouped.setdefault(path, {})[key.removeprefix(f"{path}.")] = value
    return grouped


def _flat(grouped: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {_key(path, suffix): value for path, values in grouped.items() for suffix, value in values.items()}


def _key(path: str, suffix: str) -> str:
    return f"{SHARED}{suffix}" if path == SHARED else f"{path}.{suffix}" if path else suffix


@dataclass(frozen=True)
class KeyStyle:
    """How files write keys.

    Args:
        inner: what comes before the path of a module.
        shared: what comes before the suffix of a tensor that belongs to no module.
    """

    inner: str
    shared: str

    @staticmethod
    def of(config: PeftConfig) -> KeyStyle:
        """The style of an adapter's file: a prompt's has no layer of the library's in its paths."""
        return KeyStyle("base_model.", "") if config.is_prompt_learning else KeyStyle(PREFIX, "base_model.")


def file_key(key: str, style: KeyStyle) -> str:
    """A key as files write it: what layers share lies beside the model's modules."""
    return f"{style.shared}{key.removeprefix(SHARED)}" if key.startswith(SHARED) else f"{style.inner}{key}"


def plain_key(key: str, style: KeyStyle, shared: Collection[str] = ()) -> str:
    """The inverse of ``file_key``; ``shared`` are the suffixes of tensors that belong to no module."""
    if key.startswith(style.inner):
        return key.removeprefix(style.inner)
    if not style.shared:
        return f"{SHARED}{key}"
    bare = key.removeprefix(style.shared)
    return f"{SHARED}{bare}" if bare != key or bare in shared else key


def save_adapter(
    folder: str | os.PathLike[str], adapters: AdapterSet, name: str, state_dict: Mapping[str, Tensor] | None = None
) -> Path:
    """Writes adapter ``name`` into ``folder``: both files, or, if that fails, neither.

    Raises:
        PeanutError: a value is not finite, or the folder cannot be written.
    """
    held, state = adapter_state(adapters, name, state_dict)
    _refuse_not_finite(state, f"adapter {name!r}", "it is not saved; lower the learning rate or find the bad batch")
    model_config = getattr(adapters.model, "config", None)
    held = _with_folders(held, Path(folder))
    config = replace(
        held,
        inference_mode=True,
        base_model_name_or_path=adapters.configs[name].base_model_name_or_path
        or getattr(model_config, "_name_or_path", None)
        or None,
        modules_to_save=_modules_to_save(adapters, name),
        target_modules=_target_modules(adapters, name, held),
    )
    metadata = {"format": "pt"}
    base = fingerprint(adapters, name)
    if base is not None:
        metadata[_FINGERPRINT] = base
    style = KeyStyle.of(config)
    tensors = _for_file(state, style)
    files: dict[str, Callable[[Path], object]] = {
        CONFIG_NAME: lambda path: path.write_text(f"{config}\n", encoding="utf-8"),
        WEIGHTS_NAME: lambda path: save_file(tensors, path, metadata=metadata),
    }
    passing = _for_file(training_state(adapters, name), style)
    _refuse_not_finite(passing, f"adapter {name!r}", "it is not saved; lower the learning rate or find the bad batch")
    if passing:
        files[TRAINING_NAME] = lambda path: save_file(passing, path, metadata={"format": "pt"})
    return write_files(folder, files)


def _with_folders(config: PeftConfig, folder: Path) -> PeftConfig:
    """The config of a mixture with the folders into which its experts are saved beside it."""
    method = method_of(config.peft_type)
    if not isinstance(method, MixtureMethod):
        return config
    mixed: PeftConfig = method.mixing(config, {name: str(folder / name) for name in method.experts(config)})
    return mixed


def _for_file(state: Mapping[str, Tensor], style: KeyStyle) -> dict[str, Tensor]:
    return _unshared({file_key(key, style): value.cpu().contiguous() for key, value in sorted(state.items())})


def read_adapter(source: str | os.PathLike[str], config: PeftConfig | None = None, **hub: Any) -> StoredAdapter:
    """Reads an adapter's folder (or hub repository) whole, before any model is touched.

    Raises:
        PeanutError: a file is missing, truncated or not safetensors, or holds values that are not finite.
    """
    config = PeftConfig.from_pretrained(source, **hub) if config is None else config
    path = locate(source, WEIGHTS_NAME, **hub)
    style = KeyStyle.of(config)
    state, metadata = _read(path, style)
    training = Path(path).parent / TRAINING_NAME
    passing = _read(training, style)[0] if training.is_file() else {}
    return StoredAdapter(config, state, metadata.get(_FINGERPRINT), str(source), passing)


def _read(path: str | os.PathLike[str], style: KeyStyle) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, by key without the prefix, and its metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dictionary
    except (SafetensorError, OSError) as error:
        raise PeanutError(
            f"cannot read '{path}': {error}", "a whole safetensors file", "copy or save the adapter again"
        ) from error
    _refuse_not_finite(state, f"'{path}'", "save the adapter again from a training that did not diverge")
    return {plain_key(key, style): value for key, value in state.items()}, metadata


def load_state(
    adapters: AdapterSet, name: str, stored: StoredAdapter, *, check: bool = True, assign: bool = False
) -> None:
    """Copies stored tensors into adapter ``name``; nothing is copied unless everything fits.

    Args:
        adapters: the model's adapters.
        name: the adapter, which is in the model already.
        stored: what was read.
        check: refuse a base whose weights differ from those that the adapter was trained on.
        assign: put the tensors in place of parameters on the meta device.

    Raises:
        PeanutError: a key is missing or unexpected, a shape differs, or the base is another.
    """
    if name in adapters.state.merged:
        raise PeanutError(f"adapter {name!r} is merged", "an unmerged adapter", "call unmerge_adapter() first")
    left_out = {
        _key(path, suffix)
        for method, config, paths in _parts(adapters, name)
        for path in paths
        for suffix in method.rebuilt(config) | method.passing(config) | method.scaffold(config)
    }
    own = {key: value for key, value in adapters.parameters(name) if key not in left_out}
    grouped = _by_layer(adapters, name, stored.state)
    state: dict[str, Tensor] = {}
    for method, config, paths in _parts(adapters, name):
        restored = method.restored(config, {path: grouped.pop(path) for path in paths if path in grouped})
        state |= _flat(restored)
    state |= _flat(grouped)
    made = _made_by_scaffold(adapters, name, state, stored)
    state = {key: value for key, value in state.items() if key not in made}
    state = {key: value for key, value in state.items() if key in own or not _is_base_copy(key, adapters, value)}
    state = _without_copies(adapters, name, state)
    there = {id(own[key]): value for key, value in state.items() if key in own}
    state |= {key: there[id(value)] for key, value in own.items() if key not in state and id(value) in there}  # tied
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        raise PeanutError(
            f"'{stored.source}' {_listed('lacks', missing)}{' and ' if missing and unexpected else ''}"
            f"{_listed('has unexpected', unexpected)}",
            f"the {len(own)} tensors of its config on {type(adapters.model).__name__}",
            f"check the base model and the config{_hint(unexpected, own)}",
        )
    for key, parameter in own.items():
        if parameter.shape != state[key].shape:
            raise PeanutError(
                f"'{stored.source}' holds {key} of shape {tuple(state[key].shape)}",
                f"{tuple(parameter.shape)}",
                "load it on the base it was trained on (for a head: with the same number of labels)",
            )
    if check:
        check_base(adapters, name, stored.base, stored.config.base_model_name_or_path)
    with torch.no_grad():
        for key, parameter in own.items():
            value = state[key]
            if assign and parameter.device.type == "meta":
                _assign(adapters, key, name, value.to(parameter.dtype))
            else:
                parameter.copy_(value.to(parameter.device))
        for key, parameter in adapters.parameters(name):
            if key in left_out and key in stored.passing and parameter.shape == stored.passing[key].shape:
                parameter.copy_(stored.passing[key].to(parameter.device))


def _made_by_scaffold(
    adapters: AdapterSet, name: str, state: Mapping[str, Tensor], stored: StoredAdapter
) -> dict[str, Tensor]:
    """What the file holds of what the adapter's scaffold computes: the scaffold itself is read instead.

    Raises:
        PeanutError: training's own file is not there, or does not belong to the adapter's.
    """
    scaffold = {
        _key(path, suffix): dict(adapters.parameters(name))[_key(path, suffix)]
        for method, config, paths in _parts(adapters, name)
        for path in paths
        for suffix in method.scaffold(config)
        if any(key == _key(path, suffix) for key, _ in adapters.parameters(name))
    }
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
    before = {key: value.detach().clone() for key, value in scaffold.items()}
    with torch.no_grad():
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
        with torch.no_grad():
            for key, value in scaffold.items():
                value.copy_(before[key])
        raise PeanutError(
            f"{TRAINING_NAME} in '{stored.source}' computes another '{apart[0]}' than the adapter's file holds",
            "files that were saved together",
            "delete it and load with is_trainable=False, or save the adapter again",
        )
    return made


def _without_copies(adapters: AdapterSet, name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors without what the peer writes of a trained module twice (its biases, under bias="all")."""
    parts = ("modules_to_save", "original_module")
    copies = tuple(f"{path}.{part}." for path, _ in adapters.saved_modules(name) for part in parts)
    return {key: value for key, value in state.items() if not key.startswith(copies)} if copies else state


def same_form(adapters: AdapterSet, name: str, config: PeftConfig) -> bool:
    """Whether ``config``, read from a file, is what adapter ``name`` would be saved with: then it stays as it is."""
    held, _ = adapter_state(adapters, name)
    mine, read = held.to_dict(), config.to_dict()
    return all(mine.get(field) == read.get(field) for field in (mine.keys() | read.keys()) - _CIRCUMSTANCES)


_CIRCUMSTANCES = {
    "adapters",
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "modules_to_save",
    "peft_version",
    "revision",
    "target_modules",
}
"""Fields that say where and on what an adapter was saved, not what it computes."""


def _assign(adapters: AdapterSet, key: str, name: str, value: Tensor) -> None:
    """Replaces a tensor without storage by ``value``, on the layer's device."""
    device = next((parameter.device for parameter in adapters.model.parameters()), value.device)
    bank = adapters.bank(name)
    if key.startswith(SHARED) and bank is not None:
        holder = next(layer for _, layer in adapters.layers(name) if name in layer.banks)
        bank.assign(key.removeprefix(SHARED), value.to(holder.weight.device))
        return
    for place in adapters.places(name):
        start = SHARED if place.path == SHARED else f"{place.path}."
        if key.startswith(start) and key[len(start) :] in place.adapters[name].suffixes:
            beside = next((own for own in place.parameters() if own.device.type != "meta"), None)
            place.adapters[name].assign(key[len(start) :], value.to(device if beside is None else beside.device))
            return
    raise PeanutError(f"'{key}' has no storage and is no adapter parameter", "a base model with its weights loaded")


def _modules_to_save(adapters: AdapterSet, name: str) -> list[str] | None:
    """What the config names, and the task's heads under the names that the peer writes for them."""
    config = adapters.configs[name]
    task = str(getattr(config.task_type, "value", config.task_type))
    return sorted({*(config.modules_to_save or []), *HEADS.get(task, ())}) or None


def _target_modules(adapters: AdapterSet, name: str, held: PeftConfig) -> list[str] | str | None:
    """The config's targets; where it left them open, the layers whose weight is changed."""
    if not isinstance(method_of(held.peft_type), WeightMethod):
        return held.target_modules
    targets = adapters.configs[name].target_modules
    if targets is not None and not (isinstance(targets, str) and targets.lower() == ALL_LINEAR):
        return targets
    main = method_of(adapters.configs[name].peft_type)
    return (
        sorted(
            place.path for place in adapters.places(name) if place.method_of(name)[0] == main and place.path != SHARED
        )
        or None
    )


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of which no two share memory, which safetensors refuses: a head may hold one bias under two names."""
    seen: set[int] = set()
    for key, value in tensors.items():
        place = value.untyped_storage().data_ptr()
        tensors[key] = value.clone() if place in seen else value
        seen.add(place)
    return tensors


def _is_base_copy(key: str, adapters: AdapterSet, value: Tensor) -> bool:
    """Whether a key that no adapter owns is a copy of a frozen tensor of this base (the peer saves embeddings so)."""
    *_, leaf = key.split(".")
    for path, layer in adapters.layers():
        if key == f"{path}.base_layer.{leaf}" and leaf == "weight":
            return layer.frozen.weight.shape == value.shape and torch.equal(
                layer.frozen.weight.cpu().to(value.dtype), value
            )
    base = {k: v for k, v in adapters.model.state_dict().items() if k == key}
    return key in base and base[key].shape == value.shape and torch.equal(base[key].cpu().to(value.dtype), value)


def _refuse_not_finite(state: Mapping[str, Tensor], where: str, do: str) -> None:
    for key, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise PeanutError(f"{where} holds values that are not finite in '{key}'", "finite values", do)


def _listed(verb: str, keys: list[str]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"{verb} {', '.join(keys[:3])}{more}"


def _hint(unexpected: list[str], own: Mapping[str, Tensor]) -> str:
    return f" (nearest to the first: {nearest(unexpected[0], own, 1)})" if unexpected and own else ""


def _plain(key: str) -> str:
    """A state dict's key without what wrappers put before and into it."""
    for token in ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module."):
        key = key.replace(token, "")
    return key.removeprefix("module.").removeprefix(PREFIX)
