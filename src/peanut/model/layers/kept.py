"""A layer's changes as evaluation applies them: what can be computed beforehand is, and kept while nothing changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...operators import LowRank, Operator
from ...operators.inference import FEW
from ...protocols import Change
from ...versions import counted, version
from .parameters import Place

__all__ = ["Beside", "Kept", "Settled"]

V = TypeVar("V")

SHARE = 16
"""A batch's adapters act by one product of all their ranks for few tokens, or where these ranks together are at most
one in so many of the weight's smaller dimension: beyond that, ranks that a row does not see cost more than they
save."""


def _versions(places: Sequence[Place]) -> list[tuple[object, ...]] | None:
    """A value that changes whenever a tensor at one of the places does.

    ``None`` where nobody counts: a tensor is no longer there, was made in inference mode, or is fake.
    """
    found = []
    for owner, name in places:
        tensor = owner.get(name)
        if tensor is None or not counted(tensor):
            return None
        found.append(version(tensor))
    return found


class Kept(Generic[V]):
    """A value that was computed from tensors, good as long as none of them changes.

    Args:
        key: what else it depends on.
        places: where the tensors are kept.
        value: what was computed.
    """

    def __init__(self, key: Any, places: Sequence[Place], value: V) -> None:
        self.key, self.places, self.value = key, places, value
        self.versions = _versions(places)

    def holds(self, key: Any) -> bool:
        """Whether it is still what would be computed."""
        return bool(self.key == key) and self.versions is not None and self.versions == _versions(self.places)


@dataclass(frozen=True)
class Settled:
    """y = W' x + b' for a plain layer, its parts in the dtype of the products.

    Args:
        delta, rotation, out_scale, in_scale: those of a ``Change``.
        bias: what is added inside the product.
        correction: what is added to the output after its gains.
    """

    delta: Operator | None
    rotation: Operator | None
    out_scale: Tensor | None
    in_scale: Tensor | None
    bias: Tensor | None
    correction: Tensor | None

    @classmethod
    def of(cls, change: Change, bias: Tensor | None, dtype: torch.dtype) -> Settled:
        """The change of a layer with the bias b."""
        joined = change.delta is not None and change.rotation is None and change.out_scale is None
        inside, outside = (change.offset(bias), None) if joined else (bias, change.correction(bias))
        parts = (change.out_scale, change.in_scale, inside, outside)
        return cls(
            None if change.delta is None else change.delta.settled(dtype),
            None if change.rotation is None else change.rotation.settled(dtype),
            *(None if part is None else part.to(dtype) for part in parts),
        )

    def answer(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's output, (…, out), for x (…, in) and W (out, in), all in one dtype."""
        if self.in_scale is not None:
            x = x * self.in_scale
        if self.rotation is not None:
            y = self.rotation.turned(x, weight, self.bias)
            y = y if self.delta is None else y + self.delta.apply(x)
        else:
            y = F.linear(x, weight, self.bias) if self.delta is None else self.delta.joined(x, weight, self.bias)
        if self.out_scale is None:
            return y if self.correction is None else y.add_(self.correction)
        return y.mul_(self.out_scale) if self.correction is None else torch.addcmul(self.correction, y, self.out_scale)


@dataclass(frozen=True)
class Beside:
    """What the adapters of a batch's samples add, as one low-rank operator of which each row sees its own ranks.

    Args:
        low: the adapters' Δ side by side.
        seen: (rows, ranks), one where a row goes through the adapter that the rank belongs to, else zero.
    """

    low: LowRank
    seen: Tensor

    @classmethod
    def of(cls, deltas: Sequence[tuple[Tensor, LowRank]], x: Tensor) -> Beside:
        """From each adapter's rows of the input x, and its Δ."""
        seen, first = x.new_zeros(x.shape[0], sum(delta.rank for _, delta in deltas)), 0
        for rows, delta in deltas:
            seen[rows, first : first + delta.rank] = 1
            first += delta.rank
        return cls(LowRank.sum([delta for _, delta in deltas]).to(x.dtype), seen)

    def pays(self, x: Tensor) -> bool:
        """Whether one product costs less than one for each adapter."""
        few = x.numel() <= FEW * x.shape[-1]
        return few or self.low.rank * SHARE <= min(self.low.shape)

    def answer(self, x: Tensor) -> Tensor:
        """What is added to the layer's output, (rows, …, out), for x (rows, …, in)."""
        return self.low.weighted(x, self.seen.view(len(x), *(1,) * (x.dim() - 2), -1))
