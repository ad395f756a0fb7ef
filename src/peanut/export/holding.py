"""Adapters held as LoRAs of one rank, so that what is swapped in later compiles nothing again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import PeanutError, warn
from ..methods.lora import LoraConfig, low_rank
from ..model.adapters.adapter_set import AdapterSet
from ..model.injection import own_config
from ..model.layers.layer import AdaptedLayer
from ..model.layers.mirrored import Mirrored
from ..model.layers.parameters import Parameters
from ..operators import LowRank
from ..protocols import METHODS, WeightMethod, method_of
from .lora import carried, lora_values, moved_bias, shortest_targets

__all__ = [
    "as_lora",
    "check_hotswap_configs_compatible",
    "is_lora",
    "magnitudes",
    "no_change",
    "prepare_model_for_compiled_hotswap",
    "thin_change",
]


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
    adapters = AdapterSet.of(model)
    if not adapters.configs:
        raise PeanutError(f"a {type(model).__name__} without adapters", "the first adapter", "load it first")
    for own in adapters.configs.values():
        check_hotswap_configs_compatible(own, own)
    with adapters.state.changing():
        held = [
            as_lora(adapters, name, name, target_rank)
            for name in adapters.configs
            if target_rank is not None or not is_lora(adapters, name)
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


def is_lora(adapters: AdapterSet, name: str) -> bool:
    """Whether an adapter is a LoRA whose factors are its change."""
    config = adapters.configs[name]
    return isinstance(config, LoraConfig) and not config.starts_in_weight and config.bias == "none"


def thin_change(layer: AdaptedLayer, name: str) -> tuple[LowRank, Tensor | None]:
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


def magnitudes(layer: AdaptedLayer, name: str) -> dict[str, Tensor]:
    """DoRA's."""
    values = layer.values(name) if name in layer.adapters else {}
    return {suffix: value for suffix, value in values.items() if suffix == "lora_magnitude_vector"}


def no_change(layer: AdaptedLayer) -> LowRank:
    """The change of a layer that is left alone."""
    zeros = torch.zeros(layer.frozen.out_features + layer.frozen.in_features, 1, device=layer.frozen.beside.device)
    return LowRank(zeros[: layer.frozen.out_features], zeros[layer.frozen.out_features :].T)


def as_lora(adapters: AdapterSet, name: str, source: str, rank: int | None) -> Callable[[], None]:
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
            path: thin_change(layer, source) if source in layer.adapters else (no_change(layer), None)
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
        path: {**lora_values(layer, *parts[path], config.for_layer(path)), **magnitudes(layer, source)}
        for path, layer in layers.items()
    }
    trained = {
        path: {suffix: value.requires_grad for suffix, value in layer.values(name).items()}
        for path, layer in layers.items()
    }

    def put() -> None:
        if any(isinstance(layer.adapters[name], Mirrored) for layer in layers.values()):
            warn(f"adapter {name!r} changes its head apart from its embedding from now on")
        for path, layer in layers.items():
            made = {suffix: value.clone(memory_format=torch.contiguous_format) for suffix, value in held[path].items()}
            layer.delete(name)
            layer.add(name, METHODS["LORA"], config.for_layer(path), Parameters(made))
        adapters.configure(name, config)
        adapters.freeze(adapters.trained)
        for path, layer in layers.items():
            layer.set_scale(name, scales[path])
            for suffix, value in layer.values(name).items():
                value.requires_grad_(trained[path].get(suffix, any(trained[path].values())))

    return put
