"""Orthogonal operators on a layer's input that mix blocks of features: block-diagonal ones and butterfly products."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .built import product_dtype
from .operator import Operator

__all__ = ["BlockDiagonal", "Butterfly", "Mixing", "cayley", "cayley_neumann", "in_full"]

WIDTH = 32
"""Narrower blocks are set side by side up to this width: one product of that size is up to five times as fast as many
tiny ones."""

SPAN = 3 * 2**19
"""On a CPU so many numbers of the input are turned at a time: the turned ones are still in its cache when the weight
multiplies them, and no copy of the whole input is made."""


@dataclass(frozen=True)
class Mixing(Operator):
    """R = F_f … F₂ F₁: block-diagonal factors, each between permutations, F₁ acting on the input first.

    A factor's block mixes two half blocks of features, or several such pairs. The backward keeps x and the factors.

    Args:
        levels: the factors' blocks, (f, n, b, b).
        half: the features of half a block.
        distances: for each factor, how many half blocks apart the two halves of a pair lie.
    """

    levels: Tensor
    half: int
    distances: tuple[int, ...]

    @staticmethod
    def of(levels: Tensor, distances: tuple[int, ...]) -> Mixing:
        """With narrow blocks side by side; the permutations still go by the halves of the blocks given."""
        n, b = levels.shape[1:3]
        side = next(side for side in range(max(1, min(n, WIDTH // b)), 0, -1) if n % side == 0)
        if side > 1:
            spread = torch.diag_embed(levels.reshape(-1, side, b, b).permute(0, 2, 3, 1))
            levels = spread.permute(0, 3, 1, 4, 2).reshape(-1, n // side, side * b, side * b)
        return Mixing(levels, b // 2, distances)

    @property
    def shape(self) -> tuple[int, int]:
        width = self.levels.shape[1] * self.levels.shape[2]
        return width, width

    def apply(self, x: Tensor) -> Tensor:
        return self._product(x, None, None, None)

    def turned(self, x: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor | None = None) -> Tensor:
        return self._product(x, weight, bias, gain)

    def rotated(self, weight: Tensor) -> Tensor:
        """W · R for W (…, in), R never written out."""
        return Mixing(self.levels.flip(0).transpose(2, 3), self.half, self.distances[::-1]).apply(weight)

    def dense(self) -> Tensor:
        return self.rotated(torch.eye(self.shape[0], dtype=self.levels.dtype, device=self.levels.device))

    def to(self, dtype: torch.dtype) -> Mixing:
        return Mixing(self.levels.to(dtype), self.half, self.distances)

    def _product(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, gain: Tensor | None) -> Tensor:
        dtype = product_dtype(x)
        x, levels = x.to(dtype), self.levels.to(dtype)
        weight, bias = (None if value is None else value.to(dtype) for value in (weight, bias))
        arguments = (x, levels, weight, bias, gain, self.half, self.distances)
        if torch.is_grad_enabled():
            return _Turned.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]
        return _turned(*arguments)


class Blocks(Operator):
    """What is made of blocks: everything is done by the ``Mixing`` that they make."""

    @abstractmethod
    def mixing(self) -> Mixing:
        """The same rotation, its factors in the order in which they act."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.mixing().shape

    def apply(self, x: Tensor) -> Tensor:
        return self.mixing().apply(x)

    def turned(self, x: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor | None = None) -> Tensor:
        return self.mixing().turned(x, weight, bias, gain)

    def rotated(self, weight: Tensor) -> Tensor:
        """W · R for W (…, in), R never written out."""
        return self.mixing().rotated(weight)

    def dense(self) -> Tensor:
        return self.mixing().dense()

    def settled(self, dtype: torch.dtype) -> Operator:
        mixing = self.to(dtype).mixing()
        # Transposed in memory, as products take them: a token's takes a third less time.
        return replace(mixing, levels=mixing.levels.mT.contiguous().mT)


