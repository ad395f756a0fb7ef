"""Reads and writes the frozen weight of any kind of layer."""

import torch
from torch import Tensor, nn

from .conv import ConvKind
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
    ConvKind(),
    EmbeddingKind(),
    NormKind(),
)
"""Every kind of layer that can be adapted; a new kind is one file and one entry here."""


def fix_storage(model: nn.Module) -> None:
    """Prevents the layers of a model from changing how they store their weight while adapters read it.

    What ``torch.inference_mode()`` made, through which no gradient may pass, becomes ordinary tensors outside of it.
    """
    if not torch.is_inference_mode_enabled():
        for own in {*model.parameters(), *model.buffers()}:
            if type(own) in (nn.Parameter, Tensor) and own.is_inference():
                made = own.detach().clone()
                torch.utils.swap_tensors(
                    own, nn.Parameter(made, own.requires_grad) if isinstance(own, nn.Parameter) else made
                )
    for module in model.modules():
        kind = kind_of(module)
        if kind is not None:
            kind.fix_storage(module)


def kind_of(module: object) -> LayerKind | None:
    """The kind of layer that ``module`` is, or ``None`` if it cannot be adapted."""
    return next((kind for kind in KINDS if kind.matches(module)), None)
