"""DoRA: the magnitudes of weight rows are trained apart from their directions (Liu et al. 2024, arXiv 2402.09353)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators import LowRank
from ..operators.magnitude import MagnitudeDirection
from ..weights import FrozenLayer

__all__ = ["decomposed", "norms_with"]


def decomposed(magnitude: Tensor, low: LowRank, layer: FrozenLayer) -> MagnitudeDirection:
    """W' = diag(g)(W + ΔW) with g = m / ‖W + ΔW‖ row by row; the norm is a constant to the gradient (section 4.3).

    Args:
        magnitude: m, (out), trained; it starts as the norms, so that g starts as one.
        low: ΔW.
        layer: the frozen layer.
    """
    gain = magnitude / norms_with(layer.matrix(), low).to(magnitude.dtype)
    W = layer.matrix if layer.kind.quantised else layer.matrix()
    return MagnitudeDirection(W, low.up, low.down, low.scaling, gain, whole=not layer.merged)


@torch.no_grad()
def norms_with(W: Tensor, low: LowRank) -> Tensor:
    """‖W + s·B·A‖ of each row, (out), from ‖W‖² + 2s⟨WAᵀ, B⟩ + s²⟨B(AAᵀ), B⟩: nothing of W's size is made.

    W is read in its own dtype, as copying it would cost more than the product: in 16 bits that rounds the middle term,
    which is small beside ‖W‖² as ΔW is beside W, and what is rounded off the gain is below the output's own precision.
    Where B is zero the result is ‖W‖ to the bit, as √n² is n in floating-point numbers.
    """
    wide = torch.promote_types(torch.promote_types(W.dtype, low.up.dtype), torch.float32)
    norms = torch.linalg.vector_norm(W, dim=1, dtype=torch.promote_types(W.dtype, torch.float32))
    B, A, s = low.up.to(wide), low.down.to(wide), low.scaling
    crossed = ((W @ A.to(W.dtype).T).to(wide) * B).sum(1)
    added = ((B @ (A @ A.T)).to(wide) * B).sum(1)
    total: Tensor = norms.to(wide).square() + 2 * s * crossed + s * s * added
    return total.clamp_min(torch.finfo(wide).tiny).sqrt()
