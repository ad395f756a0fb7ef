"""Converts a model of this library to one of Hugging Face PEFT (below: PEFT), in place."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import PeanutError
from ..model.adapters.acting import experts_of
from ..model.adapters.adapter_set import AdapterSet
from ..model.adapters.surgery import SHARED
from ..model.checkpoints.checkpoint import adapter_state, file_config
from ..model.checkpoints.mixtures import save_experts
from ..model.layers.hooks import move_hooks
from ..protocols import PeftConfig, PeftType, method_of
from ..protocols.arguments import checked
from .exchange import as_before, modes_of, only_whole
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

__all__ = ["to_peft"]


@checked
def to_peft(model: nn.Module) -> Any:
    """A model of ours made one of Hugging Face PEFT in place: the inverse of ``from_peft``, with the same promises.

    Args:
        model: a ``PeftModel``, or a model with injected adapters.

    Returns:
        a ``peft.PeftModel`` (a ``peft.PeftMixedModel`` where its adapters are of several methods) around the same base
        model; for a model with injected adapters, the model itself.

    Raises:
        PeanutError: peft is not installed; a method or an option does not exist there; adapters are merged, or none is
            active. The model is then unchanged.
    """
    peft = peft_package()
    adapters = AdapterSet.of(model)
    base, wrapped = adapters.model, model is not adapters.model
    if not adapters.configs:
        raise PeanutError(f"{type(model).__name__} has no adapters", "a model with adapters", "call it on a PeftModel")
    if adapters.state.merged:
        raise PeanutError("adapters are merged into the weights", "an unmerged model", "call unmerge_adapter() first")
    adapters.refuse_differing()
    if not adapters.state.enabled or adapters.state.off:
        raise PeanutError("adapters are disabled", "adapters that act", "call enable_adapter_layers() first")
    if not adapters.state.active:
        raise PeanutError("no adapter is active", "an active adapter", "call set_adapter(name)")
    for path, layer in adapters.layers():
        if path in adapters.elsewhere:
            raise PeanutError(
                f"the layer at '{path}' stands at '{adapters.elsewhere[path][0]}' too, where PEFT would not adapt it",
                "a layer in one place",
                "merge the adapter, or go on with it here",
            )
        for name in layer.adapters:
            check_alike(path, layer.base_layer, adapters.configs[name])
    given = {name: _Given.of(adapters, name) for name in adapters.configs}
    configs = {name: _their_config(peft, name, own.config) for name, own in given.items()}
    modes, training = modes_of(base), model.training
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with tempfile.TemporaryDirectory() as folder, only_whole(base):
        for name in adapters.configs:
            if experts := experts_of(adapters.configs[name]):
                _check_experts(name, experts)
                save_experts(Path(folder), adapters, name)
                configs[name].adapters = {expert: f"{folder}/{expert}" for expert in experts}
        outer = {place.path: adapters.at(place.path) for place in adapters.places() if place.path != SHARED}
        acting = {path: acting_on(layer, adapters.state.active, adapters.configs) for path, layer in adapters.layers()}
        _leave(adapters)
        made = _made(peft, base, adapters, configs, wrapped)
        places = wrapped_in(base)
        for place in places:
            check_together(place, acting.get(place.path, {}))
        for name, own in given.items():
            _give_heads(places, name, own.heads)
            _give_over(base, places, name, own, beside(made, name))
        _activate(made, base, adapters.state.active, configs)
        for place in places:
            if place.path in outer and outer[place.path] is not place.bare:
                move_hooks(outer[place.path], place.layers[0])
    adapters.leave()
    for config in configs.values():
        if getattr(config, "adapters", None):
            config.adapters = dict.fromkeys(config.adapters)
    for place in places:
        place.layers[0].train(place.bare.training)
    as_before(modes)
    for parameter, was in trained:
        parameter.requires_grad_(was)
    for around in {made, getattr(made, "base_model", made)} - {base}:
        around.__dict__["training"] = training
    return made


@dataclass(frozen=True)
class _Given:
    """One of our adapters, as it was in the model.

    Args:
        config: its config as files hold it.
        state: its tensors by key as files hold them.
        own: its tensors by key, the very objects.
        optional: keys of those that PEFT may do without.
        heads: the modules that it trains whole, by path.
    """

    config: PeftConfig
    state: Mapping[str, Tensor]
    own: Mapping[str, Tensor]
    optional: Collection[str]
    heads: Mapping[str, nn.Module]

    @staticmethod
    def of(adapters: AdapterSet, name: str) -> _Given:
        held, state = adapter_state(adapters, name)
        config = replace(file_config(adapters, name, held), inference_mode=adapters.configs[name].inference_mode)
        own = {key: owner[leaf] for key, (owner, leaf) in our_slots(adapters, name).items()}
        heads = {path: saved.modules_to_save[name] for path, saved in adapters.saved_modules(name)}
        return _Given(config, state, own, made_anew(adapters, name), heads)


def _their_config(peft: Any, name: str, config: PeftConfig) -> Any:
    """PEFT's config for one of ours.

    Raises:
        PeanutError: PEFT has no such method, or none of its options.
    """
    kind = method_of(config.peft_type).name
    theirs = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(getattr(peft.PeftType, kind, None))
    if theirs is None:
        raise PeanutError(
            f"adapter {name!r} is of {kind}, which Hugging Face PEFT {peft.__version__} does not have",
            "methods that both have",
            "delete that adapter first, or export it with to_lora",
        )
    values = config.to_dict()
    if kind == "XLORA":
        values.pop("use_bias", None)  # PEFT's gate always has biases, and trains them
    for field in values.keys() - theirs.__dataclass_fields__.keys():
        raise PeanutError(
            f"adapter {name!r} has {field}={values[field]!r}, which Hugging Face PEFT's {kind} does not have",
            f"its fields: {', '.join(sorted(theirs.__dataclass_fields__))}",
            "keep this adapter here, or export it with to_lora",
        )
    return theirs(**values)


def _check_experts(name: str, experts: Collection[str]) -> None:
    numbers = [str(number) for number in range(len(experts))]
    if list(experts) != numbers:
        raise PeanutError(
            f"the experts of {name!r} are called {list(experts)}", f"{numbers}, as in Hugging Face PEFT", "rename them"
        )


def _leave(adapters: AdapterSet) -> None:
    """Takes our layers out of the model; the adapters themselves keep all that they know."""
    for place in list(adapters.places()):
        adapters.emptied(place)
    for path, saved in list(adapters.saved_modules()):
        adapters.put(path, saved.original_module)
    adapters.runner.leave()
    adapters.forget_configs()


def _made(peft: Any, base: nn.Module, adapters: AdapterSet, configs: Mapping[str, Any], wrapped: bool) -> Any:
    """The base with new adapters of PEFT in it.

    Raises:
        PeanutError: PEFT refuses one.
    """
    experts = {expert for config in adapters.configs.values() for expert in experts_of(config)}
    first, *others = [name for name in configs if name not in experts]  # a mixture brings its experts
    mixed = len({configs[name].peft_type for name in (first, *others)}) > 1
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
            if wrapped:
                made = peft.get_peft_model(base, configs[first], first, mixed=mixed)
                for name in others:
                    made.add_adapter(name, configs[name])
                return made
            for name in (first, *others):
                peft.inject_adapter_in_model(configs[name], base, name)
    except Exception as error:
        said = " ".join(str(error).split())
        raise PeanutError(f"Hugging Face PEFT refuses an adapter: {said}", "one that it can hold") from error
    if hasattr(type(base), "_hf_peft_config_loaded"):  # transformers' mark
        base.__dict__["_hf_peft_config_loaded"] = True
    return base


def _give_heads(places: list[Wrapped], name: str, heads: Mapping[str, nn.Module]) -> None:
    """Puts the modules that we train whole in the place of PEFT's copies of them."""
    from peft.utils.other import ModulesToSaveWrapper

    theirs = {
        place.path: wrapper.modules_to_save
        for place in places
        for wrapper in place.of(ModulesToSaveWrapper)
        if name in wrapper.modules_to_save
    }
    if theirs.keys() != heads.keys():
        raise PeanutError(
            f"adapter {name!r} trains {sorted(heads)} whole", f"{sorted(theirs)}, as PEFT", "keep it here"
        )
    for path, copies in theirs.items():
        copies[name] = heads[path]


