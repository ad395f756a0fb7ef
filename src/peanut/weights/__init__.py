"""Reads and writes the frozen weight of any kind of layer."""

from torch import nn

from .conv2d import Conv2dKind
from .embedding import EmbeddingKind
from .frozen import FrozenLayer
from .kind import LayerKind, with_tensors
from .linear import Conv1DKind, LinearKind
from .norm import NormKind
from .quantised import Linear4bitKind, Linear8bitKind

__all__ = ["KINDS", "FrozenLayer", "LayerKind", "fix_storage", "kind_of", "with_tensors"]

KINDS: tuple[LayerKind, ...] = (
    Linear4bitKind(),
    Linear8bitKind(),
    LinearKind(),
    Conv1DKind(),
    Conv2dKind(),
    EmbeddingKind(),
    NormKind(),
)
"""Every kind of layer that can be adapted; a new kind is one file and one entry here."""


def fix_storage(model: nn.Module) -> None:
    """Prevents the layers of a model from changing how they store their weight while adapters read it."""
    for module in model.modules():
        kind = kind_of(module)
        if kind is not None:
            kind.fix_storage(module)


def kind_of(module: object) -> LayerKind | None:
    """The kind of layer that ``module`` is, or ``None`` if it cannot be adapted."""
    return next((kind for kind in KINDS if kind.matches(module)), None)
