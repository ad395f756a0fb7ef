"""Converts a model of Hugging Face PEFT (below: PEFT) to one of this library, in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PeanutError, warn
from ..model.adapters.adapter_set import AdapterSet
from ..model.checkpoints.checkpoint import by_place, parts_of
from ..model.checkpoints.keys import flat
from ..model.checkpoints.ties import without_mirrored
from ..model.layers.hooks import move_hooks
from ..model.peft_model import PeftModel
from ..model.targets.matching import target_paths
from ..model.targets.paths import bare
from ..protocols import PeftConfig, PeftType, WeightMethod, method_of
from ..protocols.arguments import checked
from ..protocols.patterns import outer
from .exchange import as_before, modes_of, only_whole
from .install import installed
from .layers import (
    Slot,
    Wrapped,
    beside,
    by_our_keys,
    check_alike,
    fill,
    made_anew,
    our_slots,
    peft_package,
    wrapped_in,
)
from .together import acting_on, check_together

__all__ = ["from_peft"]

_STARTS = ("corda_config", "eva_config", "loftq_config", "lora_ga_config", "runtime_config")
"""Fields of PEFT's LoRA that say how it started or where it computes; a live adapter is past its start."""


@checked
def from_peft(model: nn.Module) -> Any:
    """A live model of Hugging Face PEFT made ours in place: equal outputs, the same tensors, no weight copied.

    Trained tensors stay the same ``nn.Parameter`` objects, so that an optimizer made before goes on training them; the
    active adapters, what is frozen, train and eval modes, hooks and the modules trained whole stay as they are.
    PEFT's wrapper is not to be used any more.

    Args:
        model: a ``peft.PeftModel`` or ``peft.PeftMixedModel``, or a model that PEFT has put adapters into.

    Returns:
        a ``PeftModel`` around the same base model; for a model with adapters put into it, the model itself.

    Raises:
        PeanutError: it has no adapters of PEFT, one of a method, option or state that does not exist here, or
            adapters that are merged or disabled. The model is then unchanged.
    """
    base, theirs = _opened(model)
    places = wrapped_in(base)
    counts = Counter(id(module) for _, module in base.named_modules(remove_duplicate=False))
    for place in places:
        if counts[id(place.bare)] > 1:
            raise PeanutError(
                f"the module at '{place.path}' stands elsewhere in the model too, where PEFT has not adapted it",
                "a module in one place, as ours adapts it in all of them",
                "train that adapter where it was begun",
            )
    configs = {name: _our_config(name, config, places) for name, config in theirs.items()}
    for place in places:
        for name, config in configs.items():
            if place.held(name):
                check_alike(place.path, place.bare, config)
    active = _active(model, configs, places)
    held = {name: {place.path: place.held(name) for place in places} for name in configs}
    apart = {name: beside(model, name) for name in configs}
    if any(config.peft_type == PeftType.ADAPTION_PROMPT for config in configs.values()):
        held = {name: _prompted(model, base, name) for name in configs}
    modes = modes_of(base)
    with only_whole(base):
        for place in places:
            place.put(place.bare)
        for mark in ("peft_config", "_hf_peft_config_loaded"):
            base.__dict__.pop(mark, None)
        adapters = AdapterSet(base)
        for name, config in configs.items():
            adapters.add(name, _located(base, config, held[name]), meta=True, copies=False)
        for name in configs:
            _take_heads(adapters, name, places)
            _take_over(adapters, name, held[name], apart[name])
        for place in places:
            check_together(place, acting_on(adapters.at(place.path), active, configs))
            for layer in place.layers:
                move_hooks(layer, adapters.at(place.path))
        _take_schedule(getattr(getattr(model, "base_model", None), "rankallocator", None), adapters)
    adapters.state.active = active
    adapters.trained = [name for name in configs if any(value.requires_grad for _, value in adapters.parameters(name))]
    as_before(modes)
    if model is base:
        base.__dict__["peft_config"] = dict(adapters.configs)
        if installed() and hasattr(type(base), "_hf_peft_config_loaded"):  # transformers may go on with it
            base.__dict__["_hf_peft_config_loaded"] = True
        return base
    wrapped = PeftModel.around(base)
    wrapped.training = wrapped.base_model.training = model.training
    return wrapped


# What PEFT's model is, and whether ours can be that


