"""``get_layer_status`` and ``get_model_status``: which adapters a model has, where, and in which state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ..errors import PeanutError
from ..protocols.registry import name_of
from .adapters.adapter_set import AdapterSet
from .layers.adapted import Adapted, walk
from .layers.saved_modules import SavedModule
from .layers.weight import AdaptedWeight

__all__ = ["TunerLayerStatus", "TunerModelStatus", "get_layer_status", "get_model_status"]

Irregular = Literal["irregular"]


@dataclass
class TunerLayerStatus:
    """The adapters of one place.

    Args:
        name: its path in the model.
        module_type: the class of the module there, with that of the base's own layer.
        enabled: whether adapters act.
        active_adapters: the active ones of the model.
        merged_adapters: those that are merged into its weight.
        requires_grad: whether the tensors of each are trained, ``"irregular"`` if some are.
        available_adapters: those that are here.
        devices: the kinds of devices on which each lies.
        quantization_backend: the kind of quantised layer that it is, ``None`` for others.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """The adapters of a model; where its places differ in one of these, it is ``"irregular"``.

    Args:
        base_model_type: the class of the base model.
        adapter_model_type: the class of ``base_model``, ``"None"`` if the adapters were injected.
        peft_types: the method of each adapter.
        trainable_params, total_params: numbers of parameters.
        num_adapter_layers: number of places where adapters act.

    The others: see ``TunerLayerStatus``.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The state of the adapters in each place of a model, with or without ``PeftModel`` around it.

    Raises:
        PeanutError: there is none.
    """
    adapters = AdapterSet.of(model)
    before = "model." if model is not adapters.model else ""  # as seen from base_model
    found = [_status(place, before) for place in walk(adapters.model) if isinstance(place, (Adapted, SavedModule))]
    if not found:
        raise PeanutError(f"{type(model).__name__} has no adapters", "a model with adapters", "add one first")
    return found


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The state of a model's adapters; errors as for ``get_layer_status``."""
    layers, adapters = get_layer_status(model), AdapterSet.of(model)
    wrapped = model is not adapters.model
    known = {id(value): value for value in model.parameters()}.values()
    available = sorted({name for layer in layers for name in layer.available_adapters})
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    partly = any((set(layer.available_adapters) - set(layer.merged_adapters)) & set(merged) for layer in layers)
    return TunerModelStatus(
        base_model_type=type(adapters.model).__name__,
        adapter_model_type=type(getattr(model, "base_model", model)).__name__ if wrapped else "None",
        peft_types={name: str(name_of(config.peft_type)) for name, config in adapters.configs.items()}
        if wrapped
        else {},
        trainable_params=sum(value.numel() for value in known if value.requires_grad),
        total_params=sum(value.numel() for value in known),
        num_adapter_layers=len(layers),
        enabled=_alike([layer.enabled for layer in layers]),
        active_adapters=layers[0].active_adapters
        if len({tuple(layer.active_adapters) for layer in layers}) == 1
        else "irregular",
        merged_adapters="irregular" if partly else merged,
        requires_grad={
            name: _alike([layer.requires_grad[name] for layer in layers if name in layer.requires_grad])
            for name in available
        },
        available_adapters=available,
        devices={
            name: sorted({kind for layer in layers for kind in layer.devices.get(name, ())}) for name in available
        },
        quantization_backend=_alike([layer.quantization_backend for layer in layers]),
    )


def _status(place: Adapted | SavedModule, before: str) -> TunerLayerStatus:
    """The state of one place."""
    own: dict[str, list[Tensor]] = {}
    kind, merged, quantised, base = type(place).__name__, list[str](), None, ""
    if isinstance(place, SavedModule):
        own = {name: list(place.modules_to_save[name].parameters()) for name in place.modules_to_save}
        base = f".{type(place.original_module).__name__}"
    else:
        for name in place.adapters:
            own[name] = [value for held in (place.adapters, place.banks) if name in held for value in held[name]]
        merged = place.merged_adapters
    if isinstance(place, AdaptedWeight):
        base = f".{type(place.base_layer).__name__}"
        quantised = place.frozen.kind.name if place.frozen.kind.quantised else None
    return TunerLayerStatus(
        name=before + place.path,
        module_type=kind + base,
        enabled=not place.disable_adapters,
        active_adapters=place.active_adapters,
        merged_adapters=merged,
        requires_grad={
            name: _alike([value.requires_grad for value in values if isinstance(value, nn.Parameter)])
            for name, values in own.items()
        },
        available_adapters=sorted(own),
        devices={name: sorted({value.device.type for value in values}) for name, values in own.items()},
        quantization_backend=quantised,
    )


def _alike(values: Sequence[Any]) -> Any:
    """What all values are, ``"irregular"`` if they differ; ``False`` of none."""
    return "irregular" if len(set(values)) > 1 else values[0] if values else False
