"""``AdapterControls``: which adapters a model has, which of them act or are merged, and how large they are."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import PeanutError
from ..protocols import PeftConfig
from .adapters.adapter_set import AdapterSet
from .adapters.surgery import SHARED
from .as_base import AsBase, inspected
from .checkpoints.base_weights import embedding_paths
from .checkpoints.checkpoint import adapter_state
from .commands import AdapterCommands
from .injection import AdaptedModel
from .kbit import prepare_model_for_gradient_checkpointing
from .layers.adapted import Adapted
from .layers.by_adapter import ByAdapter
from .layers.calls import Context
from .layers.plain_keys import prompt_keys
from .layers.saved_modules import SavedModule
from .prompts.encoders import encoders_of
from .status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from .targets.matching import heads_of
from .targets.paths import bare
from .targets.reach import reach_of

__all__ = ["AdapterControls"]


class AdapterControls(AdapterCommands, AsBase):
    """What a ``PeftModel`` can do besides running, and adding, saving and loading adapters."""

    base_model: AdaptedModel
    special_peft_forward_args: ClassVar[set[str]] = {"adapter_names", "task_ids"}
    """What ``forward`` takes and the base's does not."""

    # What there is

    @property
    def adapters(self) -> AdapterSet:
        """The adapters in the model."""
        return self.base_model.adapters

    @property
    def peft_type(self) -> Any:
        return self.active_peft_config.peft_type

    @property
    def active_adapter(self) -> str:
        """Name of the first active adapter.

        Raises:
            PeanutError: none is active.
        """
        if not self.active_adapters:
            raise PeanutError("no adapter is active", "an active adapter", "call set_adapter(name)")
        return self.active_adapters[0]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter acts in a call of this thread now."""
        state = self.adapters.state
        return bool(state.active) and not state.disabled

    @property
    def active_peft_config(self) -> PeftConfig:
        return self.peft_config[self.active_adapter]

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters that are merged into the weights."""
        return list(self.adapters.state.merged)

    def get_base_model(self) -> nn.Module:
        """The base model, with the adapters in it."""
        return self if inspected(sys._getframe(1)) else self._base()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        prompt_keys(self.adapters.model, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def modules_to_save(self) -> set[str] | None:
        """The names of the modules that adapters train whole, their tasks' heads too; ``None`` if there are none."""
        configs = self.peft_config.values()
        return {name for own in configs for name in (*(own.modules_to_save or ()), *heads_of(own))} or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The base model's dtype, if it has one."""
        return getattr(self.adapters.model, "dtype", None)

    # Prompts

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None) -> Tensor:
        """The virtual tokens of the active adapters, (batch, tokens, width); ``task_ids`` and the length do not matter.

        Raises:
            PeanutError: no active adapter puts tokens before the input. (Prefix tuning puts keys and values there.)
        """
        held: Any = self.adapters.model._modules.get("adapted_input")
        front = None if held is None else held.front("tokens", batch_size)
        if front is None:
            raise PeanutError("no active adapter puts virtual tokens before the input", "prompt tuning, or its like")
        return front.values  # type: ignore[no-any-return]

    @property
    def prompt_encoder(self) -> ByAdapter:
        """What makes the prompts, as modules by adapter with the tensors of the model; else the base's of that name."""
        held: Any = self.adapters.model._modules.get("adapted_input")
        if held is None:
            raise AttributeError("no adapter has a prompt")  # so that the base is asked
        return encoders_of(held)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """What files hold of the prompt of an adapter.

        Raises:
            PeanutError: it has none.
        """
        _, state = adapter_state(self.adapters, adapter_name)
        if f"{SHARED}prompt_embeddings" not in state:
            raise PeanutError(f"adapter {adapter_name!r} has no prompt", "prompt tuning, or its like")
        return state[f"{SHARED}prompt_embeddings"].cpu()

    # Which adapters act

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the context the model computes, in this thread, exactly what its base does, also if merged."""
        context = Context(disables=True)
        self.adapters.state.enter(context)
        try:
            yield
        finally:
            self.adapters.state.leave(context)

    # Embeddings, and how large it is

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The base model's; arguments as for transformers.

        Raises:
            PeanutError: an adapter changes an embedding, or trains it whole.
        """
        base, changed = self.get_base_model(), (Adapted, SavedModule)
        wanted = _rows_wanted(base, *args, **kwargs)
        for path in embedding_paths(self.adapters) if wanted is not None else ():
            layer = self.adapters.at(path)
            touched = any(isinstance(module, changed) for module in layer.modules())
            if touched and wanted != len(bare(layer).weight):  # type: ignore[arg-type]
                raise PeanutError(
                    f"an adapter changes '{path}', which is to be resized",
                    "embeddings without adapters",
                    "resize the base before get_peft_model or from_pretrained",
                )
        resize: Any = base.resize_token_embeddings
        return resize(*args, **kwargs)  # type: ignore[no-any-return]

    # What libraries ask

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether ``convert_to_lora`` takes an adapter; of all of them, if there is none of that name."""
        return self.base_model.supports_lora_conversion(adapter_name)

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """The state of the adapters in each place."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """The state of the model's adapters."""
        return get_model_status(self)

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """See ``peanut.utils.prepare_model_for_gradient_checkpointing``."""
        return prepare_model_for_gradient_checkpointing(model)

    # Counting

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trained, all) numbers of parameters."""
        counts = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters()]
        return sum(count for count, trained in counts if trained), sum(count for count, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Prints how many parameters are trained, of how many; then which no adapter reaches, if they are many."""
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")
        if unreached := str(reach_of(self.get_base_model())):
            print(f"out of reach of adapters: {unreached}")


def _rows_wanted(
    base: nn.Module, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *_: Any, **__: Any
) -> int | None:
    """How many rows ``resize_token_embeddings`` of transformers would give the embeddings; ``None``: as many."""
    rows = new_num_tokens
    if pad_to_multiple_of is not None:
        rows = len(base.get_input_embeddings().weight) if rows is None else rows  # type: ignore[operator]
        rows = -(-rows // pad_to_multiple_of) * pad_to_multiple_of
    return rows
