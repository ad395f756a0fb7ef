"""What an adapted layer must compute, built densely from the definition of its adapters together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peanut import PeftModel
from peanut.model.adapters.adapter_set import AdapterSet
from peanut.model.layers.layer import AdaptedLayer

from .support import Case

__all__ = ["layer_of", "written_out"]


def layer_of(model: PeftModel) -> AdaptedLayer:
    """The only adapted layer of a model."""
    return next(layer for _, layer in AdapterSet.of(model).layers())


def written_out(case: Case, layer: AdaptedLayer, names: Sequence[str], x: Tensor, *, sample: bool = False) -> Tensor:
    """The layer's output, with W' and b' put into a copy of it; nothing of Δ's input is dropped.

    W' = … L₂ L₁ (W R₁ R₂ … + Σ Δ) Π S, b' = … L₂ (L₁ b + shift₁) + shift₂ ….

    Args:
        sample: draw what the methods draw in training.
    """
    changes = [layer.change(name, sample=sample) for name in names]
    kind, module = layer.frozen.kind, case.net().layer
    matrix, bias, shift = layer.frozen.matrix(), layer.frozen.bias(), None
    for change in changes:
        matrix = matrix if change.rotation is None else matrix @ change.rotation.dense()
    for change in changes:
        matrix = matrix if change.delta is None else matrix + change.delta.dense()
    for change in changes:
        matrix = matrix if change.left is None else change.left.dense() @ matrix
        matrix = matrix if change.in_scale is None else matrix @ change.in_scale.dense()
        bias = bias if bias is None or change.left is None else change.left.dense() @ bias
        shift = shift if shift is None or change.left is None else change.left.dense() @ shift
        if change.shift is not None:
            shift = change.shift if shift is None else shift + change.shift
    if bias is not None and shift is not None:
        bias, shift = bias + shift, None
    own = {"weight": kind.layout(module, matrix)} | ({} if bias is None else {"bias": bias})
    y = torch.func.functional_call(module, own, (x,))
    return y if shift is None else kind.on_output(module, y, lambda each: each + shift)
