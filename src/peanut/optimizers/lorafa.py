"""LoRA-FA: A is frozen, and B's gradient is projected (Zhang et al. 2023, arXiv 2308.03303)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import PeanutError, warn
from ..methods.lora import LoraConfig, suffixes
from ..model.adapters.adapter_set import AdapterSet
from ..model.layers.layer import AdaptedLayer

__all__ = ["LoraFAOptimizer", "create_lorafa_optimizer"]


class LoraFAOptimizer(Optimizer):
    """AdamW, in which each B takes the step of g_B (A Aᵀ)⁻¹ / s²; ``create_lorafa_optimizer`` makes one for a model.

    Args:
        params: groups of parameters with ``names``, as the model has them, and ``scaling_factors``, s of each LoRA and
            ``None`` else; A, which is not stepped, is in the group of its B.
        correct_bias: correct the running averages for their start at zero.

    Raises:
        PeanutError: at a step, a group has no names.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for parameter, A, scaling in _with_first_factors(group):
                if parameter.grad is None or not parameter.requires_grad:
                    continue
                gradient = parameter.grad if A is None else _projected(parameter.grad, A, scaling)
                state = self.state[parameter]
                if not state:
                    state |= {
                        "step": 0,
                        "exp_avg": torch.zeros_like(gradient),
                        "exp_avg_sq": torch.zeros_like(gradient),
                    }
                state["step"] += 1
                state["exp_avg"].lerp_(gradient, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                size = lr
                if group["correct_bias"]:
                    size *= math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
                parameter.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-size)
                parameter.mul_(1 - lr * group["weight_decay"])
        return loss


def _with_first_factors(group: dict[str, Any]) -> list[tuple[nn.Parameter, Tensor | None, float]]:
    """The parameters of a group but for each A, each B with its A and s."""
    params = group["params"]
    if "scaling_factors" not in group and "scaling_factor" in group:
        warn("`scaling_factor` is deprecated: give scaling_factors, one for each parameter", FutureWarning)
        group["scaling_factors"] = [group["scaling_factor"]] * len(params)
    if "names" not in group or "scaling_factors" not in group:
        raise PeanutError("parameters without names and scaling_factors", "both", "use create_lorafa_optimizer")
    named = dict(zip(group["names"], params, strict=True))
    found = []
    for (name, own), scaling in zip(named.items(), group["scaling_factors"], strict=True):
        first = name.replace("lora_B.", "lora_A.").replace("lora_embedding_B.", "lora_embedding_A.")
        found.append((own, None if first == name or scaling is None else named.get(first), scaling))
    frozen = {id(A) for _, A, _ in found}
    return [each for each in found if id(each[0]) not in frozen]


def _projected(gradient: Tensor, A: Tensor, scaling: float) -> Tensor:
    wide = torch.promote_types(A.dtype, torch.float32)
    rows = A.flatten(1).to(wide)
    inverse = torch.linalg.pinv(rows @ rows.T + 1e-8 * torch.eye(len(rows), device=A.device, dtype=wide))
    projected: Tensor = gradient.flatten(1).to(wide) @ inverse / scaling**2
    return projected.reshape(gradient.shape).to(gradient.dtype)


def create_lorafa_optimizer(
    model: nn.Module, r: int, lora_alpha: int, lr: float, weight_decay: float = 0.0, use_rslora: bool | None = None
) -> Optimizer:
    """AdamW that freezes every A of LoRA and projects the gradients of B: g_B (A Aᵀ)⁻¹ / s², s that of the layer.

    Args:
        r, lora_alpha, use_rslora: accepted for scripts: a layer's s is that of its adapter's config. It warns where
            r and lora_alpha are not what the adapter has.

    Raises:
        PeanutError: no LoRA is trained, or ``use_rslora`` is not what an adapter has.
    """
    adapters, scalings = AdapterSet.of(model), dict[int, float]()
    for name in dict.fromkeys((*adapters.state.active, *adapters.trained)):
        config = adapters.configs[name]
        layers = [layer for _, layer in adapters.layers(name)] if isinstance(config, LoraConfig) else []
        if not layers or not isinstance(config, LoraConfig):
            continue
        if use_rslora not in (None, config.use_rslora):
            raise PeanutError(
                f"use_rslora={use_rslora}, and adapter {name!r} has {config.use_rslora}",
                "that of the config",
                "leave it out",
            )
        if (r, lora_alpha) != (config.r, config.lora_alpha):
            warn(
                f"r={r} and lora_alpha={lora_alpha} have no effect: adapter {name!r} has r={config.r} and "
                f"lora_alpha={config.lora_alpha}"
            )
        for layer in layers:
            scalings |= _scalings(layer, name)
    if not scalings:
        raise PeanutError("a model without an active LoRA", "one", "use AdamW")
    named = {name: own for name, own in model.named_parameters() if own.requires_grad or id(own) in scalings}
    factors = [scalings.get(id(own)) for own in named.values()]
    group = {"params": list(named.values()), "names": list(named), "scaling_factors": factors}
    return LoraFAOptimizer([group], lr, weight_decay=weight_decay)


def _scalings(layer: AdaptedLayer, name: str) -> dict[int, float]:
    """s by the ids of A and B in a layer, whose A is frozen; nothing where a method has no such factors."""
    values, (a, b) = layer.values(name), suffixes(layer.frozen)
    if a not in values:
        return {}
    if layer.scaling[name] == 0:
        raise PeanutError(f"adapter {name!r} of scale 0 at '{layer.path}'", "another scale", "set_scale(name, 1.0)")
    values[a].requires_grad_(False)
    return {id(values[suffix]): layer.scaling[name] for suffix in (a, b)}
