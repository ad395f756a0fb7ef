"""Adds an adapter to a model, one function for each kind of method."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from ...errors import PeanutError, nearest
from ...protocols import InputMethod, Method, MixtureMethod, OutputMethod, PeftConfig, WeightMethod, method_of
from ...protocols.patterns import OUT_PROJECTION, pattern_of_none
from ...weights.readable import check_layer
from ...weights.stored import check_by_layer, some_tensor, stored
from ..layers.input import AdaptedInput, AdaptedMixture
from ..layers.layer import AdaptedLayer
from ..layers.parameters import Parameters
from ..prompts.prefix import takes_prefix
from ..targets.matching import biased_paths, saved_paths, target_paths
from ..targets.paths import bare, modules_by_path, starts
from ..targets.places import sites
from ..targets.shape import reading_stack, shape_of
from ..targets.ties import are_to_be_tied, one_weight, tied_to
from .aliases import warn_of_aliases
from .starting import New, Target, naming
from .surgery import Surgery
from .tying import named_apart, seen_from, source_of

__all__ = ["put"]


def put(on: Surgery, new: New, method: Method[Any], config: PeftConfig, given: PeftConfig) -> PeftConfig:
    """Puts a new adapter where its method acts; returns its config, with the model's sizes filled in."""
    if isinstance(method, WeightMethod):
        _add_changes(on, new, method, config, given)
    elif isinstance(method, OutputMethod):
        _add_outputs(on, new, method, config)
    elif isinstance(method, InputMethod):
        return _add_input(on, new, method, config)
    elif isinstance(method, MixtureMethod):
        return _add_mixture(on, new, method, config)
    return config


def _add_changes(on: Surgery, new: New, method: WeightMethod[Any], config: PeftConfig, given: PeftConfig) -> None:
    """Puts an adapter into the layers whose weight it changes; ``given`` is its config as the user gave it."""
    check_by_layer(on.model)
    targets = _planned(on, config, method)
    if not config.inference_mode:  # a file may name layers that its writer never had
        _check_patterns(given, [target.path for target in targets])
    frozen = [target.frozen for target in targets if target.method == method]
    bank = Parameters({})
    if frozen:
        bank = new.tensors(method, config, "", frozen[0].beside, partial(method.shared, config, frozen))
    # Tied layers that follow each other have one set of tensors, others, tied or not, each their own. All are made
    # before the first layer is touched.
    sources = [source_of(target, targets) for target in targets]
    made: dict[int, Parameters] = {}
    by_signature: dict[Any, dict[str, torch.Tensor]] = {}
    for source in sources:
        if id(source) not in made:
            made[id(source)] = new.in_layer(source, by_signature)
    given_to = {
        target.path: seen_from(target, source, made[id(source)])
        for target, source in zip(targets, sources, strict=True)
    }
    for target in targets:
        _check_reads(target, {**given_to[target.path].values_by_suffix(), **bank.values_by_suffix()})
    warn_of_aliases(on.model, {_found(target.path): target.frozen.module for target in targets})
    holder = next((target for target in targets if target.method == method), None)
    for target in targets:
        shared = bank if bank.suffixes and target.method == method else None
        layer = on.wrapped(target.path)
        layer.add(new.name, target.method, target.config, given_to[target.path], shared, holds=target is holder)


def _found(path: str) -> str:
    """Where a layer is before it is adapted."""
    return path.replace(OUT_PROJECTION, ".out_proj")


@torch.no_grad()
def _check_reads(target: Target, values: dict[str, torch.Tensor]) -> None:
    """Refuses a method that reads the weight of a layer whose weight cannot be read.

    Raises:
        PeanutError: it does, there.
    """
    if target.frozen.unreadable(target.frozen.weight) is not None:
        with naming(f"{target.method.name} at '{target.path}'"):
            target.method.change(target.config, values, target.frozen)


def _planned(on: Surgery, config: PeftConfig, method: WeightMethod[Any]) -> list[Target]:
    """Every layer that an adapter with ``config`` changes, with the method that does.

    Raises:
        PeanutError: the config does not fit a layer, or two methods of the adapter want one layer.
    """
    planned: dict[str, Target] = {}
    wanted_by: dict[str, PeftConfig] = {}
    modules = modules_by_path(on.model)
    parts = [(method, config), *method.companions(config)]
    named = [target_paths(on.model, own, part) for part, own in parts]
    apart = named_apart(on.model, config, parts, named)
    whole = frozenset(saved_paths(on.model, config) if len(parts) > 1 else ())
    for (part, own), paths in zip(parts, named, strict=True):
        for path in paths:
            attention = isinstance(bare(on.at(path)), nn.MultiheadAttention)
            tied: list[str] = []
            if part.follows_ties:
                tied = [each for each in one_weight(modules, path) if path not in apart or apart.get(each) is own]
            elif part is method and are_to_be_tied(config) and not attention:
                tied = tied_to(on.model, modules, path)
            for place in [path, *([path + OUT_PROJECTION] if attention else ()), *tied]:
                if not whole.isdisjoint(starts(place)):
                    raise PeanutError(
                        f"'{place}' is trained whole (modules_to_save) and by {part.name} in one adapter",
                        "one of the two",
                        "take it out of one of them",
                    )
                if wanted_by.setdefault(place, own) is not own:
                    raise PeanutError(
                        f"'{place}' is a target of {planned[place].method.name} and of {part.name} in one adapter",
                        "one method for a layer",
                        "take it out of one of them, or use two adapters",
                    )
                resolved = own.for_layer(place)
                frozen = on.frozen(place)
                with naming(f"'{place}'"):
                    check_layer(frozen.module)
                part.check(resolved, frozen, place)
                planned[place] = Target(place, frozen, part, resolved, bool(tied))
    if getattr(config, "bias", "none") == "all":
        biases = method_of("BITFIT")
        assert isinstance(biases, WeightMethod)
        for path in biased_paths(on.model, config, biases):
            if path not in planned:
                planned[path] = Target(path, on.frozen(path), biases, biases.config_class(target_modules=[path]))
    return list(planned.values())


