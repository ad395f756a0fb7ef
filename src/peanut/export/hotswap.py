"""Hot-swapping: the values of another adapter in the place of one's, so that what is compiled stays as it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PeanutError, check_keywords
from ..hub import HUB_OPTIONS
from ..methods.lora import LoraConfig
from ..model.adapters.adapter_set import AdapterSet
from ..model.checkpoints.loading import load_state
from ..model.checkpoints.stored_adapter import read_adapter
from ..model.injection import own_config, set_peft_model_state_dict, targeting
from ..model.keywords import LOADING
from ..model.layers.layer import AdaptedLayer
from ..model.layers.mirrored import Mirrored
from ..protocols import PeftConfig
from ..protocols.arguments import checked
from .holding import (
    as_lora,
    check_hotswap_configs_compatible,
    is_lora,
    magnitudes,
    no_change,
    thin_change,
)
from .lora import lora_values

__all__ = ["hotswap_adapter", "hotswap_adapter_from_state_dict"]

_NEW = "swapped_in"
"""The name of the adapter whose values are taken, while they are."""


@checked
def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    check_base: bool = True,
    **hub: Any,
) -> None:
    """Puts the values of an adapter that is read into the place of one in the model, which keeps its name.

    A LoRA takes those of any method whose change is a product of thin factors, and keeps its rank and its α: B takes in
    what the scalings differ by, so a compiled model is not compiled again. Any other takes those of its own method, of
    the same sizes; of another, or if the rank is larger, it becomes a LoRA itself, and a compiled model is compiled
    once more. Layers that the new adapter does not change are changed no more. What ``set_scale`` had set is undone.

    Args:
        model: also compiled.
        torch_device: without effect, tensors follow the base's devices.
        key_mapping, check_base, hub: see ``PeftModel.from_pretrained``.

    Raises:
        PeanutError: there is no such adapter, it is merged, or the new one changes other layers or cannot be a LoRA
            exactly. The model is then as it was.
    """
    hub = check_keywords("hotswap_adapter", hub, HUB_OPTIONS, LOADING)
    stored = read_adapter(model_name_or_path, None, key_mapping, **hub)
    adapters = AdapterSet.of(model)
    _swap(adapters, adapter_name, stored.config, lambda: load_state(adapters, _NEW, stored, check=check_base))


@checked
def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: PeftConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """``hotswap_adapter`` from tensors, by keys that have the adapter's name in them: ``….lora_A.default.weight``.

    Args:
        config: that of the new adapter, of ours or of Hugging Face PEFT's.
        parameter_prefix: what the name before the adapter's begins with.
    """
    adapters = AdapterSet.of(model)
    state = {_without(adapter_name, key, parameter_prefix): value for key, value in state_dict.items()}
    config = targeting(adapters.model, own_config(config), state)
    _swap(adapters, adapter_name, config, lambda: set_peft_model_state_dict(adapters.model, state, _NEW))


def _without(name: str, key: str, prefix: str) -> str:
    """A key as files have it, without the adapter's name."""
    parts = key.removeprefix("_orig_mod.").split(".")
    place = next((i for i, part in enumerate(parts[1:], 1) if part == name and parts[i - 1].startswith(prefix)), None)
    return ".".join(part for i, part in enumerate(parts) if i != place)


@torch.no_grad()
def _swap(adapters: AdapterSet, name: str, config: PeftConfig, load: Callable[[], object]) -> None:
    """Adds an adapter beside the one to be swapped, loads it, takes its values, and deletes it."""
    adapters.known(name)
    check_hotswap_configs_compatible(adapters.configs[name], config)
    merged = list(adapters.state.merged)
    if name in merged:
        raise PeanutError(f"adapter {name!r} is merged", "an unmerged adapter", "call unmerge_adapter() first")
    with adapters.state.changing():
        adapters.unmerge()
        try:
            adapters.add_given(_NEW, replace(config, inference_mode=True), meta=True)
            try:
                load()
                _take(adapters, name)
            finally:
                adapters.delete(_NEW)
        finally:
            if merged:
                adapters.merge(merged)


def _take(adapters: AdapterSet, name: str) -> None:
    """Gives an adapter the values of the one beside it."""
    there, new = dict(adapters.layers(name)), dict(adapters.layers(_NEW))
    tied = [path for path, layer in there.items() if isinstance(layer.adapters[name], Mirrored)]
    if apart := [path for path in tied if path in new and not isinstance(new[path].adapters[_NEW], Mirrored)]:
        raise PeanutError(
            f"an adapter that changes '{apart[0]}' apart from its embedding, swapped into {name!r}, which ties them",
            "one with ensure_weight_tying=True",
            "use load_adapter",
        )
    heads, new_heads = dict(adapters.saved_modules(name)), dict(adapters.saved_modules(_NEW))
    dora = getattr(adapters.configs[name], "use_dora", False)
    if more := (new.keys() ^ there.keys() if dora else new.keys() - there.keys()) | (heads.keys() ^ new_heads.keys()):
        raise PeanutError(
            f"'{min(more)}', which one of two adapters to be swapped changes and the other does not",
            f"an adapter of the layers of {name!r}, and of the same modules_to_save",
            "use load_adapter",
        )
    if is_lora(adapters, name) and all(_fits(layer, name, new.get(path)) for path, layer in there.items()):
        for path, layer in there.items():
            product, shift = thin_change(new[path], _NEW) if path in new else (no_change(layer), None)
            values = lora_values(layer, product, shift, layer.method_of(name)[1])
            for suffix, value in {**values, **magnitudes(layer, _NEW)}.items():
                layer.values(name)[suffix].copy_(value)
    elif not _take_whole(adapters, name):
        as_lora(adapters, name, _NEW, None)()
    for layer in there.values():
        layer.set_scale(name, 1.0)
    for head in heads.values():
        head.modules_to_save[name].load_state_dict(head.modules_to_save[_NEW].state_dict())


def _fits(layer: AdaptedLayer, name: str, new: AdaptedLayer | None) -> bool:
    """Whether a LoRA can hold in a layer what the adapter beside it does there."""
    config = layer.method_of(name)[1]
    if new is None or not isinstance(config, LoraConfig) or not config.scaling:
        return isinstance(config, LoraConfig) and config.scaling != 0
    product, shift = thin_change(new, _NEW)
    return product.rank <= config.r and (shift is None or config.lora_bias)


def _take_whole(adapters: AdapterSet, name: str) -> bool:
    """Copies all tensors and the config of the adapter beside, if it is of the same method and sizes."""
    own, new = dict(adapters.parameters(name)), dict(adapters.parameters(_NEW))
    shapes = [{key: value.shape for key, value in each.items()} for each in (own, new)]
    if adapters.method(name) != adapters.method(_NEW) or shapes[0] != shapes[1]:
        return False
    for key, value in own.items():
        value.copy_(new[key])
    adapters.configure(name, replace(adapters.configs[_NEW], inference_mode=adapters.configs[name].inference_mode))
    return True
