"""The loss of a method that has one of its own (CPT), in place of the model's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from ...errors import PeanutError
from ..layers.input import AdaptedInput
from ..layers.state import AdapterState
from .reader import IGNORED

__all__ = ["own_loss"]


def own_loss(
    inputs: AdaptedInput | None, state: AdapterState, arguments: dict[str, Any], extra: dict[str, Any]
) -> Callable[[Tensor], Tensor] | None:
    """The loss, of logits, of the acting method that has one of its own; the labels are then taken from ``arguments``.

    Args:
        arguments: what the model is called with, the labels of virtual tokens among them.
        extra: what the batch has for the method.

    Raises:
        PeanutError: it is one of several prompts, and not the last.
    """
    labels = arguments.get("labels")
    if inputs is None or labels is None:
        return None
    acting = inputs.acting("tokens")
    names = [name for name in acting if inputs.method_of(name)[0].own_loss]
    if not names:
        return None
    if state.call.samples is not None or names != acting[-1:]:
        raise PeanutError(
            f"labels while adapter {names[0]!r}, which has a loss of its own, is one of several",
            "it alone, or as the last of the active prompts",
            "activate it last, or leave the labels out",
        )
    del arguments["labels"]
    own, items = labels[:, inputs.taken("tokens", len(labels))[0] :], arguments.get("num_items_in_batch")
    return partial(_loss, *inputs.method_of(names[0]), own, extra, items)


def _loss(method: Any, config: Any, labels: Tensor, extra: dict[str, Any], items: Any, logits: Tensor) -> Tensor:
    """Where gradients of several batches add up to ``items`` labels, this batch's share of the loss."""
    loss: Tensor = method.loss(config, logits[:, -(config.num_virtual_tokens + labels.shape[1]) :], labels, extra)
    return loss if items is None else loss * (labels[:, 1:] != IGNORED).sum() / items
