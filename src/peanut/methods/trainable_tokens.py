"""Trainable tokens: the embeddings of chosen tokens are trained, and no others (as in Hugging Face PEFT since 0.15)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import PeanutError
from ..operators.rows import Rows
from ..protocols import Change, PeftConfig, Trial, Values, WeightMethod, register
from ..protocols.values import Whole
from ..weights import FrozenLayer

__all__ = ["TokenAdapter", "TrainableTokens", "TrainableTokensConfig"]


@dataclass(kw_only=True)
class TrainableTokensConfig(PeftConfig):
    """Config of trainable tokens.

    Args:
        token_indices: ids of the tokens to train.
        init_weights: start from the tokens' embeddings, so that nothing changes at first; else standard normal.
    """

    method = "TRAINABLE_TOKENS"
    only_here = frozenset({"exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"})

    token_indices: list[Whole] = field(default_factory=list)
    init_weights: bool = True


@register
class TrainableTokens(WeightMethod[TrainableTokensConfig]):
    """E'[token_k] = delta[k] for the tokens named, E' = E elsewhere; delta (n, dim) holds the new vectors themselves.

    So an adapter means the same on an embedding whose added rows were initialised again. A head that is tied to the
    embedding follows it: W is (dim, vocabulary) on an embedding and (vocabulary, dim) on a head.
    """

    config_class = TrainableTokensConfig
    kinds = ("embedding", "linear")
    size = "len(token_indices) * d_out"
    targets = "embedding"
    follows_ties = True
    suffix = "trainable_tokens_delta"
    ids_suffix = "trainable_tokens_ids"

    def tried(self, on: Trial) -> dict[str, Any]:
        return {"token_indices": list(range(on.tokens))}

    def start(self, config: TrainableTokensConfig, layer: FrozenLayer, generator: torch.Generator) -> dict[str, Tensor]:
        table = by_token(layer)
        if config.init_weights:
            delta = table[config.token_indices].detach().clone()
        else:
            delta = torch.randn(len(config.token_indices), table.shape[1], generator=generator)
        return {self.suffix: delta, self.ids_suffix: torch.tensor(config.token_indices, device="cpu")}

    def rebuilt(self, config: TrainableTokensConfig) -> frozenset[str]:
        return frozenset({self.ids_suffix})

    def change(self, config: TrainableTokensConfig, parameters: Values, layer: FrozenLayer) -> Change:
        delta, ids, table = parameters[self.suffix], parameters[self.ids_suffix], by_token(layer)
        moved = delta - table[ids].to(delta.dtype)
        return Change(delta=Rows(moved, ids, table.shape[0], head=layer.kind.name == "linear"))

    def check(self, config: TrainableTokensConfig, layer: FrozenLayer, path: str) -> None:
        vocabulary = layer.out_features if layer.kind.name == "linear" else layer.in_features
        tokens = config.token_indices
        outside = [token for token in tokens if token >= vocabulary]
        repeated = sorted(token for token, count in Counter(tokens).items() if count > 1)
        if outside:
            found = f"token_indices holds {outside[0]}"
        elif repeated:
            found = f"token_indices holds {repeated[0]} twice"
        elif not tokens:
            found = "token_indices is empty"
        else:
            return
        raise PeanutError(
            f"{found}, for '{path}' of {vocabulary} tokens",
            f"each id once, from 0 to {vocabulary - 1}",
            "correct token_indices, or resize the embedding first",
        )


class TokenAdapter(TrainableTokens):
    """The same beside another method (``trainable_token_indices`` of LoRA's config), under the names its files have."""

    suffix = "token_adapter.trainable_tokens_delta"
    ids_suffix = "token_adapter.trainable_tokens_ids"

    def stored(
        self, config: TrainableTokensConfig, layers: Mapping[str, Values]
    ) -> tuple[TrainableTokensConfig, dict[str, dict[str, Tensor]]]:
        """Vectors that tied layers share are written once, under the first of them."""
        config, tensors = super().stored(config, layers)
        seen: set[int] = set()
        for values in tensors.values():
            for suffix, value in list(values.items()):
                if value.data_ptr() in seen:
                    del values[suffix]
                seen.add(value.data_ptr())
        return config, tensors


def by_token(layer: FrozenLayer) -> Tensor:
    """The frozen vectors, one a token: (vocabulary, dim)."""
    matrix = layer.matrix()
    return matrix if layer.kind.name == "linear" else matrix.T
