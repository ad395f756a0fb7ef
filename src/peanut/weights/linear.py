"""Linear layers: ``nn.Linear``, and GPT-2's ``Conv1D``, which stores its weight transposed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..operators import Delta
from .emptied import shape_of
from .kind import LayerKind, is_plain, unhooked

if TYPE_CHECKING:
    from transformers.pytorch_utils import Conv1D

__all__ = ["Conv1DKind", "LinearKind"]


class LinearKind(LayerKind):
    """y = x Wᵀ + b with W stored as (out, in)."""

    name = "linear"
    takes_features = True

    def matches(self, module: object) -> bool:
        return isinstance(module, nn.Linear)

    def usual(self, module: Any) -> bool:
        return type(module).forward is nn.Linear.forward

    def shape(self, module: Any) -> tuple[int, int]:
        return module.out_features, module.in_features

    def matrix(self, module: Any, weight: Tensor) -> Tensor:
        return weight

    def layout(self, module: Any, matrix: Tensor) -> Tensor:
        return matrix

    def respond(self, module: Any, x: Tensor, delta: Delta) -> Tensor:
        return delta.apply(x)

    def fused(self, module: nn.Module) -> bool:
        return unhooked(module, nn.Linear.forward) and is_plain(module.weight)


class Conv1DKind(LinearKind):
    """y = x W + b with W stored as (in, out)."""

    name = "conv1d"

    def matches(self, module: object) -> bool:
        made = _conv1d()
        return made is not None and isinstance(module, made)

    def usual(self, module: Any) -> bool:
        made = _conv1d()
        return made is not None and type(module).forward is made.forward

    def shape(self, module: Conv1D) -> tuple[int, int]:
        inputs, outputs = shape_of(module.weight)
        return outputs, inputs

    def matrix(self, module: Conv1D, weight: Tensor) -> Tensor:
        return weight.T

    def layout(self, module: Conv1D, matrix: Tensor) -> Tensor:
        return matrix.T.contiguous()

    def fused(self, module: nn.Module) -> bool:
        made = _conv1d()
        return made is not None and unhooked(module, made.forward) and is_plain(module.weight)


def _conv1d() -> Any:
    """transformers' class, ``None`` if it was never imported, so that there is no such layer."""
    module = sys.modules.get("transformers.pytorch_utils")
    return None if module is None else module.Conv1D
