"""Sizes and token ids that prompt methods need, read off a model and its config."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ...errors import PeanutError
from ...protocols import ModelShape
from ...weights.stored import device_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from typing_extensions import TypeIs

__all__ = ["is_pretrained", "longest", "position_padding", "reading_stack", "shape_of", "virtual_id"]


def is_pretrained(model: object) -> TypeIs[PreTrainedModel]:
    """Whether it is a model of transformers, which is not imported for the question."""
    module = sys.modules.get("transformers.modeling_utils")
    return module is not None and isinstance(model, module.PreTrainedModel)


def reading_stack(model: nn.Module) -> PreTrainedModel:
    """The part of the model that reads the user's tokens: the encoder if there are two stacks, else the model.

    Raises:
        PeanutError: it is no transformers model, or reads no tokens.
    """
    if not is_pretrained(model):
        inside = next((path for path, part in model.named_modules() if is_pretrained(part)), None)
        raise PeanutError(
            f"a {type(model).__name__}, of which nothing tells where it reads tokens",
            "a model of transformers (a PreTrainedModel)",
            "use a method that changes weights or outputs" + (f", or adapt its part '{inside}'" if inside else ""),
        )
    stack = model.get_encoder() if model.config.is_encoder_decoder else model
    try:
        embedding = stack.get_input_embeddings()
    except NotImplementedError:
        embedding = None
    if not hasattr(embedding, "weight") or not hasattr(embedding, "num_embeddings"):
        raise PeanutError(
            f"{type(model).__name__} has no embeddings of tokens",
            "a model that reads tokens",
            "use a method that changes weights or outputs",
        )
    return stack


def shape_of(model: nn.Module) -> ModelShape:
    """The sizes of a transformers model.

    Raises:
        PeanutError: it is no transformers model, or its config does not tell.
    """
    stack = reading_stack(model)
    settings = stack.config.get_text_config(decoder=True)
    embedding: Any = stack.get_input_embeddings()
    if not hasattr(settings, "num_attention_heads"):
        raise PeanutError(
            f"a {type(settings).__name__} without num_attention_heads: its layers keep states, not keys and values",
            "a model with attention",
            "use a method that changes weights or outputs",
        )
    heads = int(settings.num_attention_heads)
    layers = getattr(settings, "num_decoder_layers", None) or settings.num_hidden_layers
    size = getattr(settings, "head_dim", None) or getattr(settings, "d_kv", None) or settings.hidden_size // heads

    def embed(ids: Tensor) -> Tensor:
        return embedding(ids.to(device_of(embedding, "weight")))  # type: ignore[no-any-return]

    return ModelShape(
        width=embedding.weight.shape[-1],
        layers=int(layers),
        heads=heads,
        key_value_heads=int(getattr(settings, "num_key_value_heads", None) or heads),
        head_size=int(size),
        encoder_decoder=bool(stack.config.is_encoder_decoder),
        vocabulary=int(embedding.num_embeddings),
        embed=embed,
    )


def virtual_id(model: PreTrainedModel) -> int:
    """A token id that stands in for virtual tokens: one that means nothing to the model, not even padding."""
    settings = [model.config, model.config.get_text_config(), getattr(model, "generation_config", None)]
    special: set[int] = set()
    for each in settings:
        for name, value in vars(each).items() if each is not None else ():
            if name.endswith(("_token_id", "_token_index", "_token_ids")) and value is not None:
                special.update(value if isinstance(value, (list, tuple)) else [value])
    return next(number for number in range(len(special) + 1) if number not in special)


def position_padding(model: PreTrainedModel) -> int | None:
    """The position of padding, where the model counts positions from the ids, padding left out (RoBERTa, MPNet)."""
    tables = [each for name, each in model.named_modules() if name.endswith("position_embeddings")]
    return next((int(table.padding_idx) for table in tables if getattr(table, "padding_idx", None) is not None), None)


def longest(model: PreTrainedModel) -> int | None:
    """How many tokens the model has positions for, where each position is a trained vector; else ``None``."""
    settings = model.config.get_text_config()
    count = getattr(settings, "max_position_embeddings", None)
    table = next((each for name, each in model.named_modules() if name.endswith(("position_embeddings", "wpe"))), None)
    if count is None or not isinstance(table, nn.Embedding):
        return None
    offset = 0 if table.padding_idx is None else table.padding_idx + 1
    return int(count) - offset