@dataclass(frozen=True)
class BlockDiagonal(Blocks):
    """R = diag(R₁, …, R_n), the blocks (n, b, b) repeated ``copies`` times along the diagonal.

    The shape is (copies·n·b, copies·n·b). The backward keeps x and the blocks.
    """

    blocks: Tensor
    copies: int = 1

    def mixing(self) -> Mixing:
        blocks = self.blocks if self.copies == 1 else self.blocks.repeat(self.copies, 1, 1)
        return Mixing.of(blocks[None], (1,))

    def to(self, dtype: torch.dtype) -> BlockDiagonal:
        return BlockDiagonal(self.blocks.to(dtype), self.copies)


@dataclass(frozen=True)
class Butterfly(Blocks):
    """R = F₀ F₁ … F_{f-1}, block-diagonal factors between permutations: F_i = P_i diag(R_i1, …, R_in) P_iᵀ.

    Factor i mixes pairs of half blocks that lie 2^i half blocks apart, as in a fast Fourier transform, so that f
    factors of blocks of b reach across b·2^(f-1) features. The backward keeps x and the blocks.

    Args:
        levels: the factors' blocks, (f, n, b, b); b even and n a multiple of 2^(f-1) if f > 1.
    """

    levels: Tensor

    def mixing(self) -> Mixing:
        f = self.levels.shape[0]
        return Mixing.of(self.levels if f == 1 else self.levels.flip(0), tuple(2**i for i in reversed(range(f))))

    def to(self, dtype: torch.dtype) -> Butterfly:
        return Butterfly(self.levels.to(dtype))


