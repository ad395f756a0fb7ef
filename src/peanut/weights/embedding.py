"""``nn.Embedding``: a matrix (dim, vocabulary) applied to one-hot vectors, stored transposed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..operators import Delta
from .kind import LayerKind
from .stored import store, stored

__all__ = ["EmbeddingKind"]


class EmbeddingKind(LayerKind):
    """y = W e_id with W stored as (vocabulary, dim); Gemma's embeddings multiply the output by ``embed_scale``.

    With ``max_norm`` = m the layer shortens the rows of its weight, whatever that is: y = ρ(W e_id),
    ρ(w) = w min(1, m/‖w‖), through which torch lets gradients pass as if it were not there. W is then ρ of itself.
    """

    name = "embedding"
    takes_activations = False

    def matches(self, module: object) -> bool:
        return isinstance(module, nn.Embedding)

    def usual(self, module: nn.Embedding) -> bool:
        return type(module).forward is nn.Embedding.forward

    def trial(self, module: nn.Embedding, generator: torch.Generator) -> Tensor:
        return torch.arange(min(4, module.num_embeddings))[None]

    def shape(self, module: nn.Embedding) -> tuple[int, int]:
        return module.embedding_dim, module.num_embeddings

    def matrix(self, module: nn.Embedding, weight: Tensor) -> Tensor:
        if module.max_norm is not None and not weight.requires_grad:
            weight = weight.data  # every lookup writes into the weight, the rows that are there
        return weight.T

    def layout(self, module: nn.Embedding, matrix: Tensor) -> Tensor:
        return matrix.T.contiguous()

    @torch.no_grad()
    def fix_storage(self, module: nn.Embedding) -> None:
        # Each row is shortened in place when it is first looked up: W would depend on what has been looked up.
        weight = stored(module, "weight")
        if module.max_norm is not None and not weight.is_meta and weight.numel():
            store(module, "weight", _shortened(module, weight))

    def respond(self, module: nn.Embedding, x: Tensor, delta: Delta) -> Tensor:
        rows = delta.rows(x)
        own = None if module.max_norm is None else nn.functional.embedding(x, stored(module, "weight").detach())
        rows = self._moved(module, x, own, rows)
        scale = getattr(module, "embed_scale", None)
        return rows if scale is None else rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)

    def replaced(self, module: nn.Embedding, x: Tensor, y: Tensor, changed: Tensor) -> Tensor:
        if module.max_norm is None and module.padding_idx is None and not module.scale_grad_by_freq:
            return changed
        return y + self._moved(module, x, y, changed - y)

    def _moved(self, module: nn.Embedding, x: Tensor, own: Tensor | None, rows: Tensor) -> Tensor:
        """What the lookup of ids x gains where its rows of the weight, ``own``, gain ``rows``."""
        if module.max_norm is not None and own is not None:
            whole = (own.to(rows.dtype) + rows).detach()
            rows = rows + (_shortened(module, whole) - whole)
        if module.scale_grad_by_freq:
            # The gradient of a row of the weight is divided by how often it is looked up.
            _, places, counts = torch.unique(x, return_inverse=True, return_counts=True)
            rows = rows.detach() + (rows - rows.detach()) / counts[places].unsqueeze(-1)
        if module.padding_idx is not None:
            # nn.Embedding lets no gradient into its padding row, so neither does its change.
            rows = torch.where((x == module.padding_idx).unsqueeze(-1), rows.detach(), rows)
        return rows


def _shortened(module: nn.Embedding, rows: Tensor) -> Tensor:
    """ρ of rows (…, dim), as ``torch.embedding_renorm_`` computes it."""
    norm = rows.norm(module.norm_type, dim=-1, keepdim=True)
    limit = torch.as_tensor(module.max_norm, dtype=norm.dtype, device=norm.device)
    return torch.where(norm > limit, rows * (limit / (norm + 1e-7)), rows)
