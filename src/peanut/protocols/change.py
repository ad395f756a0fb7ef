"""The change of a layer, the one thing that a weight method returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import PeanutError
from ..operators import Chain, Gained, LowRank, Operator, Sum

__all__ = ["Change"]


@dataclass(frozen=True)
class Change:
    """What a method makes of a layer: y = W x + b becomes y = W' x + b'.

        W' = diag(out_scale) · (W · R + Δ) · diag(in_scale),    b' = bias_scale ⊙ b + shift.

    Each part is optional. From this value alone the library derives the forward, merge and unmerge, several adapters
    at once, adapters per sample, and the export.

    Args:
        delta: Δ, an operator of shape (out, in).
        rotation: R, an operator of shape (in, in) on the layer's input.
        out_scale: gains of the rows of the weight, (out).
        in_scale: gains of its columns, (in).
        bias_scale: gains of the bias, (out).
        shift: what is added to the bias, (out).
        dropout: probability with which, in training, an entry of Δ's input is zeroed.
        gate: (batch, tokens, 1), what a mixture multiplies Δ's answer by, token by token.
    """

    delta: Operator | None = None
    rotation: Operator | None = None
    out_scale: Tensor | None = None
    in_scale: Tensor | None = None
    bias_scale: Tensor | None = None
    shift: Tensor | None = None
    dropout: float = 0.0
    gate: Tensor | None = None

    @property
    def adds(self) -> bool:
        """Whether it only adds to the weight and the bias."""
        return self.rotation is None and self.out_scale is None and self.in_scale is None and self.bias_scale is None

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """(up, down) whose product is W' − W for W (out, in), where they are known."""
        if self.out_scale is not None or self.in_scale is not None:
            return None
        if self.rotation is None:
            return None if self.delta is None else self.delta.factors()
        turned = self.rotation.beyond_identity()
        if turned is None or self.delta is not None:
            return None
        return weight.to(turned[0].dtype) @ turned[0], turned[1]

    @staticmethod
    def together(changes: Sequence[Change]) -> Change:
        """Several changes of one layer as one: the definition of several active adapters.

        Deltas and shifts add, gains multiply, rotations compose in the order given, the first next to the weight:
        W' = diag(Π out_scale) · (W · R₁ R₂ … + Σ Δ) · diag(Π in_scale). Dropout and gates are not carried over.
        """
        if len(changes) == 1:
            return changes[0]
        deltas = [change.delta for change in changes if change.delta is not None]
        rotations = [change.rotation for change in changes if change.rotation is not None]
        return Change(
            delta=_sum(deltas),
            rotation=None if not rotations else rotations[0] if len(rotations) == 1 else Chain(tuple(rotations)),
            out_scale=_product([change.out_scale for change in changes]),
            in_scale=_product([change.in_scale for change in changes]),
            bias_scale=_product([change.bias_scale for change in changes]),
            shift=_total([change.shift for change in changes]),
        )

    def after(self, merged: Change) -> Change:
        """What is still to be done to a layer into which ``merged`` is written, so that both are done ``together``.

        Raises:
            PeanutError: there is no such change: a rotation is left, and what is merged would be turned by it.
        """
        if self.rotation is not None and not (merged.delta is None and merged.in_scale is None):
            raise PeanutError(
                "an adapter that adds to the weight would be merged beside an unmerged one that turns its input",
                "both merged or neither",
                "merge all active adapters together, or fewer",
            )
        delta, shift = self.delta, self.shift
        if delta is not None and not (merged.out_scale is None and merged.in_scale is None):
            delta = Gained(delta, merged.out_scale, merged.in_scale)
        if merged.shift is not None and self.bias_scale is not None:
            kept = merged.shift - self.bias_scale * merged.shift
            shift = kept if shift is None else shift + kept
        return replace(self, delta=delta, shift=shift)

    def matrix(self, weight: Tensor) -> Tensor:
        """W' written out, (out, in), for W (out, in): for merging, and where a layer has no cheaper way."""
        if self.rotation is not None:
            weight = self.rotation.to(weight.dtype).rotated(weight)
        if self.delta is not None:
            weight = weight + self.delta.dense().to(weight.dtype)
        if self.out_scale is not None:
            weight = self.out_scale.to(weight.dtype)[:, None] * weight
        if self.in_scale is not None:
            weight = weight * self.in_scale.to(weight.dtype)
        return weight

    def offset(self, bias: Tensor | None) -> Tensor | None:
        """b' for b, (out), or ``None`` where there is none and nothing is added."""
        if bias is not None and self.bias_scale is not None:
            bias = self.bias_scale.to(bias.dtype) * bias
        if self.shift is None:
            return bias
        return self.shift if bias is None else bias + self.shift.to(bias.dtype)

    def correction(self, bias: Tensor | None) -> Tensor | None:
        """b' − out_scale ⊙ b: what is still to be added where the layer's own output, bias included, was scaled."""
        left: Tensor | None = None
        if bias is not None and self.bias_scale is not self.out_scale:
            one = bias.new_ones(())
            gains = [one if scale is None else scale for scale in (self.bias_scale, self.out_scale)]
            left = (gains[0] - gains[1]).to(bias.dtype) * bias
        if self.shift is None:
            return left
        return self.shift if left is None else left + self.shift.to(left.dtype)


def _sum(deltas: Sequence[Operator]) -> Operator | None:
    if len(deltas) < 2:
        return deltas[0] if deltas else None
    low_rank = [delta for delta in deltas if isinstance(delta, LowRank)]
    return LowRank.sum(low_rank) if len(low_rank) == len(deltas) else Sum(tuple(deltas))


def _product(scales: Sequence[Tensor | None]) -> Tensor | None:
    there = [scale for scale in scales if scale is not None]
    return torch.stack(there).prod(0) if len(there) > 1 else there[0] if there else None


def _total(shifts: Sequence[Tensor | None]) -> Tensor | None:
    there = [shift for shift in shifts if shift is not None]
    return torch.stack(there).sum(0) if len(there) > 1 else there[0] if there else None
