"""Products of block-diagonal matrices and permutations (used by OFT and BOFT), applied to a layer's input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .delta import product_dtype, shaped
from .inference import few_tokens
from .rotation import Rotation

__all__ = ["BlockFactors", "EvaluatedBlockFactors"]

WIDTH = 32
"""Narrower blocks are set side by side up to this width: one product of that size is up to five times as fast as many
tiny ones."""

TINY, SMALL = 20, 2**15
"""Products of blocks narrower than this, and elementwise operations on fewer numbers than that, stay in one thread."""

SPAN = 3 * 2**19
"""On a CPU so many numbers are multiplied at a time: they are still in its cache when they are read next."""


@dataclass(frozen=True)
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
    def of(levels: Tensor, distances: tuple[int, ...]) -> BlockFactors:
        """With narrow blocks side by side; the permutations still go by the halves of the blocks given."""
        n, b = levels.shape[1:3]
        side = next(side for side in range(max(1, min(n, WIDTH // b)), 0, -1) if n % side == 0)
        if side > 1:
            spread = torch.diag_embed(levels.reshape(-1, side, b, b).permute(0, 2, 3, 1))
            levels = spread.permute(0, 3, 1, 4, 2).reshape(-1, n // side, side * b, side * b)
        return BlockFactors(levels, b // 2, distances)

    @property
    def width(self) -> int:
        return self.levels.shape[1] * self.levels.shape[2]

    def apply(self, x: Tensor) -> Tensor:
        return self._product(x, None, None)

    def turned(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._product(x, weight, bias)

    def times(self, weight: Tensor) -> Tensor:
        """W R for W (…, in), R never written out."""
        return BlockFactors(self.levels.flip(0).transpose(2, 3), self.half, self.distances[::-1]).apply(weight)

    def dense(self) -> Tensor:
        return self.times(torch.eye(self.width, dtype=self.levels.dtype, device=self.levels.device))

    def to(self, dtype: torch.dtype) -> BlockFactors:
        return BlockFactors(self.levels.to(dtype), self.half, self.distances)

    def _product(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        dtype = product_dtype(x)
        x, levels = x.to(dtype), self.levels.to(dtype)
        weight, bias = (None if value is None else value.to(dtype) for value in (weight, bias))
        arguments = (x, levels, weight, bias, self.half, self.distances)
        if torch.is_grad_enabled():
            return _Turned.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]
        return _turned(*arguments)


@dataclass(frozen=True)
class EvaluatedBlockFactors(BlockFactors):
    """In evaluation few tokens go straight to the products.

    Args:
        turns: each factor's blocks, transposed.
        narrow: the same before blocks were set side by side, for a single token.
    """

    turns: tuple[Tensor, ...]
    narrow: tuple[Tensor, ...]

    @staticmethod
    def of(levels: Tensor, distances: tuple[int, ...]) -> EvaluatedBlockFactors:
        wide = BlockFactors.of(levels, distances)
        # Transposed in memory, as products take them: a token's takes a third less time.
        turns = wide.levels.mT.contiguous()
        narrow = turns if levels.shape == turns.shape else levels.mT.contiguous()
        return EvaluatedBlockFactors(turns.mT, wide.half, distances, tuple(turns), tuple(narrow))

    def to(self, dtype: torch.dtype) -> EvaluatedBlockFactors:
        return self  # it was made for that dtype

    def takes(self, x: Tensor) -> bool:
        """Whether x is few tokens."""
        return few_tokens(x) and not torch.is_grad_enabled()

    def turned(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(self.apply(x), weight, bias) if self.takes(x) else super().turned(x, weight, bias)

    def apply(self, x: Tensor) -> Tensor:
        if not self.takes(x):
            return super().apply(x)
        tokens = x.reshape(-1, x.shape[-1])
        one = len(tokens) == 1
        for blocks, distance in zip(self.narrow if one else self.turns, self.distances, strict=True):
            if one and distance == 1:
                tokens = _turned_once(tokens, blocks)
            else:
                inner = torch.bmm(_gathered(tokens, blocks, self.half, distance), blocks)
                tokens = _scattered(inner, self.half, distance).reshape(tokens.shape)
        return tokens.view(x.shape)


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


def _turned_once(token: Tensor, blocks: Tensor) -> Tensor:
    """A single token, (1, width), times transposed blocks, (n, b, b), of features side by side.

    A batch of products wakes the other threads, for longer than a small one takes; elementwise torch does not.
    """
    n, b, _ = blocks.shape
    if b >= TINY and blocks.numel() < SMALL:
        return (blocks * token.view(n, b, 1)).sum(1).view(token.shape)
    return torch.bmm(token.view(n, 1, b), blocks).view(token.shape)


def _spans(tokens: Tensor) -> list[slice]:
    """Which tokens to multiply at a time: on a CPU some; elsewhere, and in 16 bits (sums of sums lose digits), all."""
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
        weight = BlockFactors(factors, half, distances).times(weight)
    else:
        tokens = _seen(tokens, factors, half, distances)[-1]
    return shaped(F.linear(tokens, weight, bias), x.shape[:-1])


def _turns_weight(tokens: Tensor, weight: Tensor) -> bool:
    """Whether W has fewer rows than there are tokens, in a dtype wide enough to hold a small change of it."""
    return len(weight) < len(tokens) and torch.finfo(tokens.dtype).bits >= 32


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
        grad_x = torch.empty_like(tokens) if need_x else None
        grad_factors: dict[int, Tensor] = {}
        last = len(distances) - 1 if need_factors else 0
        for span in _spans(tokens):
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
        return (
            None if grad_x is None else grad_x.view(x.shape),
            torch.stack([grad_factors[level] for level in range(len(distances))]) if need_factors else None,
            None,
            grads.sum(0) if need_bias else None,
            None,
            None,
        )
