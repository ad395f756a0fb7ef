"""Plain state dicts of Hugging Face PEFT, as ``model.state_dict()`` gives them there: their keys become ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...errors import PeanutError
from .by_adapter import ByAdapter
from .mirrored import Mirrored

if TYPE_CHECKING:
    from .live import Live

__all__ = ["layer_keys", "output_keys", "prompt_keys", "tuner_keys"]

State = dict[str, Any]

_START = "start_A", "start_B"


def layer_keys(place: Live, state: State, prefix: str) -> None:
    """Renames the keys of one place, ``prefix`` before them, and removes what is there twice.

    Raises:
        PeanutError: the state dict lacks what no config tells, or has it in a form that cannot be taken over.
    """
    tokens = f"{prefix}token_adapter."
    _renamed(state, f"{tokens}base_layer.", f"{prefix}base_layer.")
    for name, own in place.adapters.items():
        held = [*own.suffixes, *(suffix for shared in place._shared[name] for suffix in shared.suffixes)]
        for suffix in held:  # what several places share is in the first alone
            *outer, last = suffix.split(".")
            holder: Any = place._modules.get("token_adapter") if outer == ["token_adapter"] else place
            home = None if holder is None else holder._modules.get(last)
            bare = outer in ([], ["token_adapter"])
            if bare and not (isinstance(home, ByAdapter) and name in home):
                state.pop(f"{prefix}{suffix}.{name}", None)
            if isinstance(own, Mirrored):  # a head's, which are its embedding's
                state.pop(f"{prefix}{'.'.join([*outer, name, last])}", None)
        _bias(place, name, state, prefix)
        _ranks(place, name, state, prefix)
        _chosen(place, name, state, prefix)
        _residual(place, name, state, prefix)


def _bias(place: Live, name: str, state: State, prefix: str) -> None:
    """A bias that is trained is the layer's own there, also of layers with no adapter; here the layer keeps its own."""
    key = f"{prefix}trained_bias.{name}"
    if not {"bias", "base_layer.bias"} & set(place.adapters[name].suffixes) or key in state:
        return
    for leaf in ("weight", "bias"):
        _renamed(state, f"{prefix}{leaf}", f"{prefix}base_layer.{leaf}")
    if f"{prefix}base_layer.bias" in state:
        own: Any = place
        state[key], state[f"{prefix}base_layer.bias"] = state[f"{prefix}base_layer.bias"], own.base_layer.bias


def _ranks(place: Live, name: str, state: State, prefix: str) -> None:
    """AdaLoRA: its file has the rank for the scaling, which the config tells, and no statistics of its schedule."""
    rank = state.pop(f"{prefix}ranknum.{name}", None)
    if rank is None:
        return
    method, config = place.method_of(name)
    if int(rank) != config.init_r:
        raise PeanutError(
            f"'{place.path}' of rank {int(rank)} in the state dict", f"init_r={config.init_r}", "use its own config"
        )
    for suffix in method.passing(config):
        state.setdefault(f"{prefix}{suffix}.{name}", place.values(name)[suffix])


def _chosen(place: Live, name: str, state: State, prefix: str) -> None:
    """SHiRA: its places are in no plain state dict, so they have to be those that the config's seed draws."""
    key = f"{prefix}shira_indices.{name}"
    if f"{prefix}shira_weight.{name}" not in state or key in state:
        return
    if place.method_of(name)[1].random_seed is None:
        raise PeanutError(
            f"the state dict has no '{key}', and the config no random_seed",
            "the places of SHiRA's numbers",
            "load the folder that save_pretrained wrote, or give both configs one random_seed",
        )
    state[key] = place.values(name)["shira_indices"]


