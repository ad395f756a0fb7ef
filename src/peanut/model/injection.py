"""Adds adapters to a model in place (without ``PeftModel``), and reads and writes their state dicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from ..errors import PeanutError
from ..protocols import PeftConfig
from .adapters.adapter_set import AdapterSet, experts_of
from .adapters.surgery import SHARED
from .checkpoints.checkpoint import adapter_state, base_state
from .checkpoints.embeddings import SaveEmbeddings, saved_embeddings
from .checkpoints.keys import KeyStyle, file_key, plain_key
from .checkpoints.loading import load_state
from .checkpoints.mixtures import add, name_for
from .checkpoints.stored_adapter import StoredAdapter
from .checkpoints.tensor_files import refuse_not_finite
from .targets.reach import warn_of_unreached

__all__ = [
    "AdaptedModel",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "penalty",
    "set_peft_model_state_dict",
]


class AdaptedModel(nn.Module):
    """A base model (``.model``, changed in place) with adapters in it.

    Args:
        config: the adapter's config, or several by name.
        adapter_name: name of the adapter, if ``config`` is one.
        low_cpu_mem_usage: leave the adapter's parameters without storage, to be filled by ``state_dict`` or by loading.
        state_dict: the adapter's tensors, by the keys that its file has.
    """

    method: ClassVar[str | None] = None
    also: ClassVar[str | None] = None
    """Another method that the config class of this one may stand for."""

    def __init__(
        self,
        model: nn.Module,
        config: PeftConfig | Mapping[str, PeftConfig],
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        configs = {adapter_name: config} if isinstance(config, PeftConfig) else dict(config)
        for name, own in configs.items():
            if self.method is not None and own.peft_type not in (self.method, self.also):
                raise PeanutError(
                    f"{type(own).__name__} given to {type(self).__name__}",
                    f"a config of {self.method}",
                    "use get_peft_model, which takes any",
                )
            inject_adapter_in_model(own, model, name, low_cpu_mem_usage, state_dict)

    @property
    def adapters(self) -> AdapterSet:
        """The adapters in the model."""
        return AdapterSet.of(self.model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or name.startswith("__"):  # how the wrapper itself is copied
                raise
            return getattr(self.model, name)


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Puts an adapter into a model, freezes the rest, and returns the model itself; arguments: see ``AdaptedModel``."""
    adapters = AdapterSet.of(model)
    adapter_name = name_for(adapters, peft_config, adapter_name)
    peft_config = add(adapters, adapter_name, peft_config, meta=low_cpu_mem_usage)
    model.requires_grad_(False)
    experts = experts_of(peft_config)  # these act through the mixture
    others = [name for name in adapters.state.active if name not in experts]
    adapters.activate([*others, adapter_name], trainable=not peft_config.inference_mode)
    if state_dict is not None:
        set_peft_model_state_dict(model, state_dict, adapter_name)
    warn_of_unreached(model, peft_config)
    return model


def penalty(model: nn.Module) -> Tensor | None:
    """What the active adapters add to the loss in training, for a model that returns no loss; else it is in it."""
    return AdapterSet.of(model).penalty()


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: SaveEmbeddings = "auto",
) -> dict[str, Tensor]:
    """An adapter's tensors by the keys that files give them.

    Args:
        model: a ``PeftModel``, or a model with injected adapters (the keys then have no prefix).
        state_dict: full state dict of the model to take the values from.
        unwrap_compiled: accepted for scripts: keys never name what torch.compile puts around a model.
        save_embedding_layers: see ``PeftModel.save_pretrained``.
    """
    adapters = AdapterSet.of(model)
    config, state = adapter_state(adapters, adapter_name, state_dict)
    state |= saved_embeddings(adapters, adapter_name, save_embedding_layers, base_state(state_dict))
    wrapped = isinstance(getattr(model, "base_model", None), AdaptedModel)
    style = KeyStyle.of(config) if wrapped else KeyStyle("", "")
    return {file_key(key, style): value for key, value in state.items()}


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> _IncompatibleKeys:
    """Copies tensors, by the keys that files give them, into an adapter.

    Args:
        ignore_mismatched_sizes: warn of a tensor of another shape and leave what is there; its key is then missing.
        low_cpu_mem_usage: where a parameter has no storage yet, put the tensor itself in its place.

    Raises:
        PeanutError: a key is missing or unexpected, a shape or kind differs, or a value is not finite. Nothing is
            then copied.
    """
    adapters = AdapterSet.of(model)
    adapters.known(adapter_name)
    shared = [key.removeprefix(SHARED) for key, _ in adapters.parameters(adapter_name) if key.startswith(SHARED)]
    style = KeyStyle.of(adapters.configs[adapter_name])
    refuse_not_finite(peft_model_state_dict, "the state dict", "leave it out, or train again")
    state = {plain_key(key, style, shared): value for key, value in peft_model_state_dict.items()}
    stored = StoredAdapter(adapters.configs[adapter_name], state, None, "the state dict")
    return load_state(
        adapters, adapter_name, stored, check=False, alias=low_cpu_mem_usage, skip_sizes=ignore_mismatched_sizes
    )
