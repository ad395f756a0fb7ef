"""The Cayley transform: orthogonal matrices from skew-symmetric ones."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .delta import applied, transformed, wide

__all__ = ["cayley", "cayley_neumann", "in_full"]


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
            rotation = torch.linalg.solve_ex(eye - skew, eye + skew).result  # no check, which would wait for the GPU
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
    back that the square takes: for blocks of 32 twelve times as fast as by LU factors. The backward saves R.
    """
    skew = wide(skew)
    with in_full(skew.device):
        if transformed():
            eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
            solved: Tensor = torch.linalg.solve(eye - skew, eye + skew)
            return solved
        return applied(_Cayley, skew)


def cayley_neumann(skew: Tensor, terms: int) -> Tensor:
    """The first terms of the series of ``cayley``: I + 2S + 2S² + … + Sᵐ, the last power once; m = terms − 1.

    Three terms are taken as four, as Hugging Face PEFT does.
    """
    skew = wide(skew)
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
    """Autocast off: rotations are made in 32 bits or more, or they would not be orthogonal."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
