"""``nn.MultiheadAttention``: its input projection, which is a parameter and no layer, seen as a linear layer."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from .linear import LinearKind

__all__ = ["PARAMETERS", "InProjection", "InProjectionKind"]

PARAMETERS = {"in_proj_weight": "weight", "in_proj_bias": "bias"}
"""The parameters of the attention that are those of its input projection."""


class InProjection:
    """[q, k, v] = W x + b with W (3·dim, dim), ``in_proj_weight``, and b ``in_proj_bias`` of an attention.

    It holds nothing itself, so that whatever is put into the attention is seen here.
    """

    _modules: ClassVar[dict[str, Any]] = {}
    _buffers: ClassVar[dict[str, Any]] = {}
    _forward_pre_hooks: ClassVar[dict[Any, Any]] = {}

    def __init__(self, attention: Any) -> None:
        self.attention = attention

    @property
    def _parameters(self) -> dict[str, Any]:
        return {own: self.attention._parameters.get(name) for name, own in PARAMETERS.items()}

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias"):
            return self._parameters[name]
        if name in ("out_features", "in_features"):
            return self.weight.shape[name == "in_features"]
        if name == "attention":
            raise AttributeError(name)
        return getattr(self.attention, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "attention":
            super().__setattr__(name, value)
        else:
            setattr(self.attention, f"in_proj_{name}", value)


class InProjectionKind(LinearKind):
    """A linear layer that the attention reads and never calls."""

    multiplies = False

    def matches(self, module: object) -> bool:
        return isinstance(module, InProjection)

    def usual(self, module: InProjection) -> bool:
        return True

    def fused(self, module: object) -> bool:
        return False

    def fits(self, module: InProjection, weight: Tensor) -> bool:
        return weight.shape == (3 * module.attention.embed_dim, module.attention.embed_dim)
