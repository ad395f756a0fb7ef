"""Hot-swapping: the values of another adapter in the place of one's, so that what is compiled stays as it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import PeanutError, check_keywords, warn
from ..hub import HUB_OPTIONS
from ..methods.lora import LoraConfig, low_rank
from ..model.adapters.adapter_set import AdapterSet
from ..model.checkpoints.loading import load_state
from ..model.checkpoints.stored_adapter import read_adapter
from ..model.injection import own_config, set_peft_model_state_dict, targeting
from ..model.keywords import LOADING
from ..model.layers.layer import AdaptedLayer
from ..model.layers.parameters import Parameters
from ..operators import LowRank
from ..protocols import METHODS, PeftConfig, WeightMethod, method_of
from ..protocols.arguments import checked
from .lora import carried, lora_values, moved_bias, shortest_targets

__all__ = [
    "check_hotswap_configs_compatible",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "prepare_model_for_compiled_hotswap",
]

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
    adapters = _adapters(model)
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
    adapters = _adapters(model)
    state = {_without(adapter_name, key, parameter_prefix): value for key, value in state_dict.items()}
    config = targeting(adapters.model, own_config(config), state)
    _swap(adapters, adapter_name, config, lambda: set_peft_model_state_dict(adapters.model, state, _NEW))


@torch.no_grad()
def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: Any = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Holds the model's adapters as LoRAs of rank ``target_rank``: what is swapped in later compiles nothing again.

    Call it after the first adapter is loaded and before ``torch.compile``.

    Args:
        target_rank: the largest rank of all adapters to come; by default the one that is there.
        config: a config or several by name, whose ranks are set to ``target_rank``.
        check_compiled: what to do about a model that is compiled already.

    Raises:
        PeanutError: the model is compiled, it has no adapters, or one cannot be such a LoRA exactly.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise PeanutError(f"check_compiled={check_compiled!r}", "'error', 'warn' or 'ignore'")
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None):
        if check_compiled == "error":
            raise PeanutError("a compiled model", "one that is not compiled yet", "prepare it first, then compile it")
        if check_compiled == "warn":
            warn("the model is compiled already, and will be once more: prepare it first, then compile it")
    adapters = _adapters(model)
    if not adapters.configs:
        raise PeanutError(f"a {type(model).__name__} without adapters", "the first adapter", "load it first")
    for own in adapters.configs.values():
        check_hotswap_configs_compatible(own, own)
    with adapters.state.changing():
        held = [
            _as_lora(adapters, name, name, target_rank)
            for name in adapters.configs
            if target_rank is not None or not _is_lora(adapters, name)
        ]
        for put in held:
            put()
    given = config.values() if isinstance(config, Mapping) else [config]
    for own in given if config is not None and target_rank is not None else ():
        own.r = target_rank
        own.rank_pattern = dict.fromkeys(own.rank_pattern or (), target_rank)


def check_hotswap_configs_compatible(config0: Any, config1: Any) -> None:
    """Refuses to swap an adapter of one config for one of another where no values could make them the same.

    Raises:
        PeanutError: one of the methods changes no weight, or one of two LoRAs has magnitudes (DoRA).
    """
    configs = own_config(config0), own_config(config1)
    for config in configs:
        if not isinstance(method_of(config.peft_type), WeightMethod):
            raise PeanutError(
                f"a hot swap of {config.method}, which changes no weight", "a method that does", "use load_adapter"
            )
    dora = {getattr(config, "use_dora", False) for config in configs if isinstance(config, LoraConfig)}
    if len(dora) > 1:
        raise PeanutError("a LoRA with use_dora=True and one without", "two of one kind", "use load_adapter")


def _adapters(model: nn.Module) -> AdapterSet:
    return AdapterSet.of(getattr(model, "_orig_mod", model))


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
    with adapters.state.changing():
        adapters.add_given(_NEW, replace(config, inference_mode=True), meta=True)
        try:
            load()
            _take(adapters, name)
        finally:
            adapters.delete(_NEW)


def _take(adapters: AdapterSet, name: str) -> None:
    """Gives an adapter the values of the one beside it."""
    there, new = dict(adapters.layers(name)), dict(adapters.layers(_NEW))
    heads, new_heads = dict(adapters.saved_modules(name)), dict(adapters.saved_modules(_NEW))
    dora = getattr(adapters.configs[name], "use_dora", False)
    if more := (new.keys() ^ there.keys() if dora else new.keys() - there.keys()) | (heads.keys() ^ new_heads.keys()):
        raise PeanutError(
            f"'{min(more)}', which one of two adapters to be swapped changes and the other does not",
            f"an adapter of the layers of {name!r}, and of the same modules_to_save",
            "use load_adapter",
        )
    if _is_lora(adapters, name) and all(_fits(layer, name, new.get(path)) for path, layer in there.items()):
        for path, layer in there.items():
            product, shift = _parts(new[path], _NEW) if path in new else (_nothing(layer), None)
            values = lora_values(layer, product, shift, layer.method_of(name)[1])
            for suffix, value in {**values, **_magnitudes(layer, _NEW)}.items():
                layer.values(name)[suffix].copy_(value)
    elif not _take_whole(adapters, name):
        _as_lora(adapters, name, _NEW, None)()
    for layer in there.values():
        layer.set_scale(name, 1.0)
    for head in heads.values():
        head.modules_to_save[name].load_state_dict(head.modules_to_save[_NEW].state_dict())


def _is_lora(adapters: AdapterSet, name: str) -> bool:
    """Whether an adapter is a LoRA whose factors are its change."""
    config = adapters.configs[name]
    return isinstance(config, LoraConfig) and not config.starts_in_weight and config.bias == "none"


def _fits(layer: AdaptedLayer, name: str, new: AdaptedLayer | None) -> bool:
    """Whether a LoRA can hold in a layer what the adapter beside it does there."""
    config = layer.method_of(name)[1]
    if new is None or not isinstance(config, LoraConfig) or not config.scaling:
        return isinstance(config, LoraConfig) and config.scaling != 0
    product, shift = _parts(new, _NEW)
    return product.rank <= config.r and (shift is None or config.lora_bias)


def _parts(layer: AdaptedLayer, name: str) -> tuple[LowRank, Tensor | None]:
    """The change of a layer as a product of thin factors, before any DoRA, and that of its bias.

    Raises:
        PeanutError: it is not given as one.
    """
    method, config = layer.method_of(name)
    if getattr(config, "use_dora", False):
        return low_rank(config, layer.values(name)), None
    product = layer.low_rank(name) if layer.frozen.kind.name in METHODS["LORA"].kinds else None
    if product is None:
        raise PeanutError(
            f"a hot swap of {method.name} at '{layer.path}', whose change is no product of thin factors",
            "a method that LoRA can be exactly, or two adapters of one method and the same sizes",
            "use load_adapter",
        )
    return product, moved_bias(layer, name)


def _magnitudes(layer: AdaptedLayer, name: str) -> dict[str, Tensor]:
    """DoRA's."""
    values = layer.values(name) if name in layer.adapters else {}
    return {suffix: value for suffix, value in values.items() if suffix == "lora_magnitude_vector"}


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


