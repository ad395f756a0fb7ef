"""``nn.Linear``: the weight is the matrix."""

from __future__ import annotations

from torch import Tensor, nn

from .kind import LayerKind, LinearMap, unhooked

__all__ = ["LinearKind"]


class LinearKind(LayerKind):
    """y = x Wᵀ + b with W kept as (out, in)."""

    name = "linear"

    def matches(self, module: object) -> bool:
        return isinstance(module, nn.Linear)

    def shape(self, module: nn.Linear) -> tuple[int, int]:
        return module.out_features, module.in_features

    def matrix(self, module: nn.Linear, weight: Tensor) -> Tensor:
        return weight

    def layout(self, module: nn.Linear, matrix: Tensor) -> Tensor:
        return matrix

    def respond(self, module: nn.Linear, x: Tensor, delta: LinearMap) -> Tensor:
        return delta.apply(x)

    def fused(self, module: nn.Module) -> bool:
        return unhooked(module, nn.Linear.forward)

    def takes_features(self) -> bool:
        return True
