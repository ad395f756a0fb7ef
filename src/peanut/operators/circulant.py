"""Δ made of circulant blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .built import product_dtype
from .operator import Operator

__all__ = ["Circulant"]


@dataclass(frozen=True)
class Circulant(Operator):
    """Δ of blocks (b, b), the block at (i, j) being scaling · kernel[i, j, (column − row) mod b].

    Each block correlates: y_i[t] = scaling · Σ_j Σ_u kernel[i, j, u] · x_j[(t + u) mod b], a product of real Fourier
    transforms.

    Args:
        kernel: (out/b, in/b, b), the blocks' first rows.
        scaling: a number.
    """

    kernel: Tensor
    scaling: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns, b = self.kernel.shape
        return rows * b, columns * b

    def apply(self, x: Tensor) -> Tensor:
        dtype = product_dtype(x)
        if x.numel() == 0:  # of which there is no transform
            return F.linear(x.to(dtype), self.dense().to(dtype))
        return _Correlation.apply(x.to(dtype), self.kernel.to(dtype), self.scaling)  # type: ignore[no-any-return, no-untyped-call]

    def rows(self, ids: Tensor) -> Tensor:
        b = self.kernel.shape[-1]
        place = torch.arange(b, device=ids.device)
        at = ids.unsqueeze(-1)
        columns = self.kernel[:, at // b, (at - place) % b].movedim(0, -2)  # (…, out/b, b)
        return self.scaling * columns.flatten(-2)

    def dense(self) -> Tensor:
        b = self.kernel.shape[-1]
        place = torch.arange(b, device=self.kernel.device)
        blocks = self.kernel[..., (place - place[:, None]) % b]
        return self.scaling * blocks.transpose(1, 2).reshape(self.shape)

    def to(self, dtype: torch.dtype) -> Circulant:
        return Circulant(self.kernel.to(dtype), self.scaling)


class _Correlation(torch.autograd.Function):
    """Keeps x and the kernel; every transform is made again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(x, kernel)
        ctx.scaling = scaling
        y = torch.einsum("tjf,ijf->tif", _waves(x, kernel), _transform(kernel).conj())
        return _back(y, kernel, scaling, x).reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, kernel = ctx.saved_tensors
        waves = _waves(grad, kernel)
        grad_x = grad_kernel = None
        if ctx.needs_input_grad[0]:
            into = torch.einsum("tif,ijf->tjf", waves, _transform(kernel))
            grad_x = _back(into, kernel, ctx.scaling, x).reshape(x.shape)
        if ctx.needs_input_grad[1]:
            into = torch.einsum("tif,tjf->ijf", waves.conj(), _waves(x, kernel))
            grad_kernel = _back(into, kernel, ctx.scaling, kernel)
        return grad_x, grad_kernel, None


def _waves(values: Tensor, kernel: Tensor) -> Tensor:
    """The transforms of the blocks of activations: (…, blocks·b) → (tokens, blocks, b/2 + 1)."""
    b = kernel.shape[-1]
    return _transform(values.reshape(-1, values.shape[-1] // b, b))


def _transform(blocks: Tensor) -> Tensor:
    """In at least 32 bits: there is no Fourier transform in 16."""
    waves: Tensor = torch.fft.rfft(blocks.to(torch.promote_types(blocks.dtype, torch.float32)))
    return waves


def _back(waves: Tensor, kernel: Tensor, scaling: float, like: Tensor) -> Tensor:
    values: Tensor = torch.fft.irfft(waves, n=kernel.shape[-1])
    return values.mul_(scaling).to(like.dtype)
