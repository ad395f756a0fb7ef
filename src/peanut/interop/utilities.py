"""Functions on models and folders that scripts of Hugging Face PEFT call by name."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from ..errors import PeanutError, check_keywords, nearest
from ..hub import HUB_OPTIONS
from ..model.adapters.adapter_set import AdapterSet
from ..model.checkpoints.base_weights import plain_path
from ..model.checkpoints.keys import KeyStyle, file_key
from ..model.checkpoints.stored_adapter import read_adapter
from ..model.injection import AdaptedModel
from ..model.keywords import LOADING
from ..model.layers.by_adapter import Factor
from ..protocols import PeftConfig

__all__ = [
    "LoraRuntimeConfig",
    "_freeze_adapter",
    "_get_batch_size",
    "_get_input_embeddings_name",
    "_get_submodules",
    "_is_valid_match",
    "cast_mixed_precision_params",
    "check_if_peft_model",
    "fsdp_auto_wrap_policy",
    "get_base_model_state_dict",
    "id_tensor_storage",
    "infer_device",
    "load_peft_weights",
    "set_base_model_state_dict",
    "shift_tokens_right",
    "transpose",
    "update_forward_signature",
    "update_generate_signature",
    "update_signature",
]


@dataclass
class LoraRuntimeConfig:
    """What LoRA may do while it runs: nothing but the default here, where DoRA needs no help of a GPU to start."""

    ephemeral_gpu_offload: bool = False

    def __post_init__(self) -> None:
        if self.ephemeral_gpu_offload:
            raise PeanutError("ephemeral_gpu_offload=True", "False", "leave it out: tensors follow the base's device")


# Files and state dicts


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: str | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hub: Any,
) -> dict[str, Tensor]:
    """The tensors of an adapter's folder by the keys that ``set_peft_model_state_dict`` takes.

    Raises:
        PeanutError: the folder cannot be read.
    """
    hub = check_keywords("load_peft_weights", hub, HUB_OPTIONS, LOADING)
    stored = read_adapter(model_id, key_mapping=key_mapping, **hub)
    style, target = KeyStyle.of(stored.config), torch.device(device or infer_device())
    return {file_key(key, style): value.to(target) for key, value in stored.state.items()}


def check_if_peft_model(model_name_or_path: str | os.PathLike[str]) -> bool:
    """Whether a folder, or a repository on the hub, is an adapter's."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except PeanutError:
        return False
    return True


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The base's tensors by the keys that they have without adapters."""
    adapters = AdapterSet.of(model)
    own = {id(value) for name in adapters.configs for _, value in adapters.parameters(name)}
    held = adapters.model.state_dict(keep_vars=True)
    return {plain_path(key): value.detach() for key, value in held.items() if id(value) not in own}


@torch.no_grad()
def set_base_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True
) -> _IncompatibleKeys:
    """Copies the base's tensors, by the keys that they have without adapters, into a model with adapters.

    Raises:
        PeanutError: a key is missing or unexpected (with ``strict``), or a shape differs; nothing is then copied.
    """
    adapters, own = AdapterSet.of(model), get_base_model_state_dict(model)
    missing, unexpected = [sorted(a - b) for a, b in ((own.keys(), state_dict.keys()), (state_dict.keys(), own.keys()))]
    if strict and (missing or unexpected):
        wrong = missing[0] if missing else unexpected[0]
        raise PeanutError(
            f"the state dict lacks {len(missing)} keys and has {len(unexpected)} unexpected ones ('{wrong}')",
            f"the {len(own)} of {type(adapters.model).__name__}",
            f"pass strict=False, or rename them (nearest: {nearest(wrong, state_dict if missing else own, 1)})",
        )
    for key in own.keys() & state_dict.keys():
        if own[key].shape != state_dict[key].shape:
            raise PeanutError(
                f"'{key}' of shape {tuple(state_dict[key].shape)}", f"{tuple(own[key].shape)}", "use that base's"
            )
    with adapters.state.changing():
        for key in own.keys() & state_dict.keys():
            own[key].copy_(state_dict[key].to(own[key].device))
    return _IncompatibleKeys(missing, unexpected)


