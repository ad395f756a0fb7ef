"""Orthogonal operators on a layer's input: block-diagonal, butterfly products, products of Householder reflections."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .operator import Operator

__all__ = ["BlockDiagonal", "Butterfly", "Householder", "cayley", "cayley_neumann"]

WIDTH = 32
"""Narrower blocks are set side by side up to this width: one product of that size is up to five times as fast as many
tiny ones."""


@dataclass(frozen=True)
class BlockDiagonal(Operator):
    """R = diag(R₁, …, R_n), the blocks (n, b, b) repeated ``copies`` times along the diagonal.

    The shape is (copies·n·b, copies·n·b). The backward keeps x and the blocks.
    """

    blocks: Tensor
    copies: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        width = self.copies * self.blocks.shape[0] * self.blocks.shape[1]
        return width, width

    def apply(self, x: Tensor) -> Tensor:
        blocks, copies = self.blocks, self.copies
        if blocks.shape[0] == 1:
            side = _side(copies, blocks.shape[1])
            blocks, copies = blocks.expand(side, -1, -1), copies // side
        return _mixed(x, blocks[None], (1,), copies)

    def rotated(self, weight: Tensor) -> Tensor:
        """W · R for W (…, in), R never written out."""
        return BlockDiagonal(self.blocks.transpose(1, 2), self.copies).apply(weight)

    def dense(self) -> Tensor:
        blocks = self.blocks.repeat(self.copies, 1, 1)
        return _side_by_side(blocks, blocks.shape[0])[0]

    def to(self, dtype: torch.dtype) -> BlockDiagonal:
        return BlockDiagonal(self.blocks.to(dtype), self.copies)


@dataclass(frozen=True)
class Butterfly(Operator):
    """R = F₀ F₁ … F_{f-1}, block-diagonal factors between permutations: F_i = P_i diag(R_i1, …, R_in) P_iᵀ.

    Factor i mixes pairs of half blocks that lie 2^i half blocks apart, as in a fast Fourier transform, so that f
    factors of blocks of b reach across b·2^(f-1) features. The backward keeps x and the blocks, and computes again what
    lies between the factors.

    Args:
        levels: the factors' blocks, (f, n, b, b); b even and n a multiple of 2^(f-1) if f > 1.
    """

    levels: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        width = self.levels.shape[1] * self.levels.shape[2]
        return width, width

    def apply(self, x: Tensor) -> Tensor:
        return _mixed(x, self.levels.flip(0), self._distances()[::-1])

    def rotated(self, weight: Tensor) -> Tensor:
        """W · R for W (…, in), R never written out."""
        return _mixed(weight, self.levels.transpose(2, 3), self._distances())

    def dense(self) -> Tensor:
        eye = torch.eye(self.shape[0], dtype=self.levels.dtype, device=self.levels.device)
        return self.rotated(eye)

    def to(self, dtype: torch.dtype) -> Butterfly:
        return Butterfly(self.levels.to(dtype))

    def _distances(self) -> tuple[int, ...]:
        return tuple(2**level for level in range(self.levels.shape[0]))


@dataclass(frozen=True)
class Householder(Operator):
    """R = I − V K Vᵀ with V (in, r) and K (r, r), a product of r reflections in compact form: two thin products.

    The backward keeps x, V and K.
    """

    vectors: Tensor
    core: Tensor

    @staticmethod
    def reflections(directions: Tensor) -> Householder:
        """H₁ H₂ … H_r with H_i = I − 2 u_i u_iᵀ for the directions u_i/‖u_i‖, the columns (in, r).

        The columns of V are u₁, u₂−u₁, u₃, u₄−u₃, …: of two equal reflections nothing is left, exactly and in every
        dtype, where I − U T Uᵀ would leave the rounding of a difference. With E the inner products of V between
        different pairs (upper triangle) and D those within them, K = (D + E)⁻¹; D⁻¹ is known in closed form,
        [[2q, 2q−2], [2, 2]] with q = ‖u₂−u₁‖² for a pair and 2 for a reflection that is left over.
        """
        r, device = directions.shape[1], directions.device
        # One row for each direction, so that equal directions are normalised to equal bits.
        units = F.normalize(directions.T.contiguous(), dim=1, eps=torch.finfo(directions.dtype).tiny)
        place = torch.arange(r, device=device)
        rows = torch.where(place[:, None] % 2 == 1, units - units.roll(1, 0), units)
        first = torch.arange(0, r - 1, 2, device=device)
        eye = torch.eye(r, dtype=units.dtype, device=device)
        with _in_full(device):
            products = rows @ rows.T
            q = products[first + 1, first + 1]
            inverse = 2 * eye
            inverse[first, first] = 2 * q
            inverse[first, first + 1] = 2 * q - 2
            inverse[first + 1, first] = 2.0
            between = products * (place[:, None] // 2 < place // 2)
            core = torch.linalg.solve_triangular(eye + inverse @ between, inverse, upper=True, unitriangular=True)
        return Householder(rows.T, core)

    @staticmethod
    def orthogonal(directions: Tensor) -> Householder:
        """I − 2 Q Qᵀ, the reflections in an orthonormal basis Q of the directions' span, (in, r)."""
        with _in_full(directions.device):
            basis = torch.linalg.qr(directions).Q
        return Householder(basis, 2 * torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device))

    @property
    def shape(self) -> tuple[int, int]:
        return self.vectors.shape[0], self.vectors.shape[0]

    def apply(self, x: Tensor) -> Tensor:
        x, vectors, core = _together(x, self.vectors, self.core)
        y: Tensor = _Reflected.apply(x, vectors, core)  # type: ignore[no-untyped-call]
        return y

    def beyond_identity(self) -> tuple[Tensor, Tensor]:
        """I − U T Uᵀ is I plus a product of rank r."""
        return -self.vectors @ self.core, self.vectors.T

    def rotated(self, weight: Tensor) -> Tensor:
        """W · R for W (…, in), R never written out."""
        return Householder(self.vectors, self.core.T).apply(weight)

    def dense(self) -> Tensor:
        eye = torch.eye(self.shape[0], dtype=self.vectors.dtype, device=self.vectors.device)
        return eye - self.vectors @ self.core @ self.vectors.T

    def to(self, dtype: torch.dtype) -> Householder:
        return Householder(self.vectors.to(dtype), self.core.to(dtype))


