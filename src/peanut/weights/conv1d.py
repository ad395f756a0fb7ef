"""GPT-2's ``Conv1D``: a linear layer that keeps its weight transposed."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .kind import LayerKind, LinearMap, unhooked

__all__ = ["Conv1DKind"]


class Conv1DKind(LayerKind):
    """y = x W + b with W kept as (in, out)."""

    name = "conv1d"

    def matches(self, module: object) -> bool:
        return isinstance(module, Conv1D)

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
        return unhooked(module, Conv1D.forward)

    def takes_features(self) -> bool:
        return True