def _give_over(base: nn.Module, places: list[Wrapped], name: str, given: _Given, apart: Mapping[str, Slot]) -> None:
    """Puts our tensors in the place of PEFT's: as they are, or, where files have another form, in that."""
    slots = by_our_keys({place.path: place.held(name) for place in places}, apart, given.own)
    at = {place.path: place.bare for place in places}
    if getattr(given.config, "bias", "none") != "none":
        for key in [key for key in given.own.keys() - slots.keys() if key.endswith(".bias")]:
            path = key.removesuffix(".bias").removesuffix(".base_layer")
            slots[key] = ((at.get(path) or base.get_submodule(path))._parameters, "bias")
    if given.config.peft_type == PeftType.ADALORA:  # once trained it holds fewer rows than it starts with
        for key, (owner, leaf) in slots.items():
            owner[leaf] = given.own[key]
    there = {id(given.own[key]) for key in slots if key in given.own}
    values = {
        key: value
        for key, value in given.own.items()
        if key in slots or not (key in given.optional or id(value) in there)  # tied layers: under the first
    }
    for key, (owner, leaf) in slots.items():
        if key in given.state and (key not in values or values[key].shape != owner[leaf].shape):
            values[key] = given.state[key]
    buffers = {key for key, (owner, leaf) in slots.items() if not isinstance(owner[leaf], nn.Parameter)}
    fill(slots, values, buffers, f"adapter {name!r}")


def _activate(made: Any, base: nn.Module, active: list[str], configs: Mapping[str, Any]) -> None:
    """Makes the same adapters active.

    Raises:
        PeanutError: several are, of a method of which PEFT has one at a time.
    """
    from peft import PeftMixedModel
    from peft.tuners.tuners_utils import set_adapter

    first = configs[active[0]]
    alone = first.is_prompt_learning or first.is_adaption_prompt or first.peft_type.value == "XLORA"
    if alone and len(active) > 1:
        raise PeanutError(f"adapters {active} are active", "one, as in Hugging Face PEFT", "call set_adapter(name)")
    if made is base:
        set_adapter(base, active)
    elif isinstance(made, PeftMixedModel):
        made.set_adapter(active)
    elif alone:
        if len(configs) > 1 and first.peft_type.value != "XLORA":
            made.set_adapter(active[0])
    else:
        made.base_model.set_adapter(active if len(active) > 1 else active[0])
        made.active_adapter = active[0]
