"""GPT-2's ``Conv1D``: a linear layer that keeps its weight transposed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .kind import LayerKind, LinearMap, unhooked

if TYPE_CHECKING:
    from transformers.pytorch_utils import Conv1D

__all__ = ["Conv1DKind"]


class Conv1DKind(LayerKind):
    """y = x W + b with W kept as (in, out)."""

    name = "conv1d"

    def matches(self, module: object) -> bool:
        made = _class()
        return made is not None and isinstance(module, made)

    def shape(self, module: Conv1D) -> tuple[int, int]:
        inputs, outputs = module.weight.shape
        return outputs, inputs

    def matrix(self, module: Conv1D, weight: Tensor) -> Tensor:
        return weight.T

    def layout(self, module: Conv1D, matrix: Tensor) -> Tensor:
        return matrix.T.contiguous()

    def respond(self, module: Conv1D, x: Tensor, delta: LinearMap) -> Tensor:
        return delta.apply(x)

    def fused(self, module: nn.Module) -> bool:
        made = _class()
        return made is not None and unhooked(module, made.forward)

    def takes_features(self) -> bool:
        return True


def _class() -> Any:
    """transformers' class, ``None`` where nobody has imported it, so that there is no such layer."""
    module = sys.modules.get("transformers.pytorch_utils")
    return None if module is None else module.Conv1D