def _check_patterns(config: PeftConfig, paths: list[str]) -> None:
    """Refuses a pattern (of ranks, of feed-forward layers) that is for none of the adapted layers."""
    for field, patterns in config.patterns().items():
        pattern = pattern_of_none(patterns, paths)
        if pattern is not None:
            names = {path.rpartition(".")[2] for path in paths}
            raise PeanutError(
                f"{field} names {pattern!r}, which none of the {len(paths)} adapted layers is called",
                "names or regular expressions of adapted layers",
                f"nearest: {nearest(pattern, names)}",
            )


def _add_outputs(on: Surgery, new: New, method: OutputMethod[Any], config: PeftConfig) -> None:
    """Puts an adapter behind the modules whose output it changes."""
    check_by_layer(on.model)
    found, made = sites(on.model, config, method), []
    for site in found:
        resolved = config.for_layer(site.path)
        method.check(resolved, site)
        beside = some_tensor(site.module)
        if beside is None:
            raise PeanutError(f"'{site.path}', a {type(site.module).__name__}, has no weights", "a module with weights")
        start = partial(method.start, resolved, site)
        made.append((resolved, new.tensors(method, resolved, site.path, beside, start)))
    for site, (resolved, parameters) in zip(found, made, strict=True):
        on.output(site.path).put(new.name, method, resolved, parameters, on.listener(site.path, site.source))


def _add_input(on: Surgery, new: New, method: InputMethod[Any], config: PeftConfig) -> PeftConfig:
    """Puts an adapter before the model; returns its config with the model's sizes filled in."""
    shape = shape_of(on.model)
    fitted: PeftConfig = method.fitted(config, shape)
    stack = reading_stack(on.model)
    if method.prepends == "keys_values":
        backbone = on.model.get_decoder() if shape.encoder_decoder else stack.base_model  # type: ignore[operator]
        if not takes_prefix(backbone):
            raise PeanutError(
                f"{type(backbone).__name__}, some of whose layers are never given keys and values of earlier tokens",
                "a model that can be: a language model, BERT, RoBERTa, T5",
                "use prompt tuning or P-tuning",
            )
    beside: Any = stored(stack.get_input_embeddings(), "weight")
    made = new.tensors(method, fitted, "", beside, partial(method.start, fitted, shape))
    on.holder(AdaptedInput).add(new.name, method, fitted, made)
    return fitted


def _add_mixture(on: Surgery, new: New, method: MixtureMethod[Any], config: PeftConfig) -> PeftConfig:
    """Puts a gate over adapters that are in the model; returns its config with the model's sizes filled in.

    Raises:
        PeanutError: an expert is not there, or does more than add to weights.
    """
    experts = on.known(list(method.experts(config)))
    for expert in experts:
        own = on.method(expert)
        if not isinstance(own, WeightMethod):
            raise PeanutError(
                f"expert {expert!r} is a {own.name} adapter, which changes no weight",
                "adapters that add to weights, as LoRA does",
                "leave it out of the mixture",
            )
    layers = [layer for _, layer in on.layers() if any(expert in layer.adapters for expert in experts)]
    for layer in layers:
        for expert in experts:
            if expert in layer.adapters:
                _check_expert(layer, expert)
    stack = reading_stack(on.model)
    if stack is not on.model:
        raise PeanutError(
            f"a mixture on {type(on.model).__name__}, an encoder and a decoder", "one stack", "use another method"
        )
    settings = stack.config.get_text_config(decoder=True)
    beside: Any = stored(stack.get_input_embeddings(), "weight")
    fitted: PeftConfig = method.fitted(config, settings.hidden_size)
    start = partial(method.start, fitted, settings.hidden_size, len(experts), len(layers))
    mixture = on.holder(AdaptedMixture)
    mixture.layers[new.name] = [layer.path for layer in layers]
    mixture.add(new.name, method, fitted, new.tensors(method, fitted, "", beside, start))
    return fitted


@torch.no_grad()
def _check_expert(layer: AdaptedLayer, expert: str) -> None:
    change = layer.change(expert)
    if not change.adds or change.shift is not None or not layer.frozen.kind.multiplies:
        raise PeanutError(
            f"expert {expert!r} does more at '{layer.path}' than to add a product to the output (it scales or rotates "
            "it, or trains a bias)",
            "adapters that only add to weights, as LoRA does",
            "leave it out of the mixture",
        )
