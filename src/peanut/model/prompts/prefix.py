"""Prefixes: keys and values that every layer's attention sees before those of its own tokens, as a cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import PeanutError
from .cache import cache_name

__all__ = ["PrefixView", "check_grows", "filled", "holds_prefix", "length_of", "takes_prefix"]


class PrefixView:
    """Keys and values as a cache that remembers nothing, so that a block may run twice (gradient checkpointing).

    Args:
        values: (batch, layers, 2, heads, p, head_size).
    """

    is_compileable = False

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.is_updated: dict[int, bool] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """p."""
        return self.values.shape[-2]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *unused: Any, **more: Any) -> tuple[Tensor, Tensor]:
        """(batch, heads, tokens, head_size) → (batch, heads, p + tokens, head_size), of keys and of values."""
        own = self.values[:, layer_idx].to(keys)
        return torch.cat([own[:, 0], keys], dim=2), torch.cat([own[:, 1], values], dim=2)


def filled(cache: Any, values: Tensor, settings: Any) -> Any:
    """A cache that begins with a prefix: ``cache``, which is empty, or a new one.

    Args:
        cache: the cache that the caller has, if any.
        values: (batch, layers, 2, heads, p, head_size).
        settings: the config of the stack.

    Raises:
        PeanutError: the cache has its size fixed.
    """
    from transformers import DynamicCache, EncoderDecoderCache

    if cache is None:
        cache = DynamicCache(config=settings.get_text_config(decoder=True))
    check_grows(cache)
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    for layer in range(values.shape[1]):
        own.update(values[:, layer, 0].contiguous(), values[:, layer, 1].contiguous(), layer)
    return cache


def check_grows(cache: Any) -> None:
    """Refuses a cache whose size is fixed: it was made for the user's tokens alone."""
    length_of(cache)
    if getattr(cache, "is_compileable", False):
        raise PeanutError(
            f"a {type(cache).__name__}, whose size is fixed, beside virtual tokens or a mixture",
            "a cache that grows",
            "leave cache_implementation open",
        )


def length_of(cache: Any) -> int:
    """How many tokens a cache holds.

    Raises:
        PeanutError: it holds states (Mamba), not keys and values.
    """
    try:
        return 0 if cache is None else int(cache.get_seq_length())
    except (AttributeError, ValueError) as error:
        raise PeanutError(
            f"a {type(cache).__name__} of states, which does not tell how many tokens it has read",
            "a cache of keys and values",
            "call the model, or generate, with use_cache=False",
        ) from error


def takes_prefix(module: nn.Module) -> bool:
    """Whether each layer of a backbone is given keys and values of earlier tokens: none keeps a state instead."""
    from transformers import DynamicCache

    if cache_name(module) is None:
        return False
    settings: Any = module.config
    return all(hasattr(layer, "update") for layer in DynamicCache(config=settings.get_text_config(decoder=True)).layers)


def holds_prefix(model: nn.Module) -> Iterator[nn.Module]:
    """The modules inside checkpointed blocks that are given keys and values of earlier tokens."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for block in model.modules():
        if isinstance(block, GradientCheckpointingLayer):
            for module in block.modules():
                if module is not block and cache_name(module) is not None:
                    yield module
