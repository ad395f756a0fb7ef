"""Loads the experts of a mixture (X-LoRA) before it, and saves them with it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import PeanutError
from ...protocols import MixtureMethod, PeftConfig, WeightMethod, method_of
from ...protocols.config import CONFIG_NAME
from ..adapters.acting import experts_of
from ..adapters.adapter_set import AdapterSet
from ..adapters.size_limits import limited_by_file
from ..adapters.surgery import SHARED
from .checkpoint import adapter_state, save_adapter
from .embeddings import SaveEmbeddings
from .loading import all_or_none, load_state, same_form
from .stored_adapter import WEIGHTS_NAME, StoredAdapter, read_adapter
from .tensor_files import open_tensors

__all__ = ["add", "gathered", "name_for", "ready", "save_experts"]


def add(adapters: AdapterSet, name: str, config: PeftConfig, *, meta: bool = False, wide: bool = True) -> PeftConfig:
    """``AdapterSet.add``, after the experts that ``config`` names; returns the config with their names."""
    _check_class(config)
    with all_or_none(adapters):
        config = ready(adapters, config, wide=wide)
        adapters.add(name, config, meta=meta, wide=wide)
    return config


def ready(
    adapters: AdapterSet,
    config: PeftConfig,
    folder: str | os.PathLike[str] | None = None,
    *,
    wide: bool = True,
    check_base: bool = True,
) -> PeftConfig:
    """Reads the experts that ``config`` names and that are not in the model yet; returns the config with their names.

    The folders are left out of it: saving names those that are then written. Called within ``all_or_none``.

    Args:
        config: any adapter's config; that of a mixture without experts takes all that change weights in the model.
        folder: the mixture's own folder, where its experts lie under their names.
        wide: store parameters in float32 at least.
        check_base: refuse a base whose weights differ from those that an expert was trained on.

    Raises:
        PeanutError: there are no experts, or one is not where the config says.
    """
    method = method_of(config.peft_type)
    if not isinstance(method, MixtureMethod):
        return config
    wanted = method.experts(config)
    for name, source in wanted.items():
        if name in adapters.configs:
            _check_same(adapters, name, source, folder)
            continue
        stored = read_adapter(_found(name, source, folder))
        with limited_by_file(stored.source, stored.state):
            adapters.add(name, replace(stored.config, inference_mode=True), wide=wide)
        load_state(adapters, name, stored, check=check_base)
    experts = list(wanted) or [
        name for name, own in adapters.configs.items() if isinstance(method_of(own.peft_type), WeightMethod)
    ]
    if not experts:
        raise PeanutError(
            f"{method.name} without experts: the model has no adapters",
            "adapters to mix",
            "load LoRAs first, or name their folders: adapters={'name': 'folder'}",
        )
    mixed: PeftConfig = method.mixing(config, dict.fromkeys(experts))
    return mixed


def _check_same(adapters: AdapterSet, name: str, source: Any, folder: str | os.PathLike[str] | None) -> None:
    """Refuses an expert that has the name of another adapter of the model."""
    if source is None and folder is None:
        return
    stored, (_, state) = read_adapter(_found(name, source, folder)), adapter_state(adapters, name)
    same = stored.state.keys() == state.keys() and same_form(adapters, name, stored.config)
    if not same or not all(torch.equal(value.cpu(), stored.state[key].to(value.dtype)) for key, value in state.items()):
        raise PeanutError(
            f"expert {name!r} of '{stored.source}' is another adapter than the one of that name in the model",
            "the same adapter, or a name that is free",
            f"delete adapter {name!r}, or leave out the expert's folder to mix the one in the model",
        )


def _found(name: str, source: Any, folder: str | os.PathLike[str] | None) -> str | os.PathLike[str]:
    """Where an expert lies: under the mixture's folder if it was saved there whole, else where the config says."""
    own = None if folder is None else Path(folder) / name
    if own is not None and (own / CONFIG_NAME).is_file():
        if _is_whole(own):
            return own
        if source is None or not Path(source).exists():
            raise PeanutError(
                f"'{own}' has tensors of several experts in it and lacks others, as Hugging Face PEFT writes them",
                f"the folder into which expert {name!r} was saved by itself",
                f"load with config=XLoraConfig(adapters={{{name!r}: 'that folder', ...}}, ...)",
            )
    if source is None:
        raise PeanutError(
            f"expert {name!r} is neither in the model nor in the mixture's folder",
            "its folder",
            "name it: adapters={'name': 'folder'}",
        )
    return source  # type: ignore[no-any-return]


def _is_whole(folder: Path) -> bool:
    """Whether an expert was saved as adapters are. Hugging Face PEFT takes numbers in paths for experts' names."""
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        return True  # reading it says so
    with open_tensors(path) as file:
        return not any(key.startswith("base_model.lora_model.") for key in file.keys())  # noqa: SIM118


def gathered(stored: StoredAdapter) -> StoredAdapter:
    """A mixture with what Hugging Face PEFT wrote of its gate into the folders of its experts.

    It takes the number of a gate's layer for an expert's name, leaves it out of the key, and puts the tensor there.
    """
    method = method_of(stored.config.peft_type)
    state = dict(stored.state)
    for name in method.experts(stored.config) if isinstance(method, MixtureMethod) else ():
        path = Path(stored.source) / name / WEIGHTS_NAME
        if not path.is_file() or _is_whole(path.parent):
            continue
        with open_tensors(path) as file:
            for key in file.keys():  # noqa: SIM118
                plain = key.removeprefix("base_model.")
                if not plain.startswith("lora_model.") and f"{SHARED}{plain}" not in state:
                    place, _, leaf = plain.rpartition(".")
                    state.setdefault(f"{SHARED}{place}.{name}.{leaf}", file.get_tensor(key))
    return replace(stored, state=state)


def save_experts(
    folder: Path,
    adapters: AdapterSet,
    name: str,
    state_dict: Mapping[str, Tensor] | None = None,
    save_embedding_layers: SaveEmbeddings = "auto",
    pickled: bool = False,
) -> None:
    """Writes the experts of adapter ``name``, if it is a mixture, into the folder that it is saved in."""
    for expert in experts_of(adapters.configs[name]):
        save_adapter(folder / expert, adapters, expert, state_dict, save_embedding_layers, pickled)


def name_for(adapters: AdapterSet, config: PeftConfig, name: str) -> str:
    """The name of a new adapter: a mixture whose expert has the default name is called after its method."""
    _check_class(config)
    method, taken = method_of(config.peft_type), name == "default" and name in adapters.configs
    return method.name.lower() if taken and isinstance(method, MixtureMethod) else name


def _check_class(config: object) -> None:
    """Refuses what is no config of this library: one of Hugging Face PEFT, or a dictionary."""
    if not isinstance(config, PeftConfig):
        raise PeanutError(
            f"{type(config).__module__}.{type(config).__name__} as the config of an adapter",
            "a config of this library",
            "import its class from peanut, or make it of a dictionary with PeftConfig.from_dict",
        )
