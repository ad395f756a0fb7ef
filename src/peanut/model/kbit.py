"""QLoRA's side of training: a quantised base made ready for adapters (Dettmers et al. 2023, arXiv 2305.14314)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["prepare_model_for_kbit_training"]


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """A quantised model, frozen, with what is not quantised (norms, embeddings, the head) in float32.

    Args:
        model: a model whose linear layers bitsandbytes has quantised; it is changed in place and returned.
        use_gradient_checkpointing: recompute the blocks' activations in the backward.
        gradient_checkpointing_kwargs: what ``torch.utils.checkpoint`` is called with; non-reentrant by default.
    """
    model.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.to(torch.float32)
    if use_gradient_checkpointing and hasattr(model, "gradient_checkpointing_enable"):
        options = {"use_reentrant": False} if gradient_checkpointing_kwargs is None else gradient_checkpointing_kwargs
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)  # type: ignore[operator]
        if options.get("use_reentrant", True) and hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()  # type: ignore[operator]
    return model
