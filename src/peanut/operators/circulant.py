"""Δ made of circulant blocks, applied by FFT; the operator of C3A."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .delta import Delta, wide
from .inference import Evaluated
from .materialised import Materialised

__all__ = ["Circulant"]

_AT_ONCE = 256  # tokens that are transformed together


@dataclass(frozen=True, eq=False)
class Circulant(Materialised):
    """Δ of blocks (b, b), the block at (i, j) being scaling · kernel[i, j, (column − row) mod b].

    Each block correlates: y_i[t] = scaling · Σ_j Σ_u kernel[i, j, u] · x_j[(t + u) mod b], a product of real Fourier
    transforms. Building a block is one copy, so that many tokens take one product with W + Δ; few tokens and the
    gradient of the kernel go through the transforms.

    Args:
        kernel: (out/b, in/b, b), the blocks' first rows.
        scaling: a number.
    """

    trained = ("kernel",)

    kernel: Tensor
    scaling: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns, b = self.kernel.shape
        return rows * b, columns * b

    def dense(self) -> Tensor:
        return self._blocks().reshape(self.shape)

    def onto(self, weight: Tensor) -> Tensor:
        rows, columns, b = self.kernel.shape
        apart: Tensor = weight.unflatten(1, (columns, b)).unflatten(0, (rows, b))
        return (apart + self._blocks()).reshape(self.shape)

    def pull(self, grad: Tensor) -> tuple[Tensor, ...]:
        rows, columns, b = self.kernel.shape
        blocks = grad.reshape(rows, b, columns, b).transpose(1, 2)
        # Each row twice, so that a diagonal that leaves a block on the right goes on: from row to row one more.
        diagonals = torch.cat([blocks, blocks], -1).reshape(rows, columns, -1).unfold(2, b, 2 * b + 1).narrow(2, 0, b)
        return (self.scaling * diagonals.sum(2),)

    def pulled(self, grads: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """By transforms, where the blocks are wide enough for them and torch has them in the dtype."""
        rows, columns, b = self.kernel.shape
        if b < 32 or torch.finfo(grads.dtype).bits < 32 or not len(tokens):
            return super().pulled(grads, tokens)
        step = len(tokens) if torch.compiler.is_compiling() else _AT_ONCE
        total: Any = 0
        for some, seen in zip(grads.split(step), tokens.split(step), strict=True):
            high = torch.fft.rfft(some.view(-1, rows, b)).permute(2, 0, 1).contiguous()
            low = torch.fft.ihfft(seen.view(-1, columns, b), norm="forward").permute(2, 1, 0).contiguous()
            products = low @ high  # the frequency first: a product of (columns, tokens) and (tokens, rows) for each
            total = total + products
        kernel: Tensor = torch.fft.irfft(total.conj().permute(2, 1, 0), n=b)
        return (self.scaling * kernel,)

    def rows(self, ids: Tensor) -> Tensor:
        b = self.kernel.shape[-1]
        place = torch.arange(b, device=ids.device)
        at = ids.unsqueeze(-1)
        columns = self.kernel[:, at // b, (at - place) % b].movedim(0, -2)  # (…, out/b, b)
        return self.scaling * columns.flatten(-2)

    def for_inference(self, dtype: torch.dtype) -> Delta:
        cast = self.to(dtype)
        return _EvaluatedCirculant(cast, (self.scaling * torch.fft.rfft(wide(cast.kernel))).conj_physical())

    def _blocks(self) -> Tensor:
        """Δ as (out/b, b, in/b, b): a kernel b times in line, read in rows that begin b − 1 apart."""
        rows, columns, b = self.kernel.shape
        line = (self.scaling * self.kernel).unsqueeze(2).expand(rows, columns, b, b).flatten(2)
        return line.unfold(2, b, max(b - 1, 1))[:, :, :b].transpose(1, 2)


@dataclass(frozen=True, eq=False)
class _EvaluatedCirculant(Evaluated):
    """Few tokens go block by block through short transforms; ``waves`` are the blocks' (out/b, in/b, b/2 + 1)."""

    origin: Circulant
    waves: Tensor

    def answer(self, tokens: Tensor) -> Tensor:
        rows, columns, b = self.origin.kernel.shape
        each = wide(tokens).view(-1, 1, columns, b)
        y: Tensor = torch.fft.irfft((torch.fft.rfft(each) * self.waves).sum(2), n=b)
        return y.reshape(-1, rows * b).to(tokens.dtype)
