"""``InputMethod``: the interface of methods that add virtual tokens, or keys and values, before the user's tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from ..errors import PeanutError, shown
from .config import PeftConfig
from .method import C, Method, Trial, Values
from .values import Count

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["InputMethod", "ModelShape", "PromptConfig"]


@dataclass(frozen=True)
class ModelShape:
    """What an input method must know of a model.

    Args:
        width: the size of its token embeddings.
        layers: how many layers have an attention of their own (the decoder's, if there are two stacks).
        heads: how many heads these have.
        key_value_heads: how many heads their keys and values have.
        encoder_decoder: whether it has an encoder and a decoder.
        embed: the embeddings (…, width) of token ids (…), as the model makes them.
    """

    width: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    encoder_decoder: bool
    vocabulary: int
    embed: Callable[[Tensor], Tensor]


@dataclass(kw_only=True)
class PromptConfig(PeftConfig):
    """What the configs of all input methods hold.

    Args:
        num_virtual_tokens: p, how many virtual tokens there are.
        token_dim: the size of a token's embedding; for prefix tuning that of all keys of a token. Read off the model.
        num_transformer_submodules: 2 if there is an encoder and a decoder, else 1. Read off the model.
        num_attention_heads: heads; for prefix tuning those of keys and values. Read off the model.
        num_layers: layers. Read off the model.
    """

    prompts = True
    required = ("num_virtual_tokens",)
    only_here = frozenset({"exclude_modules", "layers_pattern", "layers_to_transform", "target_modules"})

    num_virtual_tokens: Count | None = None
    token_dim: Count | None = None
    num_transformer_submodules: Count | None = None
    num_attention_heads: Count | None = None
    num_layers: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"):
            if getattr(self, name) is not None:
                raise PeanutError(
                    f"{name}={shown(getattr(self, name))} for {self.method}, which changes no layer", do="leave it out"
                )

    @property
    def rows(self) -> int:
        """How many embeddings files keep: p for each stack, of which only the first stack's are used."""
        return (self.num_virtual_tokens or 0) * (self.num_transformer_submodules or 1)

    def fitted(self, shape: ModelShape, *, key_value: bool = False) -> Self:
        """The config with what it leaves open read off the model (its keys and values, if ``key_value``).

        Raises:
            PeanutError: a size that is given is not the model's.
        """
        heads = shape.key_value_heads if key_value else shape.heads
        found = {
            "token_dim": heads * shape.head_size if key_value else shape.width,
            "num_transformer_submodules": 2 if shape.encoder_decoder else 1,
            "num_attention_heads": heads,
            "num_layers": shape.layers,
        }
        for name, value in found.items():
            given = getattr(self, name)
            matters = key_value or name in ("token_dim", "num_transformer_submodules")
            if given is not None and given != value and matters:
                raise PeanutError(f"{name}={given} for a model that has {value}", str(value), "leave it out")
        missing: dict[str, Any] = {name: value for name, value in found.items() if getattr(self, name) is None}
        return replace(self, **missing)


class InputMethod(Method[C]):
    """A method that changes what the model is given.

    Laws, checked for every registered method: see ``tests/test_input_laws.py``. It returns what is put before the
    user's tokens; masks, positions, labels, caches and generation are made to fit, once, for all of them.
    """

    prepends: ClassVar[Literal["tokens", "keys_values"]] = "tokens"
    """Embeddings of virtual tokens, or keys and values that every layer's attention sees before those of its tokens."""
    reads: ClassVar[tuple[str, ...]] = ()
    """Names of arguments of a batch that are for the method, not for the model."""

    def tried(self, on: Trial) -> dict[str, Any] | None:
        return {"num_virtual_tokens": on.tokens}

    @property
    def model_name(self) -> None:
        """``None``: it puts nothing into layers."""

    def fitted(self, config: C, shape: ModelShape) -> C:
        """The config with what it leaves open read off the model."""
        return config

    @abstractmethod
    def start(self, config: C, shape: ModelShape, generator: torch.Generator) -> dict[str, Tensor]:
        """The tensors' first values, by the suffix under which files keep them."""

    @abstractmethod
    def prepended(self, config: C, parameters: Values, training: bool) -> Tensor:
        """What is put before the user's tokens: (p, width), or keys and values.

        Keys and values are of shape (layers, 2, key_value_heads, p, head_size).
        """

    own_loss: ClassVar[bool] = False
    """Whether ``loss`` takes the place of the model's."""

    def loss(self, config: C, logits: Tensor, labels: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """The loss in place of the model's own, for methods that have one (``own_loss``).

        Args:
            logits: (batch, p + tokens, vocabulary), those of the virtual tokens first.
            labels: (batch, tokens), as the user gave them.
            arguments: what ``reads`` names, where the batch has it.
        """
        raise NotImplementedError