# Preparing a model


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Puts what is frozen into ``dtype`` and what is trained into float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def fsdp_auto_wrap_policy(model: nn.Module) -> Any:
    """FSDP's policy: transformer blocks, and leaves that are trained, are units of their own.

    Adapters' tensors stay with the layers that read them, so FSDP's first version needs ``use_orig_params=True``.
    """
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", ",".join(getattr(model, "_no_split_modules", None) or ()))
    wanted = set(filter(None, named.split(",")))
    blocks = {type(module) for module in model.modules() if type(module).__name__ in wanted}
    if missing := wanted - {kind.__name__ for kind in blocks}:
        raise PeanutError(
            f"no module of class {min(missing)!r}", "a class of block", "set FSDP_TRANSFORMER_CLS_TO_WRAP"
        )

    def trained(module: nn.Module) -> bool:
        weight = None if isinstance(module, Factor) else getattr(module, "weight", None)
        return not list(module.named_children()) and weight is not None and weight.requires_grad

    leaves = partial(lambda_auto_wrap_policy, lambda_fn=trained)
    return partial(_or_policy, policies=[leaves, partial(transformer_auto_wrap_policy, transformer_layer_cls=blocks)])


def update_signature(model: nn.Module, method: str = "all") -> None:
    """Nothing to do: a model here shows the parameters of its base's ``forward`` already.

    Raises:
        PeanutError: ``method`` is none of "forward", "generate" and "all".
    """
    if method not in ("forward", "generate", "all"):
        raise PeanutError(f"method={method!r}", "'forward', 'generate' or 'all'", "name one of them")
    if method != "forward":
        update_generate_signature(model)


def update_forward_signature(model: nn.Module) -> None:
    """Nothing to do: a model here shows the parameters of its base's ``forward`` already."""


def update_generate_signature(model: nn.Module) -> None:
    """Lets ``model.generate`` show the signature and the documentation of its base's."""
    base: Any = AdapterSet.of(model).model
    if not hasattr(base, "generate"):
        return
    own: Any = type(model).generate  # type: ignore[attr-defined]

    @functools.wraps(type(base).generate)
    def shown(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    model.__dict__["generate"] = MethodType(shown, model)


# Small ones


def infer_device() -> str:
    """The kind of accelerator that there is, else "cpu"."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else found.type


def shift_tokens_right(input_ids: Tensor, pad_token_id: int, decoder_start_token_id: int) -> Tensor:
    """Labels (batch, tokens) as a decoder's input: one place to the right, -100 as padding."""
    shifted = input_ids.roll(1, dims=-1)
    shifted[:, 0] = decoder_start_token_id
    return shifted.masked_fill(shifted == -100, pad_token_id)


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """Wᵀ where a layer stores it so."""
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """What tells whether two tensors are one storage: device, address, bytes."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """A module's parent, the module itself, and its name there."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def _get_batch_size(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
    given = inputs_embeds if input_ids is None else input_ids
    if given is None:
        raise PeanutError("neither input_ids nor inputs_embeds", "one of them", "give one")
    return len(given)


def _get_input_embeddings_name(model: nn.Module, default: str | None = None) -> str | None:
    """The path of the input embeddings."""
    base = model.model if isinstance(model, AdaptedModel) else model
    embeddings = base.get_input_embeddings() if hasattr(base, "get_input_embeddings") else None  # type: ignore[operator]
    return next((name for name, module in base.named_modules() if module is embeddings), default)


def _is_valid_match(key: str, target_key: str) -> bool:
    """Whether a path ends in a name, at a dot."""
    return f".{key}".endswith(f".{target_key}")


def _freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    for _, value in AdapterSet.of(model).parameters(adapter_name):
        value.requires_grad_(False)
