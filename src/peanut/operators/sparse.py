"""Δ that is zero except at fixed positions; the operator of SHiRA."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from .delta import Delta
from .inference import Evaluated
from .materialised import Materialised

__all__ = ["Sparse"]

_AT_ONCE = 512  # tokens whose gradients are transposed together


@dataclass(frozen=True, eq=False)
class Sparse(Materialised):
    """Δ[places[0, k], places[1, k]] = values[k], and zero elsewhere; values alone have a gradient.

    One product with W + Δ beats a sparse product for more than a few tokens, so Δ is built. The gradient is that of
    values alone: Σ_t g[t, places[0, k]] · x[t, places[1, k]].

    Args:
        values: (n).
        places: rows and columns, (2, n), integers, no place twice.
        size: (out, in).
    """

    trained = ("values",)

    values: Tensor
    places: Tensor
    size: tuple[int, int]

    def dense(self) -> Tensor:
        return self.onto(self.values.new_zeros(self.size))

    def onto(self, weight: Tensor) -> Tensor:
        rows, columns = self.places.long().unbind()
        out, inputs = self.size
        if weight.T.is_contiguous():  # the sum keeps the layout, so that its products are those of the weight
            flat = weight.T.reshape(-1).scatter_add(0, columns * out + rows, self.values)
            return flat.view(inputs, out).T
        return weight.reshape(-1).scatter_add(0, rows * inputs + columns, self.values).view(self.size)

    def pull(self, grad: Tensor) -> tuple[Tensor, ...]:
        rows, columns = self.places.long().unbind()
        return (grad.reshape(-1)[rows * self.size[1] + columns],)

    def pulled(self, grads: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """By a product at the places alone, where torch has one and it is faster than the whole product."""
        out, inputs = self.size
        if (
            10 * len(self.values) > out * inputs
            or grads.device.type != "cpu"
            or torch.finfo(grads.dtype).bits < 32
            or torch.is_grad_enabled()  # a backward that is differentiated itself
            or torch.compiler.is_compiling()
        ):
            return super().pulled(grads, tokens)
        starts, columns, order = self._by_rows()
        found = _compressed(starts, columns, torch.zeros_like(self.values), self.size)
        for some, seen in zip(grads.split(_AT_ONCE), tokens.split(_AT_ONCE), strict=True):
            found = torch.sparse.sampled_addmm(found, some.T, seen)
        values = torch.empty_like(self.values)
        values[order] = found.values()
        return (values,)

    def for_inference(self, dtype: torch.dtype) -> Delta:
        cast, device = self.to(dtype), self.values.device
        if not (device.type == "cuda" or (device.type == "cpu" and torch.backends.mkl.is_available())):
            return cast  # torch has no sparse product there
        values = cast.values.to(torch.promote_types(dtype, torch.float32))
        starts, columns, order = self._by_rows()
        return _EvaluatedSparse(cast, _compressed(starts, columns, values[order], self.size))

    def _by_rows(self) -> tuple[Tensor, Tensor, Tensor | slice]:
        """Where each row starts among the places in order of their rows, their columns, and that order."""
        rows, columns = self.places.int()
        order: Tensor | slice = slice(None)  # nearly always
        if bool((rows[1:] < rows[:-1]).any()):
            order = rows.argsort()
            rows, columns = rows[order], columns[order]
        edges = torch.arange(self.size[0] + 1, dtype=torch.int32, device=rows.device)
        return torch.searchsorted(rows, edges, out_int32=True), columns, order


@dataclass(frozen=True, eq=False)
class _EvaluatedSparse(Evaluated):
    """Keeps Δ as a sparse matrix, in at least 32 bits, as not every device has its products in 16."""

    matrix: Tensor

    def answer(self, tokens: Tensor) -> Tensor:
        wide = tokens.to(self.matrix.dtype)
        with torch.autocast(tokens.device.type, enabled=False):
            y = (self.matrix @ wide[0]).unsqueeze(0) if len(wide) == 1 else (self.matrix @ wide.T).T
        return y.to(tokens.dtype)


def _compressed(starts: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    """A matrix by rows. Its places are in 32 bits, since those in 64 are converted at every product."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that such tensors are in beta
        return torch.sparse_csr_tensor(starts, columns, values, size, check_invariants=False)
