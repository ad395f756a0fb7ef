"""``Change``: what a method does to a layer's weight and bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from ..errors import PeanutError
from ..operators import Between, Delta, Rotation, chain, scaled, total
from ..operators.operator import Operator

__all__ = ["Change"]


@dataclass(frozen=True, eq=False)
class Change(Operator):
    """What a method makes of a layer: y = W x + b becomes y = W' x + b'.

        W' = L (W R + Δ) S,    b' = L b + shift.

    Each part is optional. From this value alone the library derives the forward, merge and unmerge, several adapters
    at once, adapters per sample, and the export.

    Args:
        delta: Δ, an operator of shape (out, in).
        rotation: R, a square operator on the layer's input.
        left: L, a square operator on its output; ``Diagonal`` for a gain of each output.
        in_scale: S, gains of the columns of the weight.
        shift: what is added to the bias, (out).
        dropout: probability with which, in training, an entry of Δ's input is zeroed.
    """

    delta: Delta | None = None
    rotation: Rotation | None = None
    left: Rotation | None = None
    in_scale: Rotation | None = None
    shift: Tensor | None = None
    dropout: float = 0.0

    @property
    def adds(self) -> bool:
        """Whether it only adds to the weight and the bias."""
        return self.rotation is None and self.left is None and self.in_scale is None

    def times(self, factor: float) -> Change:
        """c times what it adds to the weight and the bias.

        Raises:
            PeanutError: it does something else than add.
        """
        if factor == 1.0:
            return self
        if not self.adds:
            raise PeanutError(
                f"a scale of {factor:g} for an adapter that rotates or scales a layer",
                "one that only adds to weights, or 1",
                "leave its scale as it is",
            )
        return replace(
            self,
            delta=None if self.delta is None else scaled(self.delta, factor),
            shift=None if self.shift is None else self.shift * factor,
        )

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """(up, down) whose product is W' − W for W (out, in), where they are known."""
        if self.left is not None or self.in_scale is not None:
            return None
        if self.rotation is None:
            return None if self.delta is None else self.delta.factors()
        low_rank = self.rotation.beyond_identity()
        if low_rank is None or self.delta is not None:
            return None
        return weight.to(low_rank[0].dtype) @ low_rank[0], low_rank[1]

    @staticmethod
    def together(changes: Sequence[Change]) -> Change:
        """Several changes of one layer as one: the definition of several active adapters.

        Deltas add, gains multiply, and square operators compose in the order given, the first next to the weight:
        W' = … L₂ L₁ (W R₁ R₂ … + Σ Δ) Π S, b' = … L₂ (L₁ b + shift₁) + shift₂ …. Dropout is left out.
        """
        if len(changes) == 1:
            return changes[0]
        shift: Tensor | None = None
        for change in changes:
            shift = shift if shift is None or change.left is None else change.left.apply(shift)
            if change.shift is not None:
                shift = change.shift if shift is None else shift + change.shift
        return Change(
            delta=total([change.delta for change in changes if change.delta is not None]),
            rotation=chain([change.rotation for change in changes if change.rotation is not None]),
            left=chain([change.left for change in reversed(changes) if change.left is not None]),
            in_scale=chain([change.in_scale for change in changes if change.in_scale is not None]),
            shift=shift,
        )

    @staticmethod
    def after(changes: Sequence[Change], merged: Change, whole: Change) -> list[Change]:
        """What is still to be done to a layer into which ``merged`` is written, so that in the end ``whole`` is done.

        Args:
            changes: what is not merged.
            merged: what is in the weight and the bias.
            whole: both together, in the order of their adapters.

        Raises:
            PeanutError: there is no such change: a rotation is left, and it would apply to what is merged.
        """
        rest = Change.together(changes)
        if rest.rotation is not None and not (merged.delta is None and merged.in_scale is None):
            raise PeanutError(
                "an adapter that adds to the weight would be merged beside an unmerged one that rotates its input",
                "both merged or neither",
                "merge all active adapters together, or fewer",
            )
        shift = whole.shift
        if merged.shift is not None and shift is not None:  # what is merged goes through the others' L
            shift = shift - (merged.shift if rest.left is None else rest.left.apply(merged.shift))
        others = [replace(change, shift=None) for change in changes]
        if not (merged.left is None and merged.in_scale is None):
            around = partial(Between, left=merged.left, in_scale=merged.in_scale)
            others = [each if each.delta is None else replace(each, delta=around(inner=each.delta)) for each in others]
        return [*others, Change(shift=shift)]

    def matrix(self, weight: Tensor) -> Tensor:
        """W' as a matrix, (out, in), for W (out, in): for merging, and where a layer has no cheaper way."""
        change = self.to(weight.dtype)
        if change.rotation is not None:
            weight = change.rotation.times(weight)
        if change.delta is not None:
            weight = weight + change.delta.dense()
        if change.left is not None:
            weight = change.left.apply(weight.T).T
        return weight if change.in_scale is None else change.in_scale.times(weight)

    def offset(self, bias: Tensor | None) -> Tensor | None:
        """b' for b, (out), or ``None`` where there is none and nothing is added."""
        if bias is not None and self.left is not None:
            bias = self.left.to(bias.dtype).apply(bias)
        if self.shift is None or bias is None:
            return bias if self.shift is None else self.shift
        return bias + self.shift.to(bias.dtype)
