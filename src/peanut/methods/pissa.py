"""PiSSA and MiLoRA: LoRA initialised from a weight's largest or smallest singular values and vectors.

Meng et al. 2024, arXiv 2404.02948; Wang et al. 2024, arXiv 2406.09044. With W = U Σ Vᵀ and s LoRA's scaling,
B₀ = U_r (Σ_r/s)^½ and A₀ = (Σ_r/s)^½ V_rᵀ over r of the triplets, so that s·B₀A₀ is that part of W; the base is W less
that part. Here W stays as it is and the change is s(BA − B₀A₀), which is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["minor_triplets", "principal_triplets"]

_OVERSAMPLING = 8
"""Random directions beyond r in which the range of W is looked for."""


def principal_triplets(W: Tensor, r: int, scaling: float, iterations: int | None = None) -> tuple[Tensor, Tensor]:
    """(A₀, B₀) of shapes (r, in), (out, r) at the r largest triplets of W (out, in).

    Args:
        W: the frozen weight.
        r: how many.
        scaling: s.
        iterations: find them by that many subspace iterations from a fixed random start (Halko et al. 2011, arXiv
            0909.4061) rather than exactly.
    """
    W = _wide(W)
    if iterations is None:
        U, S, V = _decomposed(W)
        return _factors(U[:, :r], S[:r], V[:, :r], scaling)
    columns = min(r + _OVERSAMPLING, *W.shape)
    start = torch.randn(W.shape[1], columns, generator=torch.Generator().manual_seed(0), dtype=W.dtype, device="cpu")
    Q = torch.linalg.qr(W @ start.to(W.device)).Q
    for _ in range(iterations):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.T @ Q).Q).Q
    U, S, V = _decomposed(Q.T @ W)
    return _factors((Q @ U)[:, :r], S[:r], V[:, :r], scaling)


def minor_triplets(W: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """(A₀, B₀) of shapes (r, in), (out, r) at the r smallest triplets of W (out, in)."""
    U, S, V = _decomposed(_wide(W))
    return _factors(U[:, -r:], S[-r:], V[:, -r:], scaling)


def _decomposed(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U, S, Vh.T


def _factors(U: Tensor, S: Tensor, V: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    root = (S / scaling).sqrt()
    return (V * root).T.contiguous(), U * root


def _wide(W: Tensor) -> Tensor:
    return W.to(torch.promote_types(W.dtype, torch.float32))