def _nothing(layer: AdaptedLayer) -> LowRank:
    """The change of a layer that is left alone."""
    zeros = torch.zeros(layer.frozen.out_features + layer.frozen.in_features, 1, device=layer.frozen.beside.device)
    return LowRank(zeros[: layer.frozen.out_features], zeros[layer.frozen.out_features :].T)


def _as_lora(adapters: AdapterSet, name: str, source: str, rank: int | None) -> Callable[[], None]:
    """What makes an adapter a LoRA of rank and α ``rank`` that does what ``source`` does, which may be itself.

    Raises:
        PeanutError: there is none. Nothing is changed before what is returned is called.
    """
    layers = dict(adapters.layers(name))
    scales = {path: layer.factor(name) for path, layer in layers.items()}
    try:
        for layer in layers.values() if source == name else ():
            layer.set_scale(name, 1.0)
        parts = {
            path: _parts(layer, source) if source in layer.adapters else (_nothing(layer), None)
            for path, layer in layers.items()
        }
    finally:
        for path, layer in layers.items() if source == name else ():
            layer.set_scale(name, scales[path])
    least = max((product.rank for product, _ in parts.values()), default=1)
    if rank is not None and rank < least:
        raise PeanutError(f"target_rank={rank}, and adapter {name!r} has rank {least}", f"{least} or more")
    own = adapters.configs[source]
    config = LoraConfig(
        **carried(adapters.configs[name]),
        r=rank or least,
        lora_alpha=rank or least,
        lora_dropout=getattr(own, "lora_dropout", 0.0),
        use_dora=getattr(own, "use_dora", False),
        lora_bias=any(shift is not None for _, shift in parts.values()),
        fan_in_fan_out=any(layer.frozen.kind.name == "conv1d" for layer in layers.values()),
    )
    config = replace(config, target_modules=shortest_targets(adapters, config, list(layers)))
    held = {
        path: {**lora_values(layer, *parts[path], config.for_layer(path)), **_magnitudes(layer, source)}
        for path, layer in layers.items()
    }
    trained = {
        path: any(value.requires_grad for value in layer.values(name).values()) for path, layer in layers.items()
    }

    def put() -> None:
        for path, layer in layers.items():
            made = {suffix: value.clone(memory_format=torch.contiguous_format) for suffix, value in held[path].items()}
            layer.delete(name)
            layer.add(name, METHODS["LORA"], config.for_layer(path), Parameters(made))
            layer.adapters[name].requires_grad_(trained[path])
        adapters.configure(name, config)
        for path, layer in layers.items():
            layer.set_scale(name, scales[path])
        adapters.freeze(adapters.trained)

    return put
