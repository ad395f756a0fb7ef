"""Products of block-diagonal matrices and permutations; the operator of OFT and BOFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .delta import applied, batched, captured, product_dtype, shaped, transformed
from .inference import few_tokens
from .rotation import Rotation

__all__ = ["BlockFactors"]

WIDTH = 32
"""Narrower blocks are set side by side up to this width: one product of that size is up to five times as fast as many
tiny ones."""

SPAN = 3 * 2**19
"""How many numbers are multiplied at a time on a CPU, so that they stay in its cache until they are read next."""


@dataclass(frozen=True, eq=False)
class BlockFactors(Rotation):
    """R = F_f … F₂ F₁: block-diagonal factors, each between permutations, F₁ acting on the input first.

    A factor's block mixes two half blocks of features, or several such pairs. The backward saves x and the factors.

    Args:
        levels: the factors' blocks, (f, n, b, b).
        half: the features of half a block.
        distances: for each factor, how many half blocks apart the two halves of a pair lie.
    """

    levels: Tensor
    half: int
    distances: tuple[int, ...]

    @staticmethod
    def diagonal(blocks: Tensor, copies: int = 1) -> BlockFactors:
        """R = diag(R₁, …, R_n), the blocks (n, b, b) repeated ``copies`` times along the diagonal."""
        levels = (blocks if copies == 1 else blocks.repeat(copies, 1, 1))[None]
        return BlockFactors(_side_by_side(levels), blocks.shape[-1] // 2, (1,))

    @staticmethod
    def butterfly(levels: Tensor) -> BlockFactors:
        """R = F₀ F₁ … F_{f-1}, block-diagonal factors between permutations: F_i = P_i diag(R_i1, …, R_in) P_iᵀ.

        Factor i mixes pairs of half blocks that lie 2^i half blocks apart, as in a fast Fourier transform, so that f
        factors of blocks of b reach across b·2^(f-1) features.

        Args:
            levels: the factors' blocks, (f, n, b, b); b even and n a multiple of 2^(f-1) if f > 1.
        """
        distances = tuple(2**i for i in reversed(range(len(levels))))
        levels = levels if len(levels) == 1 else levels.flip(0)
        return BlockFactors(_side_by_side(levels), levels.shape[-1] // 2, distances)

    @property
    def width(self) -> int:
        return self.levels.shape[1] * self.levels.shape[2]

    def apply(self, x: Tensor) -> Tensor:
        if self._at_once(x):
            return _seen(x.reshape(-1, x.shape[-1]), self.levels, self.half, self.distances)[-1].view(x.shape)
        return self._product(x, None, None)

    def turned(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        apart = self._at_once(x) or (weight.requires_grad and torch.is_grad_enabled())  # the backward knows a frozen W
        return F.linear(self.apply(x), weight, bias) if apart else self._product(x, weight, bias)

    def times(self, weight: Tensor) -> Tensor:
        """W R for W (…, in), R never written out."""
        return BlockFactors(self.levels.flip(0).mT, self.half, self.distances[::-1]).apply(weight)

    def dense(self) -> Tensor:
        return self.times(torch.eye(self.width, dtype=self.levels.dtype, device=self.levels.device))

    def _at_once(self, x: Tensor) -> bool:
        """Whether x is few tokens in evaluation, which need none of what saves memory or time for many."""
        return few_tokens(x) and x.dtype == self.levels.dtype and not torch.is_grad_enabled()

    def _product(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        dtype = product_dtype(x)
        x, levels = x.to(dtype), self.levels.to(dtype)
        weight, bias = (None if value is None else value.to(dtype) for value in (weight, bias))
        arguments = (x, levels, weight, bias, self.half, self.distances)
        if torch.is_grad_enabled() and not transformed():
            return applied(_Turned, *arguments)
        return _turned(*arguments)


def _side_by_side(levels: Tensor) -> Tensor:
    """The same factors with narrow blocks next to each other in wider ones."""
    n, b = levels.shape[1:3]
    side = next(side for side in range(max(1, min(n, WIDTH // b)), 0, -1) if n % side == 0)
    if side == 1:
        return levels
    spread = torch.diag_embed(levels.reshape(-1, side, b, b).permute(0, 2, 3, 1))
    return spread.permute(0, 3, 1, 4, 2).reshape(-1, n // side, side * b, side * b)


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


def _spans(tokens: Tensor, whole: bool = False) -> list[slice]:
    """Which tokens to multiply at a time: on a CPU some; elsewhere, and in 16 bits (sums of sums lose digits), all."""
    count, width = tokens.shape
    if whole or tokens.device.type != "cpu" or tokens.dtype.itemsize < 4 or captured():
        return [slice(None)]
    size = max(1, SPAN // width)
    return [slice(start, start + size) for start in range(0, count, size)] if count > size else [slice(None)]


def _turned(
    x: Tensor,
    factors: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    half: int,
    distances: tuple[int, ...],
) -> Tensor:
    """(R x) Wᵀ + b, or R x without a W."""
    tokens = x.reshape(-1, x.shape[-1])
    if weight is None:
        spans = _spans(tokens)
        if len(spans) == 1:
            return shaped(_seen(tokens, factors, half, distances)[-1], x.shape[:-1])
        y = torch.empty_like(tokens)
        for span in spans:
            y[span] = _seen(tokens[span], factors, half, distances)[-1]
        return shaped(y, x.shape[:-1])
    if _turns_weight(tokens, weight):
        weight = _turned(weight, factors.flip(0).mT, None, None, half, distances[::-1])
    else:
        tokens = _seen(tokens, factors, half, distances)[-1]
    return shaped(F.linear(tokens, weight, bias), x.shape[:-1])


def _turns_weight(tokens: Tensor, weight: Tensor) -> bool:
    """Whether W has fewer rows than there are tokens, in a dtype wide enough to hold a small change of it."""
    return not transformed() and len(weight) < len(tokens) and torch.finfo(tokens.dtype).bits >= 32


def _seen(tokens: Tensor, factors: Tensor, half: int, distances: tuple[int, ...]) -> list[Tensor]:
    """What each factor gives the next: the tokens, the tokens after one factor, …, after all."""
    seen = [tokens]
    for blocks, distance in zip(factors, distances, strict=True):
        inner = torch.bmm(_gathered(seen[-1], blocks, half, distance), blocks.transpose(1, 2))
        seen.append(_scattered(inner, half, distance).reshape(tokens.shape))
    return seen


class _Turned(torch.autograd.Function):
    """``_turned`` for a frozen W; what the factors make on the way is computed again in the backward."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, factors, weight, _, ctx.half, ctx.distances = arguments
        ctx.save_for_backward(x, factors, weight)
        return _turned(*arguments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, factors, weight = ctx.saved_tensors
        half, distances = ctx.half, ctx.distances
        need_x, need_factors, _, need_bias, *_ = ctx.needs_input_grad
        tokens, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_factors: dict[int, Tensor] = {}
        last = len(distances) - 1 if need_factors else 0
        spans = _spans(tokens, batched(grad))
        grad_x = torch.empty_like(tokens) if need_x and len(spans) > 1 else None
        for span in spans:
            part, seen = grads[span], _seen(tokens[span], factors[:last], half, distances[:last])
            if weight is not None:
                part = part @ weight
            for level in reversed(range(len(distances))):
                blocks, distance = factors[level], distances[level]
                inner = _gathered(part, blocks, half, distance)
                if need_factors:
                    pulled = torch.bmm(inner.transpose(1, 2), _gathered(seen[level], blocks, half, distance))
                    grad_factors[level] = grad_factors[level] + pulled if level in grad_factors else pulled
                part = _scattered(torch.bmm(inner, blocks), half, distance)
                if level:
                    part = part.reshape(-1, tokens.shape[1])
                elif grad_x is not None:
                    grad_x[span].view(part.shape).copy_(part)
                elif need_x:
                    grad_x = part.reshape(tokens.shape)
        return (
            None if grad_x is None else grad_x.view(x.shape),
            torch.stack([grad_factors[level] for level in range(len(distances))]) if need_factors else None,
            None,
            grads.sum(0) if need_bias else None,
            None,
            None,
        )
