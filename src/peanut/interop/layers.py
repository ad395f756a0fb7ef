"""Finds the adapted layers of a Hugging Face PEFT model (below: PEFT) and the tensors of their adapters."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..errors import PeanutError, nearest
from ..identity import Recognised
from ..model.adapters.adapter_set import AdapterSet
from ..model.adapters.surgery import SHARED, key_of
from ..model.checkpoints.checkpoint import parts_of
from ..model.layers.mirrored import Mirrored
from ..protocols import PeftConfig, PeftType, method_of

__all__ = [
    "Slot",
    "Wrapped",
    "beside",
    "by_our_keys",
    "check_alike",
    "fill",
    "made_anew",
    "our_slots",
    "peft_package",
    "wrapped_in",
]

Slot = tuple[dict[str, Any], str]
"""Where a tensor is stored: a dictionary of a module's, and the key in it."""

_NOT_STORED = {"ranknum", "trainable_tokens_original"}
"""Tensors of PEFT's layers that its files leave out: they follow from others."""
_RENAMED = {"lora_magnitude_vector.weight": "lora_magnitude_vector", "indices": "fourierft_places"}
"""Tensors of its layers that have other names in files, or here."""


def peft_package(loaded: bool = False) -> Any:
    """The package ``peft``.

    Args:
        loaded: whether it must have been imported already, as it has where there is a live model of it.

    Raises:
        PeanutError: it is not there.
    """
    if loaded and "peft" not in sys.modules:
        return None
    try:
        return import_module("peft")
    except ImportError as error:
        raise PeanutError("the package peft is not installed", "Hugging Face PEFT", "pip install peft") from error


@dataclass(frozen=True)
class Wrapped:
    """A module of the base with layers of PEFT around it.

    Args:
        path: where in the base.
        parent: the module that holds it.
        layers: PEFT's layers, from the outside to the inside.
        bare: the base's own module.
    """

    path: str
    parent: nn.Module
    layers: tuple[nn.Module, ...]
    bare: nn.Module

    def of(self, *kinds: type) -> list[Any]:
        """Those of the layers that are of certain classes."""
        return [layer for layer in self.layers if isinstance(layer, kinds)]

    def holds(self, layer: nn.Module, name: str) -> bool:
        """Whether one of the layers holds something of adapter ``name``."""
        return bool(Wrapped(self.path, self.parent, (layer,), self.bare).held(name))

    def put(self, module: nn.Module) -> None:
        """Puts another module in their place."""
        self.parent._modules[self.path.rpartition(".")[2]] = module

    def held(self, name: str) -> dict[str, Slot]:
        """What the layers hold of adapter ``name``, by the suffix under which files keep it."""
        from peft.tuners.adaption_prompt.layer import _BaseAdaptedAttention
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import TrainableTokensWrapper

        found: dict[str, Slot] = {}
        for layer in self.layers:
            if isinstance(layer, _BaseAdaptedAttention):  # of the one active adapter
                found |= {suffix: (layer._parameters, suffix) for suffix in layer._parameters}
            elif isinstance(layer, TrainableTokensWrapper):
                inner = _held(layer.token_adapter, name)
                found |= {f"token_adapter.{suffix}": slot for suffix, slot in inner.items()}
            elif isinstance(layer, BaseTunerLayer):
                found |= _held(layer, name)
        return found


def wrapped_in(base: nn.Module) -> list[Wrapped]:
    """Every place of a base model where layers of PEFT are, in the model's order."""
    found: list[Wrapped] = []

    def visit(parent: nn.Module, path: str) -> None:
        for name, child in parent._modules.items():
            if child is None:
                continue
            inside, layers, bare = f"{path}.{name}" if path else name, [], child
            while (under := _under(bare)) is not None:
                layers.append(bare)
                bare = under
            if layers:
                found.append(Wrapped(inside, parent, tuple(layers), bare))
            attention = bool(layers) and isinstance(bare, nn.MultiheadAttention)
            visit(bare, f"{inside}.base_layer" if attention else inside)  # as files call its output projection

    visit(base, "")
    return found


def beside(model: Any, name: str) -> dict[str, Slot]:
    """What PEFT's wrapper holds of adapter ``name`` that belongs to no layer, by suffix: a prompt, or gates."""
    encoder: Any = getattr(model, "prompt_encoder", {})
    gate: Any = getattr(getattr(model, "base_model", None), "internal_xlora_classifier", None)
    holders: list[tuple[str, nn.Module]] = []
    if name in encoder:
        holders = list(encoder[name].named_modules())
    elif gate is not None and name in model.peft_config:
        holders = list(gate.named_modules(prefix="internal_xlora_classifier"))
    return {
        f"{path}.{leaf}" if path else leaf: (module._parameters, leaf)
        for path, module in holders
        for leaf in module._parameters
        if module._parameters[leaf] is not None
    }


def check_alike(path: str, layer: nn.Module, config: PeftConfig) -> None:
    """Refuses an adapter on a layer where PEFT's method computes something else than ours.

    On convolutions its OFT is no identity at the start, and others forget dilation and kinds of padding; trained
    tokens on a linear layer forget its bias.
    """
    kind = config.peft_type
    padded = isinstance(layer, _ConvNd) and layer.padding_mode != "zeros"
    apart = isinstance(layer, _ConvNd) and set(layer.dilation) != {1}
    other = (isinstance(layer, _ConvNd) and kind == PeftType.OFT) or (padded and kind != PeftType.IA3)
    other = other or (apart and kind not in (PeftType.IA3, PeftType.LOKR))
    if other or (kind == PeftType.TRAINABLE_TOKENS and isinstance(layer, nn.Linear) and layer.bias is not None):
        raise PeanutError(
            f"on '{path}', {layer}, {method_of(kind).name} of Hugging Face PEFT computes something else than ours",
            "a layer on which both agree",
            "train that adapter where it was begun",
        )


