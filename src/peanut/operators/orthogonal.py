"""Block-diagonal and butterfly rotations of a layer's input; the operators of OFT and BOFT."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from .block_factors import BlockFactors, EvaluatedBlockFactors
from .rotation import Rotation

__all__ = ["BlockDiagonal", "Butterfly"]


class Blocks(Rotation):
    """A rotation made of blocks, applied by ``BlockFactors``."""

    @abstractmethod
    def factors_in_order(self) -> tuple[Tensor, tuple[int, ...]]:
        """The factors' blocks, (f, n, b, b), in the order in which they act, and their distances."""

    def product(self) -> BlockFactors:
        """The same rotation as a product of factors."""
        return BlockFactors.of(*self.factors_in_order())

    @property
    def width(self) -> int:
        return self.product().width

    def apply(self, x: Tensor) -> Tensor:
        return self.product().apply(x)

    def turned(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.product().turned(x, weight, bias)

    def times(self, weight: Tensor) -> Tensor:
        """W R for W (…, in), R never written out."""
        return self.product().times(weight)

    def dense(self) -> Tensor:
        return self.product().dense()

    def for_inference(self, dtype: torch.dtype) -> Rotation:
        return EvaluatedBlockFactors.of(*self.to(dtype).factors_in_order())


@dataclass(frozen=True)
class BlockDiagonal(Blocks):
    """R = diag(R₁, …, R_n), the blocks (n, b, b) repeated ``copies`` times along the diagonal.

    The shape is (copies·n·b, copies·n·b). The backward saves x and the blocks.
    """

    blocks: Tensor
    copies: int = 1

    def factors_in_order(self) -> tuple[Tensor, tuple[int, ...]]:
        blocks = self.blocks if self.copies == 1 else self.blocks.repeat(self.copies, 1, 1)
        return blocks[None], (1,)

    def to(self, dtype: torch.dtype) -> BlockDiagonal:
        return BlockDiagonal(self.blocks.to(dtype), self.copies)


@dataclass(frozen=True)
class Butterfly(Blocks):
    """R = F₀ F₁ … F_{f-1}, block-diagonal factors between permutations: F_i = P_i diag(R_i1, …, R_in) P_iᵀ.

    Factor i mixes pairs of half blocks that lie 2^i half blocks apart, as in a fast Fourier transform, so that f
    factors of blocks of b reach across b·2^(f-1) features. The backward saves x and the blocks.

    Args:
        levels: the factors' blocks, (f, n, b, b); b even and n a multiple of 2^(f-1) if f > 1.
    """

    levels: Tensor

    def factors_in_order(self) -> tuple[Tensor, tuple[int, ...]]:
        f = self.levels.shape[0]
        return self.levels if f == 1 else self.levels.flip(0), tuple(2**i for i in reversed(range(f)))

    def to(self, dtype: torch.dtype) -> Butterfly:
        return Butterfly(self.levels.to(dtype))