def _opened(model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """The base model of a live model of PEFT, and PEFT's configs, mixtures last."""
    peft = peft_package(loaded=True)
    base, configs = model, model.__dict__.get("peft_config")
    if peft is not None and isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
        configs = model.peft_config
        base = model.base_model.model if isinstance(model, peft.PeftMixedModel) else model.get_base_model()
    if peft is None or not configs or not isinstance(configs, dict):
        raise PeanutError(
            f"{type(model).__name__} has no adapters of Hugging Face PEFT",
            "a peft.PeftModel, or a model that it has put adapters into",
            "call it on what peft.get_peft_model returned",
        )
    if "_adapter_set" in base.__dict__ and base.__dict__["_adapter_set"].configs:
        raise PeanutError(f"{type(base).__name__} has adapters of ours too", "adapters of one library", "unload() ours")
    return base, dict(sorted(configs.items(), key=lambda item: str(_plain(item[1].peft_type)) == "XLORA"))


def _active(model: nn.Module, configs: Mapping[str, PeftConfig], places: list[Wrapped]) -> list[str]:
    """The active adapters of PEFT's model.

    Raises:
        PeanutError: one is merged, or they are disabled, or other ones are active in other layers.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for place in places for layer in place.of(BaseTunerLayer)]
    if any(layer.merged for layer in layers):
        # PEFT unmerges by subtraction, which does not restore the weight exactly: the user has to decide.
        raise PeanutError("adapters are merged into the weights", "an unmerged model", "call unmerge_adapter() first")
    kinds = {config.peft_type for config in configs.values()}
    tuner: Any = getattr(model, "base_model", None)
    off = [layer.disable_adapters for layer in layers] + [
        getattr(model, "_adapters_disabled", False),
        PeftType.ADAPTION_PROMPT in kinds and not tuner._enabled,
        PeftType.XLORA in kinds and tuner.disabled,
    ]
    if any(off):
        raise PeanutError("adapters are disabled", "adapters that act", "call enable_adapter_layers() first")
    if PeftType.XLORA in kinds:
        return [name for name, config in configs.items() if config.peft_type == PeftType.XLORA]
    if not layers:
        return list(getattr(model, "active_adapters", None) or [model.active_adapter])
    found = {tuple(layer.active_adapters) for layer in layers}
    if len(found) > 1:
        raise PeanutError(
            f"layers have other active adapters ({' and '.join(str(list(names)) for names in sorted(found)[:2])})",
            "the same ones in every layer",
            "call set_adapter first",
        )
    (active,) = found
    return list(active)


def _our_config(name: str, theirs: Any, places: list[Wrapped]) -> PeftConfig:
    """Our config for one of PEFT's."""
    values = {field: _plain(value) for field, value in theirs.to_dict().items() if field not in _STARTS}
    start = values.get("init_lora_weights")
    if values["peft_type"] == "LORA" and isinstance(start, str) and start != "gaussian":
        values["init_lora_weights"] = True
        if start not in ("eva", "orthogonal"):
            warn(
                f"adapter {name!r} started by init_lora_weights={start!r}, which took a part out of the base's "
                "weights; it is now a plain LoRA of the base as it is: save that base too, or merge",
            )
    if values["peft_type"] == "ADALORA":
        shapes = {place.path: place.held(name) for place in places}
        ranks = {path: len(held["lora_E"][0][held["lora_E"][1]]) for path, held in shapes.items() if "lora_E" in held}
        cut = {f"{path}.lora_E": [True] * r for path, r in ranks.items() if r != values["init_r"]}
        values["rank_pattern"] = cut or None
    if values["peft_type"] == "XLORA":
        values |= {"adapters": dict.fromkeys(theirs.adapters), "use_bias": True}
        if list(theirs.adapters) != sorted(theirs.adapters):
            raise PeanutError(
                f"the experts of {name!r} stand in the order {list(theirs.adapters)}",
                "the order of their names",
                "rename them so that sorting keeps their order ('00', '01', ...)",
            )
    return PeftConfig.from_dict(values, source=f"adapter {name!r}")


def _plain(value: Any) -> Any:
    value = value.value if isinstance(value, Enum) else value
    return sorted(value) if isinstance(value, (set, frozenset)) else value


def _located(base: nn.Module, config: PeftConfig, held: Mapping[str, Mapping[str, Slot]]) -> PeftConfig:
    """The config, with the layers named one by one where its names would mean others here, or none."""
    method = method_of(config.peft_type)
    if not isinstance(method, WeightMethod):
        return config
    beside_it = {suffix for part, _ in method.companions(config) for suffix in (getattr(part, "suffix", ""),)}
    paths = list(dict.fromkeys(outer(path) for path, slots in held.items() if slots.keys() - beside_it))
    try:
        found = target_paths(base, config, method)
    except PeanutError:
        found = []
    if set(found) == set(paths) or (method.follows_ties and set(found) <= set(paths)):
        return config
    return replace(config, target_modules=paths, exclude_modules=None, layers_to_transform=None, layers_pattern=None)


def _prompted(model: nn.Module, base: nn.Module, name: str) -> dict[str, dict[str, Slot]]:
    """What an adaption prompt's attention modules hold; those of a silent adapter lie in a cache."""
    tuner: Any = model.base_model
    at = {id(module): path for path, module in base.named_modules()}
    target = tuner.peft_config[name].target_modules
    parents = tuner._parents[name]
    modules = tuner._cached_adapters.get(name) or [getattr(parent, target) for parent in parents]
    return {
        f"{at[id(parent)]}.{target}": {suffix: (module._parameters, suffix) for suffix in module._parameters}
        for parent, module in zip(parents, modules, strict=True)
    }


# From PEFT's tensors to ours


def _take_heads(adapters: AdapterSet, name: str, places: list[Wrapped]) -> None:
    """Puts the modules that PEFT trains whole in the place of our copies of them."""
    from peft.utils.other import ModulesToSaveWrapper

    theirs = {
        place.path: wrapper.modules_to_save[name]
        for place in places
        for wrapper in place.of(ModulesToSaveWrapper)
        if name in wrapper.modules_to_save
    }
    ours = dict(adapters.saved_modules(name))
    if theirs.keys() != ours.keys():
        raise PeanutError(
            f"adapter {name!r} trains {sorted(theirs)} whole", f"{sorted(ours)}", "name them in modules_to_save"
        )
    for path, saved in ours.items():
        saved.modules_to_save[name] = theirs[path]


def _take_over(
    adapters: AdapterSet, name: str, held: Mapping[str, Mapping[str, Slot]], apart: Mapping[str, Slot]
) -> None:
    """Puts PEFT's tensors in the place of ours."""
    theirs = by_our_keys(held, apart, our_slots(adapters, name))
    grouped = by_place(adapters, name, {key: owner[leaf] for key, (owner, leaf) in theirs.items()})
    values: dict[str, Tensor] = {}
    for method, config, paths in parts_of(adapters, name):
        values |= flat(method.restored(config, {path: grouped.pop(path) for path in paths if path in grouped}))
    values = without_mirrored(adapters, name, values | flat(grouped), f"adapter {name}")
    own = our_slots(adapters, name)
    if getattr(adapters.configs[name], "bias", "none") != "none":
        for key in [key for key in own.keys() - values.keys() if key.endswith(".bias")]:
            layer = bare(adapters.at(key.removesuffix(".bias").removesuffix(".base_layer")))
            values[key] = bias = layer.get_parameter("bias")
            # PEFT trains the base's own bias, ours a copy: the base gets a copy, which is not trained.
            layer._parameters["bias"] = nn.Parameter(bias.detach().clone(), requires_grad=False)
    fill(own, values, made_anew(adapters, name), f"adapter {name!r}")


def _take_schedule(allocator: Any, adapters: AdapterSet) -> None:
    """AdaLoRA's averages of sensitivities. PEFT keeps no count of steps: its scripts do."""
    for name, config in adapters.configs.items():
        if config.peft_type != PeftType.ADALORA or allocator is None:
            continue
        for key, (owner, leaf) in our_slots(adapters, name).items():
            path, _, suffix = key.rpartition(".")
            kind, _, letter = suffix.rpartition("_")
            averages = {"ipt": "exp_avg_ipt", "unc": "exp_avg_unc"}.get(kind)
            theirs = getattr(allocator, averages or "", {}).get(f"{path}.lora_{letter}.{name}")
            if theirs is not None:
                owner[leaf] = theirs.detach().to(owner[leaf])
            if suffix == "kept":
                pattern = (allocator.peft_config.rank_pattern or {}).get(f"{path}.lora_E.{name}")
                if pattern is not None and len(pattern) == len(owner[leaf]):
                    owner[leaf] = torch.tensor(pattern).unsqueeze(1).to(owner[leaf])
        if allocator.exp_avg_ipt:
            warn(
                f"adapter {name!r} has been trained for a number of steps that Hugging Face PEFT does not keep: "
                "AdaLoRA's schedule starts again from its first",
            )