def _gathered(x: Tensor, blocks: Tensor, half: int, distance: int) -> Tensor:
    """(tokens, width) → (blocks, tokens, block), each block's features together."""
    if distance > 1:
        x = x.view(x.shape[0], x.shape[1] // (2 * distance * half), 2, distance, half).transpose(2, 3)
    return x.reshape(x.shape[0], *blocks.shape[:2]).transpose(0, 1)


def _scattered(y: Tensor, half: int, distance: int) -> Tensor:
    """The inverse of ``_gathered``, the width still in several dimensions."""
    width, y = y.shape[0] * y.shape[2], y.transpose(0, 1)
    if distance > 1:
        y = y.reshape(y.shape[0], width // (2 * distance * half), distance, 2, half).transpose(2, 3)
    return y


def _spans(tokens: Tensor) -> list[slice]:
    """Which tokens to turn at a time: on a CPU some, elsewhere, and in 16 bits, where sums of sums lose digits, all."""
    count, width = tokens.shape
    if tokens.device.type != "cpu" or tokens.dtype.itemsize < 4 or torch.compiler.is_compiling():
        return [slice(None)]
    size = max(1, SPAN // width)
    return [slice(start, start + size) for start in range(0, count, size)] if count > size else [slice(None)]


def _turned(
    x: Tensor,
    factors: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    half: int,
    distances: tuple[int, ...],
) -> Tensor:
    """gain ⊙ (R x) Wᵀ + b, or R x without a W."""
    tokens = x.reshape(-1, x.shape[-1])
    if weight is None:
        return _seen(tokens, factors, half, distances)[-1].view(x.shape)
    spans = _spans(tokens)
    if len(spans) == 1:
        y = F.linear(_seen(tokens, factors, half, distances)[-1], weight, bias)
    else:
        y = tokens.new_empty(tokens.shape[0], weight.shape[0])
        for span in spans:
            seen = _seen(tokens[span], factors, half, distances)[-1]
            if bias is None:
                torch.mm(seen, weight.T, out=y[span])
            else:
                torch.addmm(bias, seen, weight.T, out=y[span])
    if gain is not None:
        y.addcmul_(y if bias is None else y - bias, (gain - 1).to(y.dtype))
    return y.view(*x.shape[:-1], y.shape[-1])


def _seen(tokens: Tensor, factors: Tensor, half: int, distances: tuple[int, ...]) -> list[Tensor]:
    """What each factor gives the next: the tokens, the tokens after one factor, …, after all."""
    seen = [tokens]
    for blocks, distance in zip(factors, distances, strict=True):
        inner = torch.bmm(_gathered(seen[-1], blocks, half, distance), blocks.transpose(1, 2))
        seen.append(_scattered(inner, half, distance).reshape(tokens.shape))
    return seen


class _Turned(torch.autograd.Function):
    """``_turned`` for a frozen W; what the factors and W make on the way is computed again in the backward."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, factors, weight, _, gain, ctx.half, ctx.distances = arguments
        ctx.save_for_backward(x, factors, weight, gain)
        return _turned(*arguments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, factors, weight, gain = ctx.saved_tensors
        half, distances = ctx.half, ctx.distances
        need_x, need_factors, _, need_bias, need_gain, *_ = ctx.needs_input_grad
        tokens, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        less_one = None if gain is None else (gain - 1).to(x.dtype)
        grad_x, grad_gain = torch.empty_like(tokens) if need_x else None, None
        grad_factors: dict[int, Tensor] = {}
        last = len(distances) if need_gain else len(distances) - 1 if need_factors else 0
        for span in _spans(tokens):
            part, seen = grads[span], _seen(tokens[span], factors[:last], half, distances[:last])
            if need_gain:
                before = part * F.linear(seen.pop(), weight)
                grad_gain = _added(grad_gain, before.sum(0, dtype=gain.dtype))
            if less_one is not None:
                part = torch.addcmul(part, part, less_one)
            if weight is not None:
                part = part @ weight
            for level in reversed(range(len(distances))):
                blocks, distance = factors[level], distances[level]
                inner = _gathered(part, blocks, half, distance)
                if need_factors:
                    pulled = torch.bmm(inner.transpose(1, 2), _gathered(seen[level], blocks, half, distance))
                    grad_factors[level] = _added(grad_factors.get(level), pulled)
                part = _scattered(torch.bmm(inner, blocks), half, distance)
                if level:
                    part = part.reshape(-1, tokens.shape[1])
                elif grad_x is not None:
                    grad_x[span].view(part.shape).copy_(part)
        return (
            None if grad_x is None else grad_x.view(x.shape),
            torch.stack([grad_factors[level] for level in range(len(distances))]) if need_factors else None,
            None,
            grads.sum(0) if need_bias else None,
            grad_gain,
            None,
            None,
        )


def _added(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total + more


class _Cayley(torch.autograd.Function):
    """R = (I + S)(I − S)⁻¹; from R + I = 2 (I − S)⁻¹ follows dR = ½ (R + I) dS (R + I), so that R alone is kept."""

    @staticmethod
    def forward(ctx: Any, skew: Tensor) -> Tensor:
        eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
        if skew.device.type == "cpu":
            inverse = (eye + skew) @ torch.cholesky_inverse(torch.linalg.cholesky_ex(eye - skew @ skew).L)
            inverse = inverse + inverse @ (eye - inverse + skew @ inverse)
            rotation = 2 * inverse - eye
        else:
            rotation = torch.linalg.solve_ex(eye - skew, eye + skew).result  # unchecked: no device is waited for
        ctx.save_for_backward(rotation)
        return rotation

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (rotation,) = ctx.saved_tensors
        half = (rotation + torch.eye(rotation.shape[-1], dtype=rotation.dtype, device=rotation.device)).mT
        with in_full(grad.device):
            pulled: Tensor = 0.5 * (half @ grad @ half)
        return pulled


def cayley(skew: Tensor) -> Tensor:
    """R = (I + S)(I − S)⁻¹, orthogonal for skew-symmetric S (…, b, b), which I − S is always invertible for.

    On a CPU by a Cholesky factor of (I − S)(I + S) = I − S², and one step of Newton's method, which gives the digits
    back that the square takes: for blocks of 32 twelve times as fast as by LU factors. The backward keeps R.
    """
    with in_full(skew.device):
        rotation: Tensor = _Cayley.apply(skew)  # type: ignore[no-untyped-call]
    return rotation


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
    with in_full(skew.device):
        for _ in range(2, max(terms, 4) - 1):
            power = power @ skew
            total = total + 2 * power
        return total + power @ skew


def in_full(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off: rotations are made in the parameters' own dtype, or they would not be orthogonal."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