def cayley(skew: Tensor) -> Tensor:
    """(I + S)(I − S)⁻¹, orthogonal for skew-symmetric S (…, b, b), which I − S is always invertible for."""
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    with _in_full(skew.device):
        solved: Tensor = torch.linalg.solve_ex(eye - skew, eye + skew).result  # unchecked: no device is waited for
    return solved


def cayley_neumann(skew: Tensor, terms: int) -> Tensor:
    """The first terms of the series of ``cayley``: I + 2S + 2S² + … + Sᵐ, the last power once; m = terms − 1.

    Three terms are taken as four, as the peer does.
    """
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device).expand(skew.shape)
    if terms == 1:
        return eye.clone()
    if terms == 2:
        return eye + 2 * skew
    total, power = eye + 2 * skew, skew
    with _in_full(skew.device):
        for _ in range(2, max(terms, 4) - 1):
            power = power @ skew
            total = total + 2 * power
        return total + power @ skew


def _mixed(x: Tensor, factors: Tensor, distances: tuple[int, ...], copies: int = 1) -> Tensor:
    """x turned by one block-diagonal factor after the other, in the order given: (…, in) → (…, in).

    Args:
        x: (…, copies·n·b).
        factors: (f, n, b, b).
        distances: for each factor, how many half blocks apart the two halves of what a block mixes lie.
        copies: how many stretches of n·b features go through the same blocks.
    """
    n, b = factors.shape[1:3]
    wide = torch.stack([_side_by_side(blocks, _side(n, b)) for blocks in factors])
    x, wide = _together(x, wide)
    y: Tensor = _Mixed.apply(x.reshape(x.shape[:-1].numel() * copies, n * b), wide, b // 2, distances)  # type: ignore[no-untyped-call]
    return y.view(x.shape)


def _side(n: int, b: int) -> int:
    """How many of n blocks of width b to set side by side."""
    return next(side for side in range(max(1, min(n, WIDTH // b)), 0, -1) if n % side == 0)


def _side_by_side(blocks: Tensor, side: int) -> Tensor:
    """Blocks (n, b, b) as block-diagonal ones (n/side, side·b, side·b)."""
    n, b, _ = blocks.shape
    if side == 1:
        return blocks
    spread = torch.diag_embed(blocks.reshape(n // side, side, b, b).permute(0, 2, 3, 1))
    return spread.permute(0, 3, 1, 4, 2).reshape(n // side, side * b, side * b)


def _together(x: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
    """x and an operator's parts in the dtype that products have here: autocast's, where it is on."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        return tuple(tensor.to(dtype) for tensor in (x, *parts))
    return (x, *parts)


def _in_full(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off: rotations are made in the parameters' own dtype, or they would not be orthogonal."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def _gathered(x: Tensor, blocks: Tensor, half: int, distance: int) -> Tensor:
    """(tokens, width) → (blocks, tokens, block), each block's features together."""
    if distance > 1:
        x = x.view(x.shape[0], x.shape[1] // (2 * distance * half), 2, distance, half).transpose(2, 3)
    return x.reshape(x.shape[0], *blocks.shape[:2]).transpose(0, 1)


def _scattered(y: Tensor, half: int, distance: int) -> Tensor:
    """The inverse of ``_gathered``."""
    width, y = y.shape[0] * y.shape[2], y.transpose(0, 1)
    if distance > 1:
        y = y.reshape(y.shape[0], width // (2 * distance * half), distance, 2, half).transpose(2, 3)
    return y.reshape(y.shape[0], width)


class _Mixed(torch.autograd.Function):
    """The product of block-diagonal factors on activations; what lies between the factors is computed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Tensor, half: int, distances: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x, factors)
        ctx.half, ctx.distances = half, distances
        for blocks, distance in zip(factors, distances, strict=True):
            x = _scattered(torch.bmm(_gathered(x, blocks, half, distance), blocks.transpose(1, 2)), half, distance)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, factors = ctx.saved_tensors
        half, distances = ctx.half, ctx.distances
        inputs = []
        for blocks, distance in zip(factors, distances, strict=True):
            inputs.append(_gathered(x, blocks, half, distance))
            if len(inputs) < len(distances):
                x = _scattered(torch.bmm(inputs[-1], blocks.transpose(1, 2)), half, distance)
        grads = []
        for level in range(len(distances) - 1, -1, -1):
            inner = _gathered(grad, factors[level], half, distances[level])
            grads.append(torch.bmm(inner.transpose(1, 2), inputs.pop()))
            if level or ctx.needs_input_grad[0]:
                grad = _scattered(torch.bmm(inner, factors[level]), half, distances[level])
        return grad if ctx.needs_input_grad[0] else None, torch.stack(grads[::-1]), None, None


class _Reflected(torch.autograd.Function):
    """y = x − x V Kᵀ Vᵀ; x V, r numbers a token, is computed again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, vectors: Tensor, core: Tensor) -> Tensor:
        ctx.save_for_backward(x, vectors, core)
        tokens = x.reshape(-1, vectors.shape[0])
        return torch.addmm(tokens, tokens @ vectors @ core.T, vectors.T, alpha=-1).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, vectors, core = ctx.saved_tensors
        tokens, grads = (tensor.reshape(-1, vectors.shape[0]) for tensor in (x, grad))
        hidden, seen = tokens @ vectors, grads @ vectors
        grad_hidden = seen @ core
        grad_x = torch.addmm(grads, grad_hidden, vectors.T, alpha=-1).view(x.shape) if ctx.needs_input_grad[0] else None
        grad_vectors = -(tokens.T @ grad_hidden).addmm_(grads.T, hidden @ core.T)
        return grad_x, grad_vectors, -(seen.T @ hidden)
