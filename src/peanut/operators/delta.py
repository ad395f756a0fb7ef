"""``Delta``: the interface of an update Δ that is added to a weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from .operator import Operator

__all__ = [
    "Delta",
    "applied",
    "autocasts",
    "batched",
    "captured",
    "product_dtype",
    "recomputed",
    "shaped",
    "transformed",
    "wide",
]


class Delta(Operator, ABC):
    """A linear operator Δ of shape (out, in) that is added to a weight: W' = W + Δ.

    An author writes the abstract two. The others have defaults in terms of these; an operator overrides one where it
    knows something faster, or smaller for the backward.

    Laws, checked for every operator in float64, forward and backward:
        ``apply(x)`` is ``x @ dense().T``; ``rows(ids)`` is ``dense().T[ids]``;
        ``joined(x, W, b)`` is ``x @ (W + dense()).T + b`` for a frozen W;
        ``beside(x, x @ W.T + b, b)`` is ``apply(x)``;
        ``factors()``, if given, is (up, down) with ``up @ down`` equal to ``dense()``;
        the backward of ``apply`` and ``joined`` saves nothing of the size of ``dense()``.
    An operator without one matrix (of each sample, of each token) has no ``dense`` and no ``rows``, and raises there.
    """

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """Δ on activations: (…, in) → (…, out)."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Δ as a matrix, (out, in): for merging and for tests, never stored in training."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in): that of ``dense()``, where an operator does not know it without."""
        out, inputs = self.dense().shape
        return out, inputs

    def joined(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (W + Δ)ᵀ + b for a frozen W (out, in), in whatever order of products is cheapest: (…, in) → (…, out)."""
        return F.linear(x, weight, bias) + self.apply(x)

    def beside(self, x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
        """Δ x where y = W x + b, the layer's own output, is there already: ``apply`` unless Δ contains W."""
        return self.apply(x)

    def rows(self, ids: Tensor) -> Tensor:
        """Δᵀ at the rows ``ids``: (…) → (…, out), as an embedding reads it."""
        return self.dense().T[ids]

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(up, down) of shapes (out, r) and (r, in) if Δ is their product, else ``None``."""
        return None

    def onto(self, weight: Tensor) -> Tensor:
        """W + Δ, a new tensor."""
        return weight + self.dense()

    @torch.no_grad()
    def singular_values(self) -> Tensor:
        """The singular values of Δ in float64, largest first: min(out, in) of them, or r for a product of rank r.

        With up = Q R and downᵀ = P S (thin QR), those of up·down are those of the r × r matrix R Sᵀ.
        """
        factors = self.factors()
        if factors is None or factors[0].shape[1] >= min(factors[0].shape[0], factors[1].shape[1]):
            core = self.dense().double()
        else:
            up, down = factors
            core = torch.linalg.qr(up.double()).R @ torch.linalg.qr(down.T.double()).R.T
        values: Tensor = torch.linalg.svdvals(core)
        return values


def shaped(y: Tensor, places: Sequence[int]) -> Tensor:
    """y, (tokens, out), reshaped to (*places, out) without being a view.

    Autograd forbids in-place changes of a view that a function returns, and the next module may make them.
    """
    if transformed():
        return y.reshape(*places, y.shape[-1])
    return torch.ops.aten._unsafe_view.default(y, [*places, y.shape[-1]])  # type: ignore[no-any-return]


def applied(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """What an autograd function answers; it has no rules for what is ``transformed``."""
    return function.apply(*arguments)  # type: ignore[no-any-return]


def transformed() -> bool:
    """Whether torch makes something else of what is computed: torch.func, forward-mode AD, jit.trace, make_fx, export.

    It is then computed in ordinary operations, none of them in place, for which all of these have rules, and the size
    of the input decides nothing.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active()
    return _watched()


def captured() -> bool:
    """Whether a graph is made, which serves inputs of other sizes too."""
    return torch.compiler.is_compiling() or _watched()


_PROXY = torch._C._TorchDispatchModeKey.PROXY


def _watched() -> bool:
    """Whether the operations that are run now are seen by more than autograd; every layer asks, for every token."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._is_tracing()
        or torch._C._get_dispatch_mode(_PROXY) is not None
    )


def batched(grad: Tensor) -> bool:
    """Whether a backward is given several gradients at once (``is_grads_batched``, ``vectorize``).

    They have rules for ordinary operations only, and cannot be written to a tensor that is none of them.
    """
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(grad)


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)``, of which only x is saved: the backward runs it again. It must not be random."""
    if not torch.is_grad_enabled() or transformed():
        return function(x)
    y: Tensor = checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
    return y


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on there."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a product with ``x``: its own, or the one that autocast has products computed in now."""
    own = x.dtype == torch.float64 or not autocasts(x.device)
    return x.dtype if own else torch.get_autocast_dtype(x.device.type)


def wide(values: Tensor) -> Tensor:
    """In 32 bits or more: torch neither factorises, nor solves, nor transforms in 16."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
