"""``FrozenLayer``: a layer's original weight as a matrix, and merging into it, which can be undone bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PeanutError
from ..operators.delta import recomputed
from .kind import LayerKind
from .made import changes_in_training, current

__all__ = ["FrozenLayer", "product"]


class FrozenLayer:
    """One frozen layer seen as y = W x + b, W of shape (out, in).

    ``matrix()`` and ``bias()`` are those before any merge, also while something is merged: a weight-aware method
    reads the weight that it was trained on.
    """

    def __init__(self, module: nn.Module, kind: LayerKind) -> None:
        self.module: Any = module
        self.kind = kind
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        self._shared: nn.Parameter | None = None

    @property
    def out_features(self) -> int:
        return self.kind.shape(self.module)[0]

    @property
    def in_features(self) -> int:
        return self.kind.shape(self.module)[1]

    @property
    def merged(self) -> bool:
        return self._weight is not None

    @property
    def untied_from(self) -> nn.Parameter | None:
        """The weight that the layer had shared with another, if a merge gave it one of its own."""
        return None if self.kind.quantised else self._shared

    @property
    def weight(self) -> Tensor:
        """The weight before any merge, as the layer stores it."""
        if self._weight is None:
            return current(self.module, "weight")  # type: ignore[no-any-return]
        return self._weight if self.kind.quantised else self._weight.to(self.module.weight.device)

    def matrix(self) -> Tensor:
        """W before any merge, (out, in).

        Raises:
            PeanutError: it is another one in each forward of training.
        """
        return self.kind.matrix(self.module, self._readable())

    def product(self, A: Tensor, *, transposed: bool = False) -> Tensor:
        """W Aᵀ for A (r, in), or transposed Wᵀ Aᵀ for A (r, out): (out, r) or (in, r) in A's dtype.

        W is read in its own dtype and never copied to another.
        """
        module, kind, weight = self.module, self.kind, self._readable()

        def times(A: Tensor) -> Tensor:
            matrix = kind.matrix(module, weight)
            return product(matrix.T if transposed else matrix, A)

        return recomputed(times, A) if kind.quantised else times(A)  # the backward makes the matrix of its codes again

    def _readable(self) -> Tensor:
        if changes_in_training(self.module, "weight"):
            raise PeanutError(
                "the weight changes in each forward of training, by torch.nn.utils.spectral_norm",
                "a weight that can be read before the layer is called",
                "use torch.nn.utils.parametrizations.spectral_norm, or call eval() on that layer",
            )
        return self.weight

    def bias(self) -> Tensor | None:
        """b before any merge, (out), or ``None``."""
        bias: Tensor | None = current(self.module, "bias")
        return bias if bias is None or self._bias is None else self._bias.to(bias.device)

    def down_shape(self, r: int) -> tuple[int, ...]:
        """The shape in which files keep a factor (r, in)."""
        return self.kind.down_shape(self.module, r)

    def up_shape(self, r: int) -> tuple[int, ...]:
        """The shape in which files keep a factor (out, r)."""
        return self.kind.up_shape(self.module, r)

    @torch.no_grad()
    def write(self, matrix: Tensor, bias: Tensor | None, *, shared: bool = False) -> None:
        """Puts a merged matrix (out, in) and bias (out) in place; the first time, saves the originals on the CPU.

        Args:
            bias: the new b, or ``None`` to leave it.
            shared: another layer uses the same weight (a tied head) and must not see the change.

        Raises:
            PeanutError: a value is not finite, or there is a bias to write and the layer has none.
        """
        weight = self.module.weight
        merged = self.kind.layout(self.module, matrix)
        merged = merged if self.kind.quantised else merged.to(weight.dtype)
        if not torch.isfinite(merged).all() or (bias is not None and not torch.isfinite(bias).all()):
            raise PeanutError(
                "the merged weight holds values that are not finite", "finite values", "check the adapter's training"
            )
        if bias is not None and self.bias() is None:
            raise PeanutError(
                "the adapter changes the bias of a layer that has none", "a layer with a bias", "use it unmerged"
            )
        if self._weight is None:
            # Codes are small and stay where they are; another parameter takes their place.
            self._weight = weight if self.kind.quantised else weight.detach().to("cpu", copy=True)
            own_bias = self.bias()
            self._bias = None if own_bias is None else own_bias.detach().to("cpu", copy=True)
            if self.kind.quantised or shared:
                self._shared = weight
            if shared and not self.kind.quantised:
                self.module.weight = nn.Parameter(torch.empty_like(weight), requires_grad=weight.requires_grad)
        if self.kind.quantised:
            self.kind.install(self.module, self.kind.quantise(self.module, merged))
        else:
            self.module.weight.copy_(merged)
        if bias is not None:
            self.module.bias.copy_(bias)

    def original(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's output with its original weight, bit for bit; the merged weight stays where others read it."""
        if not self.merged:
            return self.module(x, *args, **kwargs)
        own, bias = {"weight": self.weight}, self.bias()
        return self.kind.called_with(self.module, own if bias is None else {**own, "bias": bias}, x, *args, **kwargs)

    @torch.no_grad()
    def restore(self) -> None:
        """Undoes every merge, bit for bit."""
        if self._weight is None:
            return
        if self._shared is not None:
            self.kind.install(self.module, self._shared)
        else:
            self.module.weight.copy_(self._weight)
        if self._bias is not None:
            self.module.bias.copy_(self._bias)
        self.forget()

    def forget(self) -> None:
        """Makes the merge permanent: the saved originals are discarded."""
        self._weight = self._bias = None
        self._shared = None


def product(matrix: Tensor, A: Tensor) -> Tensor:
    """M Aᵀ for M (e, d), read in its own dtype and never copied to another, and A (r, d): (e, r), in A's dtype."""
    return (matrix @ A.to(matrix.dtype).T).to(A.dtype)
