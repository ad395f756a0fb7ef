"""``AdaptedAttention``: the wrapper around an ``nn.MultiheadAttention`` whose projections adapters change."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from ...weights import FrozenLayer
from ...weights.attention import PARAMETERS, InProjection, InProjectionKind
from ...weights.kind import with_tensors
from .layer import AdaptedLayer
from .state import AdapterState

__all__ = ["AdaptedAttention"]


class AdaptedAttention(AdaptedLayer):
    """An attention that is called with the W' and b' of its input projection, and reads those of ``out_proj``.

    Both are written out, as in Hugging Face PEFT, so the dropout of a change's input is not applied.
    """

    reads: ClassVar[dict[str, str]] = PARAMETERS

    def __init__(self, base_layer: nn.Module, path: str, state: AdapterState) -> None:
        super().__init__(base_layer, FrozenLayer(InProjection(base_layer), InProjectionKind()), path, state)

    @property
    def frozen(self) -> FrozenLayer:
        if self._frozen.module.attention is not self._modules["base_layer"]:
            self._frozen = FrozenLayer(InProjection(self.base_layer), InProjectionKind())
        return self._frozen

    def _width(self, side: int) -> int:  # of the input projection: its output is queries, keys and values together
        return (self.frozen.in_features, self.frozen.out_features)[side]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        base: Any = self._modules["base_layer"]
        tensors = {name: self._effective(own) for name, own in self.reads.items()}
        return with_tensors(base, {name: own for name, own in tensors.items() if own is not None}, *args, **kwargs)
