"""Sums of task vectors, thinned out and with signs elected: task arithmetic, TIES, DARE (functions of tensors)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Majority", "clamped", "combined", "slerp_weights"]

Majority = Literal["total", "frequency"]


def combined(
    kind: str, tensors: Sequence[Tensor], weights: Sequence[float], density: float | None, majority: Majority
) -> Tensor:
    """The weighted sum of tensors of one shape, by the name of a combination without ``_svd``.

    ``linear``: Σ wᵢ tᵢ.  ``magnitude_prune``: of each tᵢ only the largest |entries|.  ``dare_linear``: random entries,
    divided by the density (Yu et al. 2023, arXiv 2311.03099).  ``ties``: the largest entries, and only those whose
    sign is the majority's, averaged (Yadav et al. 2023, arXiv 2306.01708).  ``dare_ties``: random ones in ties.

    Args:
        density: the share of the entries that is kept.
    """
    if density is not None and density < 1:
        if kind.startswith("dare"):
            tensors = [own * torch.bernoulli(torch.full_like(own, density)) / density for own in tensors]
        elif kind in ("ties", "magnitude_prune"):
            tensors = [_largest(own, density) for own in tensors]
    stacked = torch.stack(list(tensors))
    scales = torch.tensor(weights, device=stacked.device).reshape(-1, *[1] * (stacked.dim() - 1))
    if not kind.endswith("ties"):
        return (stacked * scales).sum(0)
    votes = stacked if majority == "total" else stacked.sign()
    agree = stacked.sign() == torch.where(votes.sum(0) >= 0, 1, -1)
    return (stacked * scales * agree).sum(0) / agree.sum(0).clamp(min=1)


def _largest(tensor: Tensor, density: float) -> Tensor:
    flat = tensor.reshape(-1)
    mask = torch.zeros_like(flat)
    mask[flat.abs().topk(int(density * flat.numel())).indices] = 1
    return tensor * mask.reshape(tensor.shape)


def clamped(up: Tensor, down: Tensor, quantile: float | None) -> tuple[Tensor, Tensor]:
    """Both factors, no entry larger than the quantile of all of their entries."""
    if quantile is None:
        return up, down
    most = torch.quantile(torch.cat([up.flatten(), down.flatten()]), quantile)
    return up.clamp(-most, most), down.clamp(-most, most)


def slerp_weights(first: Tensor, second: Tensor, t: float) -> list[float]:
    """The weights of two tensors at t on the arc between them: sin((1−t)Ω)/sin Ω, sin(tΩ)/sin Ω, Ω their angle."""
    cosine = torch.nn.functional.cosine_similarity(first.flatten().double(), second.flatten().double(), dim=0)
    omega = math.acos(max(-1.0, min(1.0, float(cosine))))
    if math.sin(omega) < 1e-6:
        return [1 - t, t]
    return [math.sin((1 - t) * omega) / math.sin(omega), math.sin(t * omega) / math.sin(omega)]
