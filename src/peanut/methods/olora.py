"""OLoRA: LoRA initialised from a weight's QR decomposition (Büyükakyüz 2024, arXiv 2406.01775)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["orthonormal_factors"]


def orthonormal_factors(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """(A₀, B₀) = (R_r, Q_r) of shapes (r, in), (out, r) with W = QR: B₀ has orthonormal columns.

    The base is W − s·B₀A₀; here W stays as it is and the change is s(BA − B₀A₀), which is the same.
    """
    Q, R = torch.linalg.qr(W.to(torch.promote_types(W.dtype, torch.float32)))
    return R[:r].contiguous(), Q[:, :r].contiguous()
