"""LoRA-FA: A is frozen, and B's gradient is projected (Zhang et al. 2023, arXiv 2308.03303)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import PeanutError
from ..methods.lora import LoraConfig
from ..model.layers.adapted import walk
from ..model.layers.layer import AdaptedLayer

__all__ = ["LoraFAOptimizer", "create_lorafa_optimizer"]


class LoraFAOptimizer(Optimizer):
    """AdamW, in which each B takes the step of g_B (A Aᵀ)⁻¹ / s².

    Args:
        projected: A and s by the id of B.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        projected: dict[int, tuple[Tensor, float]],
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})
        self._projected = projected

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient, state = self._gradient(parameter), self.state[parameter]
                if not state:
                    state |= {
                        "step": 0,
                        "exp_avg": torch.zeros_like(gradient),
                        "exp_avg_sq": torch.zeros_like(gradient),
                    }
                state["step"] += 1
                state["exp_avg"].lerp_(gradient, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                size = lr * math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
                parameter.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-size)
                parameter.mul_(1 - lr * group["weight_decay"])
        return loss

    def _gradient(self, parameter: Tensor) -> Tensor:
        gradient = parameter.grad
        assert gradient is not None
        if id(parameter) not in self._projected:
            return gradient
        A, scaling = self._projected[id(parameter)]
        wide = torch.promote_types(A.dtype, torch.float32)
        gram = A.to(wide) @ A.to(wide).T + 1e-8 * torch.eye(len(A), device=A.device, dtype=wide)
        inverse: Tensor = torch.linalg.pinv(gram)
        return (gradient.to(wide) @ inverse / scaling**2).to(gradient.dtype)


def create_lorafa_optimizer(
    model: nn.Module, r: int, lora_alpha: int, lr: float, weight_decay: float = 0.0, use_rslora: bool | None = None
) -> Optimizer:
    """AdamW that freezes every A of LoRA and projects the gradients of B: g_B (A Aᵀ)⁻¹ / s², s that of the layer.

    Args:
        r, lora_alpha, use_rslora: accepted for scripts: a layer's s is that of its adapter's config.

    Raises:
        PeanutError: no LoRA of linear layers is trained, or ``use_rslora`` is not what an adapter has.
    """
    projected: dict[int, tuple[Tensor, float]] = {}
    for layer in walk(model):
        if not isinstance(layer, AdaptedLayer):
            continue
        for name in layer.active_adapters:
            config = layer.method_of(name)[1]
            values = layer.values(name)
            if isinstance(config, LoraConfig) and "lora_A.weight" in values and values["lora_A.weight"].dim() == 2:
                if use_rslora not in (None, config.use_rslora):
                    raise PeanutError(
                        f"use_rslora={use_rslora}, and adapter {name!r} has {config.use_rslora}",
                        "that of the config",
                        "leave it out",
                    )
                values["lora_A.weight"].requires_grad_(False)
                projected[id(values["lora_B.weight"])] = values["lora_A.weight"], config.scaling
    if not projected:
        raise PeanutError("a model without an active LoRA of linear layers", "one", "use AdamW")
    return LoraFAOptimizer([own for own in model.parameters() if own.requires_grad], projected, lr, weight_decay)
