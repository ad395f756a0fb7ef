"""``Plan``: how a layer computes its output with the changes of its adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import PeanutError
from ...operators import Between, Delta, LowRank
from ...operators.delta import autocasts, product_dtype, recomputed
from ...operators.inference import few_tokens
from ...operators.random_bases import RandomBases
from ...protocols import Change
from ...weights import FrozenLayer, with_tensors
from ...weights.stored import stored

__all__ = ["Plan", "for_samples"]

SHARE = 16
"""The low-rank adapters of a batch's samples share one product for at most 64 tokens, or if their ranks together are at
most 1/16 of the weight's smaller dimension: beyond that, ranks of other rows' adapters cost more than this saves."""


@dataclass(frozen=True)
class Plan:
    """y = L (W R + Δ) S x + L b + shift, as one frozen layer computes it.

    Args:
        frozen: the layer.
        change: of all adapters that act, together.
        dropped: the Δ whose input is dropped out, each with its probability; they stand in ``change`` beside its Δ.
        ready: for evaluation of a plain linear layer, its matrix and its bias; ``change`` is then made for inference.
    """

    frozen: FrozenLayer
    change: Change
    dropped: tuple[tuple[Delta, float], ...] = ()
    ready: tuple[Tensor, Tensor | None] | None = None

    @classmethod
    def of(cls, frozen: FrozenLayer, changes: Sequence[Change], *, training: bool) -> Plan:
        """The computation of a layer with all ``changes``."""
        drops = training and frozen.kind.takes_activations and frozen.kind.multiplies
        dropped: list[tuple[Delta, float]] = []
        whole: list[Change] = []
        for change in changes:
            if drops and change.dropout and change.delta is not None:
                dropped.append((change.delta, change.dropout))
                whole.append(replace(change, delta=None))
            else:
                whole.append(change)
        return cls(frozen, Change.together(whole), tuple(dropped))

    def for_inference(self, dtype: torch.dtype) -> Plan:
        """The same computation for evaluation in ``dtype``, with all computed beforehand that few tokens can use."""
        module = self.frozen.module
        if not self.frozen.kind.fused(module):
            return self
        if module.weight.dtype != dtype:  # under autocast: a copy of the weight is not kept
            return Plan(self.frozen, self.change.for_inference(dtype))
        change, weight, bias = self._with_bias(self.change.for_inference(dtype), dtype)
        return Plan(self.frozen, change, (), (weight, bias))

    def _with_bias(self, change: Change, dtype: torch.dtype) -> tuple[Change, Tensor, Tensor | None]:
        """Of a plain linear layer: the change, its matrix and its bias, which takes in a shift where it can."""
        kind, module = self.frozen.kind, self.frozen.module
        weight, bias = kind.matrix(module, module.weight), module.bias
        if autocasts(weight.device):  # else other dtypes are an error, as in the layer itself
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        if change.left is None and change.shift is not None and not self.dropped:
            bias, change = change.offset(bias), replace(change, shift=None)
        return change, weight, bias

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y for x; what else is given goes to the layer."""
        kind, module, change = self.frozen.kind, self.frozen.module, self.change
        if self.ready is not None and not args and not kwargs and kind.fused(module):
            return self._fused(x, *self.ready, change)
        if self.frozen.without_storage and not x.is_meta:
            raise PeanutError(
                "an input, and weights of the base that have no storage (on the meta device)",
                "weights that are there",
                "load them first",
            )
        if not kind.multiplies or (
            not kind.takes_features and (change.rotation is not None or change.in_scale is not None)
        ):
            y = self._rebuilt(x, *args, **kwargs)
            around = [(Between(change.left, delta, change.in_scale), chance) for delta, chance in self.dropped]
            return self._with_dropped(y, x, around)
        if not args and not kwargs and kind.fused(module):
            dtype = product_dtype(x)
            change, weight, bias = self._with_bias(change.to(dtype), dtype)
            return self._fused(x.to(dtype), weight, bias, change)
        change = change.to(x.dtype if kind.takes_activations else module.weight.dtype)
        seen = x if change.in_scale is None else change.in_scale.apply(x)
        y = self.frozen.output(seen if change.rotation is None else change.rotation.apply(seen), *args, **kwargs)
        if change.delta is not None:
            if kind.quantised and change.rotation is None:  # reading W again would dequantise it again
                y = y + change.delta.beside(seen, y, getattr(module, "bias", None)).to(y.dtype)
            else:
                y = y + kind.respond(module, seen, change.delta).to(y.dtype)
        return self._behind(x, self._with_dropped(y, seen, self.dropped), change)

    def _fused(self, x: Tensor, weight: Tensor, bias: Tensor | None, change: Change) -> Tensor:
        """Of a plain linear layer, whose product the change joins."""
        if change.in_scale is not None:
            x = change.in_scale.apply(x)
        if change.rotation is not None:
            y = change.rotation.turned(x, weight, bias)
            y = y if change.delta is None else y + change.delta.apply(x)
        else:
            y = F.linear(x, weight, bias) if change.delta is None else change.delta.joined(x, weight, bias)
        return self._behind(x, self._with_dropped(y, x, self.dropped), change)

    def _with_dropped(self, y: Tensor, seen: Tensor, dropped: Sequence[tuple[Delta, float]]) -> Tensor:
        for delta, probability in dropped:
            x = F.dropout(seen, probability)
            y = y + self.frozen.kind.respond(self.frozen.module, x, delta.to(x.dtype)).to(y.dtype)
        return y

    def _behind(self, x: Tensor, y: Tensor, change: Change) -> Tensor:
        """L y + shift, bias and all, for the input x."""
        if change.left is not None:
            kind, module = self.frozen.kind, self.frozen.module
            turned = kind.on_output(module, y, change.left.to(y.dtype).apply).to(y.dtype)
            y = kind.replaced(module, x, y, turned)
        return self._shifted(y, change.shift)

    def _rebuilt(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer called with W' and b', for kinds whose input or output cannot be changed instead.

        W' is made again in the backward rather than kept.
        """
        kind, module, change = self.frozen.kind, self.frozen.module, self.change
        # In the backward the module may have others.
        weight, bias = self.frozen.readable(stored(module, "weight")), stored(module, "bias")

        def run(x: Tensor) -> Tensor:
            wide = torch.promote_types(weight.dtype, torch.float32)
            own = {"weight": kind.layout(module, change.matrix(kind.matrix(module, weight).to(wide))).to(weight.dtype)}
            offset = change.offset(bias)
            if bias is not None and offset is not None:
                own["bias"] = offset.to(bias.dtype)
            y: Tensor = with_tensors(module, own, x, *args, **kwargs)
            return self._shifted(y, offset if bias is None else None)

        return recomputed(run, x) if kind.multiplies else run(x)

    def _shifted(self, y: Tensor, shift: Tensor | None) -> Tensor:
        if shift is None:
            return y
        return self.frozen.kind.on_output(self.frozen.module, y, lambda each: each + shift.to(each.dtype))


def for_samples(groups: Sequence[tuple[Tensor, Sequence[Change]]], x: Tensor, *, training: bool) -> Change | None:
    """The changes of a batch's samples as one change, in which each row sees the ranks of its own adapter.

    Args:
        groups: rows of the batch, and the changes that are for them.
        x: the layer's input, (rows, …, in).

    Returns:
        ``None`` if some are more than a low-rank Δ, or if a product for each group is cheaper.
    """
    found = [(rows, change) for rows, own in groups for change in own]
    if not found or not all(each.adds and each.shift is None and not (training and each.dropout) for _, each in found):
        return None
    deltas = [change.delta for _, change in found]
    if not torch.is_grad_enabled():  # no backward has to save memory: VeRA's factors may be made
        deltas = [each.for_inference(x.dtype) if isinstance(each, RandomBases) else each for each in deltas]
    low = [delta for delta in deltas if isinstance(delta, LowRank) and delta.gate is None]
    if len(low) < len(found) or (not few_tokens(x) and SHARE * sum(delta.rank for delta in low) > min(low[0].shape)):
        return None
    seen = x.new_zeros(len(x), *(1,) * (x.dim() - 2), len(low))
    for number, (rows, _) in enumerate(found):
        seen[rows, ..., number] = 1
    gated = [delta.gated(seen[..., number, None]) for number, delta in enumerate(low)]
    return Change(delta=LowRank.sum(gated))
