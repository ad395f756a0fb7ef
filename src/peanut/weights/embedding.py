"""``nn.Embedding``: a matrix (dim, vocabulary) applied to one-hot vectors, stored transposed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..operators import Delta
from .kind import LayerKind

__all__ = ["EmbeddingKind"]


class EmbeddingKind(LayerKind):
    """y = W e_id with W stored as (vocabulary, dim); Gemma's embeddings multiply the output by ``embed_scale``."""

    name = "embedding"
    takes_activations = False

    def matches(self, module: object) -> bool:
        return isinstance(module, nn.Embedding)

    def shape(self, module: nn.Embedding) -> tuple[int, int]:
        return module.embedding_dim, module.num_embeddings

    def matrix(self, module: nn.Embedding, weight: Tensor) -> Tensor:
        return weight.T

    def layout(self, module: nn.Embedding, matrix: Tensor) -> Tensor:
        return matrix.T.contiguous()

    def respond(self, module: nn.Embedding, x: Tensor, delta: Delta) -> Tensor:
        rows = delta.rows(x)
        if module.padding_idx is not None:
            # nn.Embedding lets no gradient into its padding row, so neither does its change.
            rows = torch.where((x == module.padding_idx).unsqueeze(-1), rows.detach(), rows)
        scale = getattr(module, "embed_scale", None)
        return rows if scale is None else rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)
