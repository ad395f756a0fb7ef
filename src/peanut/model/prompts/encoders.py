"""What a prompt method trains as one module, as Hugging Face PEFT names and builds it, alone or of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import PeanutError
from ...methods import p_tuning, prefix_tuning
from ...protocols import ModelShape, PromptConfig, method_of
from ..layers.by_adapter import ByAdapter, View
from ..layers.input import AdaptedInput
from ..layers.parameters import Parameters

__all__ = ["CPTEmbedding", "PrefixEncoder", "PromptEmbedding", "PromptEncoder", "encoders_of"]

_ROWS, _WRITTEN = "embedding.weight", "prompt_embeddings"


class _Encoder(nn.Module):
    """A prompt's vectors, and what makes them: indices (…) of virtual tokens → their vectors (…, width).

    Args:
        config: with its ``token_dim``, and what else a config has once its model is known.
        word_embeddings: the base's, from which some start.

    Raises:
        PeanutError: the config is of another method, or its sizes are not known.
    """

    method: ClassVar[str]
    _held: Parameters | None = None
    """Those of an adapter in a model, if it is of one."""

    def __init__(self, config: PromptConfig, word_embeddings: nn.Module | None = None) -> None:
        super().__init__()
        own: Any = config
        if own.method != self.method or not own.token_dim:
            raise PeanutError(
                f"a {type(own).__name__} with token_dim={own.token_dim} for {type(self).__name__}",
                f"a config of {self.method} with its token_dim",
                "give one, or use get_peft_model, which reads the sizes off the model",
            )
        heads, layers = own.num_attention_heads or 1, own.num_layers or 1
        shape = ModelShape(
            own.token_dim,
            layers,
            heads,
            heads,
            own.token_dim // heads,
            own.num_transformer_submodules == 2,
            *_of(word_embeddings),
        )
        kind = method_of(own.peft_type)
        self.config = kind.fitted(own, shape)
        values = kind.start(self.config, shape, torch.Generator().manual_seed(int(torch.randint(2**31, ()))))
        self._stored = _WRITTEN in values
        parameters = Parameters(
            {_ROWS if suffix == _WRITTEN else suffix: value for suffix, value in values.items()},
            kind.fixed(self.config) | kind.passing(self.config) | kind.rebuilt(self.config),
        )
        for name, tree in parameters._trees.items():
            self.add_module(name, tree)

    @classmethod
    def of(cls, place: AdaptedInput, name: str) -> _Encoder:
        """That of an adapter in a model, with the tensors that it has there."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.train(place.training)
        self._held, self.config = place.adapters[name], place.method_of(name)[1]
        for own, tree in self._held._trees.items():
            self.add_module(own, tree)
        if _WRITTEN in self._held.places:
            self.add_module("embedding", View({"weight": self._held.places[_WRITTEN]}))
        return self

    def forward(self, indices: Tensor) -> Tensor:
        if self._held is not None:
            return self._made(self._held.values_by_suffix())[indices]
        values: dict[str, Tensor] = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        if self._stored:
            values[_WRITTEN] = values.pop(_ROWS)
        return self._made(values)[indices]

    def _made(self, values: dict[str, Tensor]) -> Tensor:
        return values[_WRITTEN]


def _of(embeddings: nn.Module | None) -> tuple[int, Callable[[Tensor], Tensor]]:
    """How many tokens embeddings have, and a function that looks them up."""

    def embed(ids: Tensor) -> Tensor:
        if embeddings is None:
            raise PeanutError("no word_embeddings", "those of the base, from which the prompt starts", "give them")
        with torch.no_grad():
            return embeddings(ids.to(next(embeddings.parameters()).device))  # type: ignore[no-any-return]

    return getattr(embeddings, "num_embeddings", 2**31), embed


class PromptEmbedding(_Encoder):
    """The vectors of prompt tuning."""

    method = "PROMPT_TUNING"


class PromptEncoder(_Encoder):
    """The network of P-tuning."""

    method = "P_TUNING"

    def _made(self, values: dict[str, Tensor]) -> Tensor:
        config: Any = self.config
        return p_tuning.written(config, values, self.training)


class PrefixEncoder(_Encoder):
    """The keys and values of prefix tuning: (…, layers · 2 · token_dim)."""

    method = "PREFIX_TUNING"

    def _made(self, values: dict[str, Tensor]) -> Tensor:
        return prefix_tuning.written(values)


class CPTEmbedding(_Encoder):
    """The context of CPT and how far it is moved."""

    method = "CPT"

    def _made(self, values: dict[str, Tensor]) -> Tensor:
        return method_of("CPT").prepended(self.config, values, self.training)  # type: ignore[no-any-return]


def encoders_of(place: AdaptedInput) -> ByAdapter:
    """The modules of all adapters of a model's input, by adapter."""
    kinds = {kind.method: kind for kind in _Encoder.__subclasses__()}
    found = ByAdapter()
    for name in place.adapters:
        found[name] = kinds.get(place.method_of(name)[0].name, _Encoder).of(place, name)
    return found
