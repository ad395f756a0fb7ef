"""Riemannian preconditioned LoRA: gradients scaled by the other factor's Gram matrix (2024, arXiv 2402.02347)."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import PeanutError
from .factors import pairs

__all__ = ["create_riemannian_optimizer"]


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> Optimizer:
    """``optimizer_cls``, whose steps are taken with g_A ← (BᵀB + εI)⁻¹ g_A and g_B ← g_B (AAᵀ + εI)⁻¹.

    Only LoRA's matrices A (r, in) and B (out, r) are preconditioned; all else that is trained is stepped as it is.

    Args:
        reg: ε, which keeps the inverse finite while B is zero.

    Raises:
        PeanutError: no pair A, B is trained, or the optimizer evaluates the loss itself (LBFGS).
    """
    found = [(a, b) for _, a, b in pairs(model) if a.requires_grad and b.requires_grad]
    if not found:
        raise PeanutError("a model that trains no pair lora_A, lora_B", "a LoRA adapter in training")
    given: Any = optimizer_cls
    if not (isinstance(given, type) and issubclass(given, Optimizer)):
        raise PeanutError(f"optimizer_cls={optimizer_cls!r}", "a class of torch.optim", "give the class, not one of it")
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise PeanutError(f"{optimizer_cls.__name__}, which needs a closure", "SGD, AdamW and the like")
    base: Any = optimizer_cls

    class Preconditioned(base):  # type: ignore[misc]
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            if closure is not None:
                raise PeanutError("a closure, which would make the gradients again", "step() without one")
            for a, b in found:
                if a.grad is not None:
                    a.grad.copy_(_inverse(b.T, reg) @ a.grad.to(_wide(a)))
                if b.grad is not None:
                    b.grad.copy_(b.grad.to(_wide(b)) @ _inverse(a, reg))
            return super().step()

    Preconditioned.__name__ = f"Riemannian{optimizer_cls.__name__}"
    made: Optimizer = Preconditioned([own for own in model.parameters() if own.requires_grad], lr=lr, **kwargs)
    return made


def _wide(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)


def _inverse(rows: Tensor, reg: float) -> Tensor:
    """(M Mᵀ + εI)⁻¹ for M (r, n)."""
    rows = rows.to(_wide(rows))
    gram = rows @ rows.T + reg * torch.eye(len(rows), device=rows.device, dtype=rows.dtype)
    inverse: Tensor = torch.linalg.pinv(gram)
    return inverse
