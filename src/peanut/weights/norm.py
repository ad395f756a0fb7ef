"""Normalisation layers: their weight and bias per feature, as a matrix (features, 1)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..operators import Delta
from .kind import LayerKind, with_tensors
from .stored import stored

__all__ = ["NormKind"]


class NormKind(LayerKind):
    """y = n(x) ⊙ w + b, whatever n is: LayerNorm, GroupNorm, RMSNorm and the RMSNorms of transformers' models.

    Batch norms, which change with the data that they see, are none of them.
    """

    name = "norm"
    multiplies = False
    dims = None

    def matches(self, module: object) -> bool:
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
            return isinstance(module.weight, Tensor)
        weight = getattr(module, "weight", None)
        named = type(module).__name__.lower().endswith(("rmsnorm", "layernorm"))
        return isinstance(module, nn.Module) and named and isinstance(weight, Tensor) and weight.dim() == 1

    def shape(self, module: Any) -> tuple[int, int]:
        return module.weight.numel(), 1

    def matrix(self, module: Any, weight: Tensor) -> Tensor:
        return weight.reshape(-1, 1)

    def layout(self, module: Any, matrix: Tensor) -> Tensor:
        return matrix.reshape(module.weight.shape)

    def respond(self, module: Any, x: Tensor, delta: Delta) -> Tensor:
        weight = stored(module, "weight")
        changed = self.layout(module, self.matrix(module, weight) + delta.dense().to(weight.dtype))
        difference: Tensor = with_tensors(module, {"weight": changed}, x) - module(x)
        return difference
