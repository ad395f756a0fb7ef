"""Singular values and effective rank of an operator."""

from __future__ import annotations

import torch
from torch import Tensor

from .delta import Delta

__all__ = ["effective_rank", "singular_values"]


@torch.no_grad()
def singular_values(operator: Delta) -> Tensor:
    """The singular values of Δ in float64, largest first: min(out, in) of them, or r for a product of rank r.

    With up = Q R and downᵀ = P S (thin QR), those of up·down are those of the r × r matrix R Sᵀ.
    """
    factors = operator.factors()
    if factors is None or factors[0].shape[1] >= min(operator.shape):
        core = operator.dense().double()
    else:
        up, down = factors
        core = torch.linalg.qr(up.double()).R @ torch.linalg.qr(down.T.double()).R.T
    values: Tensor = torch.linalg.svdvals(core)
    return values


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the singular values as shares of their sum (Roy & Vetterli 2007); 0 for a zero operator."""
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values / total
    return float(torch.exp(torch.special.entr(shares).sum()))
