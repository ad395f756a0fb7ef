"""Prepares a model for training adapters: a quantised one as in QLoRA (Dettmers et al. 2023, arXiv 2305.14314)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..protocols.arguments import checked
from ..weights import fix_storage, kind_of

__all__ = ["prepare_model_for_gradient_checkpointing", "prepare_model_for_kbit_training"]


@checked
def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """A quantised model, frozen, with what is not quantised (norms, embeddings, the head) in float32.

    Args:
        model: a model whose linear layers bitsandbytes has quantised; it is changed in place and returned.
        use_gradient_checkpointing: recompute the blocks' activations in the backward, if the model is quantised.
        gradient_checkpointing_kwargs: what ``torch.utils.checkpoint`` is called with; non-reentrant by default.
        auto_clear_cache: give an accelerator's memory of the weights that were converted back.
    """
    model.requires_grad_(False)
    fix_storage(model)
    codes = {
        id(module.weight) for module in model.modules() if (kind := kind_of(module)) is not None and kind.quantised
    }
    for parameter in model.parameters():
        # Codes may be stored as bfloat16 too (bnb_4bit_quant_storage).
        if parameter.dtype in (torch.float16, torch.bfloat16) and id(parameter) not in codes:
            parameter.data = parameter.data.to(torch.float32)
    if auto_clear_cache and torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    enable = getattr(model, "activation_checkpointing_enable", None) or getattr(
        model, "gradient_checkpointing_enable", None
    )
    quantised = codes or getattr(model, "quantization_method", None) is not None
    if use_gradient_checkpointing and quantised and enable is not None:
        options = {"use_reentrant": False} if gradient_checkpointing_kwargs is None else gradient_checkpointing_kwargs
        enable(options)  # by position: the two names differ in the keyword
        if options.get("use_reentrant", True) and hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()  # type: ignore[operator]
    return model


def prepare_model_for_gradient_checkpointing(model: nn.Module) -> nn.Module:
    """Lets gradients pass the input of a model whose gradient checkpointing is on, as its reentrant form needs."""
    if getattr(model, "is_gradient_checkpointing", True):
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()  # type: ignore[operator]
        else:
            embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
            embeddings.register_forward_hook(lambda _, __, output: output.requires_grad_(True))
    return model
