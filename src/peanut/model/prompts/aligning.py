"""Orders virtual tokens, padding and the user's tokens in a batch, and puts outputs back into the user's order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .cache import CACHE_NAMES

__all__ = ["aligned", "arranged", "order_of", "padding_first", "with_loss", "without_cache"]


def order_of(there: Tensor, count: int) -> Tensor:
    """The order (batch, p + tokens) in which unused positions come last.

    Args:
        there: (batch, p), which of the positions before the user's tokens are used.
        count: how many tokens the user gave.
    """
    whole = torch.cat([there, there.new_ones(len(there), count)], dim=1)
    return (~whole).long().argsort(dim=1, stable=True)


def padding_first(mask: Tensor, width: int) -> Tensor:
    """The order (batch, p + tokens) in which padding before the user's tokens moves before the p virtual ones.

    For models with relative positions (T5): a prompt stays next to its text.

    Args:
        mask: (batch, p + tokens), the attention mask.
        width: p.
    """
    leading = mask[:, width:].long().cumsum(1) == 0
    return (~torch.cat([leading.new_zeros(len(mask), width), leading], dim=1)).long().argsort(dim=1, stable=True)


def arranged(value: Tensor, order: Tensor | None) -> Tensor:
    """(batch, p + tokens, …) in another order, each row in its own."""
    if order is None:
        return value
    order = order.to(value.device)
    index = order.expand(len(value), -1).view(*order.shape, *[1] * (value.dim() - 2))
    return value.gather(1, index.expand(-1, -1, *value.shape[2:]))


def aligned(model: nn.Module, output: Any, width: int, count: int, order: Tensor | None) -> Any:
    """The output of a model with the rows of the user's tokens last, and for token tasks these alone.

    Args:
        output: its output, a tuple or by name.
        width: p.
        count: how many tokens the user gave.
        order: the order in which the model was given them.
    """
    alone = type(model).__name__.endswith(("ForTokenClassification", "ForQuestionAnswering"))
    if order is None and not alone:
        return output
    back = None if order is None else order.argsort(dim=1)

    def fit(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[1] != width + count:
            return value
        value = arranged(value, back)
        return value[:, width:] if alone else value

    if isinstance(output, tuple):
        return tuple(fit(each) for each in output)
    for name in ("logits", "start_logits", "end_logits", "last_hidden_state"):
        if output.get(name) is not None:
            output[name] = fit(output[name])
    return output


def without_cache(output: Any) -> Any:
    """An output without the cache, for callers that asked for none."""
    if isinstance(output, tuple):
        from transformers import Cache

        return tuple(each for each in output if not isinstance(each, Cache))
    return type(output)(**{name: value for name, value in output.items() if name not in CACHE_NAMES})


def with_loss(output: Any, loss: Tensor) -> Any:
    """An output with a loss in front."""
    if isinstance(output, tuple):
        return (loss, *output)
    return type(output)(**{"loss": loss, **{name: value for name, value in output.items() if name != "loss"}})