def _residual(place: Live, name: str, state: State, prefix: str) -> None:
    """PiSSA, MiLoRA, OLoRA: the base of the state dict may be the weight less its part s·B₀A₀; here it stays whole.

    Raises:
        PeanutError: it is neither that nor this model's own weight.
    """
    key = f"{prefix}base_layer.weight"
    if _START[0] not in place.adapters[name].suffixes or key not in state:
        return
    whole, part = _whole_and_part(place, name)
    given = state[key].to(whole)
    if given.shape != whole.shape:
        return
    off = (1e-5 + 2 * torch.finfo(state[key].dtype).eps) * whole.abs().max()
    from_whole, from_rest = ((given - other).abs().max() for other in (whole, whole - part))
    if from_whole <= min(off, from_rest):  # this model's own, perhaps rounded
        return
    if from_rest > off:
        raise PeanutError(
            f"another base weight at '{place.path}' in the state dict than the adapter here started in",
            "the weight of this base, or what Hugging Face PEFT leaves of it",
            "build the model on the base that the other one was built on, or load what save_pretrained wrote",
        )
    state[key] = whole.to(state[key])


def _whole_and_part(place: Live, name: str) -> tuple[Tensor, Tensor]:
    layer: Any = place
    frozen = layer.frozen
    weight: Tensor = frozen.weight.detach()
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    A, B = (place.values(name)[suffix].flatten(1).to(weight) for suffix in _START)
    part: Tensor = frozen.kind.layout(frozen.module, layer.method_of(name)[1].scaling * (B @ A))
    return weight, part


def output_keys(place: Live, state: State, prefix: str) -> None:
    """Renames the keys of the adapters of a module's output, ``prefix`` before that module's own.

    Hugging Face PEFT has another module around it, which holds the active adapter's tensors.
    """
    for name, own in place.adapters.items():
        bare = [suffix for suffix in own.suffixes if f"{prefix}{suffix}" in state]
        for suffix in bare:
            state[f"{prefix}adapted_output.{suffix}.{name}"] = state.pop(f"{prefix}{suffix}")
        if bare:
            _renamed(state, f"{prefix}model.", prefix)


def tuner_keys(place: Live, state: State, prefix: str) -> None:
    """Renames the keys that stand beside the model, ``prefix`` before them: of a mixture, and of what layers share.

    The first layer has what they share; a mixture's experts are in another module there.
    """
    for name, bank in place.banks.items():
        for suffix in bank.suffixes:
            state.pop(f"{prefix}{suffix}.{name}", None)
    if getattr(place, "name", "") == "adapted_mixture":
        _renamed(state, f"{prefix}lora_model.", prefix)
        for name in place.adapters:
            gates = "internal_xlora_classifier."
            _renamed(state, f"{prefix}{gates}", f"{prefix}model.adapted_mixture.{gates}{name}.")


def prompt_keys(base: nn.Module, state: State, prefix: str) -> None:
    """Renames the keys of a model with prompts: there the base has no module around it, and prompts stand beside it.

    Raises:
        PeanutError: they are of no adapter here.
    """
    inner = f"{prefix}base_model."
    prompts = [key for key in state if key.startswith(f"{prefix}prompt_encoder.")]
    if not prompts:
        return
    place: Any = base._modules.get("adapted_input")
    for key in [key for key in state if key.startswith(f"{prefix}word_embeddings.")]:
        del state[key]  # the base's own, once more
    _renamed(state, inner, f"{inner}model.")
    for key in prompts:
        name, _, suffix = key.removeprefix(f"{prefix}prompt_encoder.").partition(".")
        held = () if place is None or name not in place.adapters else place.adapters[name].suffixes
        if "prompt_embeddings" in held and suffix == "embedding.weight":
            suffix = "prompt_embeddings"
        if suffix not in held:
            raise PeanutError(
                f"the state dict has '{key}'",
                f"tensors of the prompts here ({', '.join(held) or f'there is no prompt {name!r}'})",
                "build the model from the other one's config, as it was trained: inference_mode too",
            )
        owner, leaf = place.adapters[name].places[suffix]
        value = state.pop(key)
        if suffix in place.method_of(name)[0].rebuilt(place.method_of(name)[1]):
            with torch.no_grad():
                owner[leaf].copy_(value)  # no state dict of ours has it
            continue
        first, _, rest = suffix.partition(".")
        state[f"{inner}model.adapted_input.{first}.{name}{rest and f'.{rest}'}"] = value


def _renamed(state: State, old: str, new: str) -> None:
    for key in [key for key in state if key.startswith(old)]:
        state[f"{new}{key.removeprefix(old)}"] = state.pop(key)
