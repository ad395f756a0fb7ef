"""Normalisation layers: their weight and bias per feature, as a matrix (features, 1)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import UninitializedParameter

from ..operators import Delta
from .emptied import shape_of
from .kind import LayerKind, with_tensors
from .stored import stored

__all__ = ["NormKind", "is_norm"]


def is_norm(module: object) -> bool:
    """Whether a module is a normalisation layer, by its class."""
    named = type(module).__name__.lower().endswith(("rmsnorm", "layernorm"))
    return named or isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm))


def counts(module: object) -> bool:
    """Whether a module is a batch norm with running statistics."""
    return isinstance(module, _NormBase) and module.track_running_stats


class NormKind(LayerKind):
    """y = n(x) ⊙ w + b, whatever n is: LayerNorm, GroupNorm, RMSNorms, and any module with a weight of one dimension.

    Batch norms that count what they see, which is in no adapter's file, are none of them.
    """

    name = "norm"
    multiplies = False
    dims = None

    def matches(self, module: object) -> bool:
        weight = getattr(module, "weight", None) if isinstance(module, nn.Module) else None
        if not isinstance(weight, Tensor) or isinstance(weight, UninitializedParameter) or counts(module):
            return False
        # An emptied weight (of DeepSpeed's third stage) has one dimension too.
        return is_norm(module) or (weight.dim() == 1 and weight.is_floating_point() and weight.numel() > 0)

    def shape(self, module: Any) -> tuple[int, int]:
        return shape_of(module.weight).numel(), 1

    def matrix(self, module: Any, weight: Tensor) -> Tensor:
        return weight.reshape(-1, 1)

    def layout(self, module: Any, matrix: Tensor) -> Tensor:
        return matrix.reshape(module.weight.shape)

    def respond(self, module: Any, x: Tensor, delta: Delta) -> Tensor:
        weight = stored(module, "weight")
        changed = self.layout(module, self.matrix(module, weight) + delta.dense().to(weight.dtype))
        difference: Tensor = with_tensors(module, {"weight": changed}, x) - module(x)
        return difference