def by_our_keys(
    held: Mapping[str, Mapping[str, Slot]], apart: Mapping[str, Slot], own: Collection[str]
) -> dict[str, Slot]:
    """PEFT's slots by the keys that we give them.

    Args:
        held: those of its layers, by path and suffix.
        apart: those that belong to no layer, by suffix.
        own: our keys: what layers share has one of its own, and so has a prompt that no network writes.
    """
    found: dict[str, Slot] = {}
    for path, slots in held.items():
        for suffix, slot in slots.items():
            shared = key_of(SHARED, suffix)
            found[shared if shared in own else key_of(path, suffix)] = slot
    for suffix, slot in apart.items():
        key, prompt = key_of(SHARED, suffix), key_of(SHARED, "prompt_embeddings")
        key = prompt if key not in own and suffix == "embedding.weight" else key
        if key in own:  # what else a prompt that is only used has there is not read
            found[key] = slot
    return found


def our_slots(adapters: AdapterSet, name: str) -> dict[str, Slot]:
    """Where we keep the tensors of an adapter, by key: all but those of modules that are trained whole."""
    holders = [(place.path, place.adapters[name]) for place in adapters.places(name)]
    holders = [(path, own) for path, own in holders if not isinstance(own, Mirrored)]
    bank = adapters.bank(name)
    return {
        key_of(path, suffix): slot
        for path, parameters in [*holders, *([(SHARED, bank)] if bank is not None else [])]
        for suffix, slot in parameters.places.items()
    }


def made_anew(adapters: AdapterSet, name: str) -> set[str]:
    """The keys of those of an adapter's tensors that we make again, or need for training alone."""
    return {
        key_of(path, suffix)
        for method, config, paths in parts_of(adapters, name)
        for path in paths
        for suffix in method.rebuilt(config) | method.passing(config)
    }


def fill(slots: Mapping[str, Slot], values: Mapping[str, Tensor], optional: Collection[str], source: str) -> None:
    """Puts tensors where they are stored: parameters as the very objects that they are.

    Args:
        slots: where, by key.
        values: the tensors by key.
        optional: keys that may be missing; one of another shape is then left as it is.
        source: what they are of, for messages.

    Raises:
        PeanutError: a tensor is missing or unexpected, or has another shape. Nothing is then put anywhere.
    """
    places = {key: (id(owner), leaf) for key, (owner, leaf) in slots.items()}
    filled = {places[key] for key in values if key in places}  # tied layers share a place
    missing = sorted(key for key in slots if places[key] not in filled and key not in optional)
    unexpected = sorted(values.keys() - slots.keys())
    if missing or unexpected:
        key, there = (missing[0], values) if missing else (unexpected[0], slots)
        raise PeanutError(
            f"{source} {'lacks' if missing else 'holds'} {key}",
            f"the {len(slots)} tensors of its config",
            f"nearest: {nearest(key, there, 1)}",
        )
    chosen = {key: value for key, value in values.items() if value.shape == slots[key][0][slots[key][1]].shape}
    for key in values.keys() - chosen.keys() - set(optional):
        owner, leaf = slots[key]
        raise PeanutError(f"{source} holds {key} of shape {tuple(values[key].shape)}", f"{tuple(owner[leaf].shape)}")
    for key, new in chosen.items():
        owner, leaf = slots[key]
        if not isinstance(owner[leaf], nn.Parameter):
            owner[leaf] = new.detach()
        elif isinstance(new, nn.Parameter):
            owner[leaf] = new
        else:
            owner[leaf] = nn.Parameter(new.detach(), requires_grad=owner[leaf].requires_grad)


def _under(module: Any) -> Any:
    """The module under a layer of PEFT, ``None`` if it is none."""
    from peft.tuners.adaption_prompt.layer import _BaseAdaptedAttention
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(module, Recognised):  # one of ours
        return None
    if isinstance(module, AuxiliaryTrainingWrapper):
        return module.original_module
    if isinstance(module, BaseTunerLayer):
        return cast(Any, module).base_layer
    return module.model if isinstance(module, _BaseAdaptedAttention) else None


def _held(layer: Any, name: str) -> dict[str, Slot]:
    """A layer's tensors of adapter ``name``: in its dictionaries the adapter's name comes first."""
    found: dict[str, Slot] = {}
    for attribute, holder in layer._modules.items():
        if attribute == "base_layer" or holder is None:
            continue
        for prefix, module in holder.named_modules():
            passing = module._non_persistent_buffers_set if prefix else ()
            for owner in (module._parameters, module._buffers):
                for leaf, value in owner.items():
                    first, *rest = [*prefix.split("."), leaf] if prefix else [leaf]
                    if value is not None and first == name and leaf not in passing:
                        found[".".join([attribute, *rest])] = (owner, leaf)
    for attribute in layer.other_param_names:  # places of SHiRA and FourierFT are in plain dictionaries
        holder = getattr(layer, attribute, None)
        if type(holder) is dict and isinstance(holder.get(name), Tensor):
            found[attribute] = (holder, name)
    return {_RENAMED.get(suffix, suffix): slot for suffix, slot in found.items() if suffix not in _NOT_STORED}
