"""LoRA+: B learns faster than A (Hayou et al. 2024, arXiv 2402.12354)."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..errors import PeanutError
from .factors import in_embeddings, is_last_factor

__all__ = ["create_loraplus_optimizer"]


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """An optimizer with learning rates η_A = lr and η_B = lr · ratio, for every method that has a factor B.

    Vectors learn as B does. B is the factor that starts at zero: ``lora_B``, ``peanut_B``, ``poly_lora_B``.

    Args:
        loraplus_lr_ratio: η_B / η_A, 1 or more.
        kwargs: ``loraplus_lr_embedding`` (1e-6), the rate of adapters in embeddings; ``loraplus_weight_decay`` (0);
            the rest is the optimizer's own.

    Raises:
        PeanutError: nothing is trained.
    """
    from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS
    from transformers.trainer_pt_utils import get_parameter_names

    decay, embedding_lr = kwargs.pop("loraplus_weight_decay", 0.0), kwargs.pop("loraplus_lr_embedding", 1e-6)
    decayed = {name for name in get_parameter_names(model, ALL_LAYERNORM_LAYERS) if "bias" not in name}
    embedded, fast = in_embeddings(model), lr * loraplus_lr_ratio
    rates = (decay, lr), (decay, embedding_lr), (decay, fast), (0.0, fast)
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": own, "lr": rate} for own, rate in rates]
    A, embeddings, B, undecayed = groups
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = A
            if id(parameter) in embedded:
                group = embeddings
            elif is_last_factor(name) or parameter.dim() == 1:
                group = B if name in decayed else undecayed
            group["params"].append(parameter)
    if not any(group["params"] for group in groups):
        raise PeanutError("a model without trained parameters", "an active adapter in training", "call set_adapter")
    made: Any = optimizer_cls
    optimizer: Optimizer = made(groups, lr=lr, **kwargs)
    if optimizer_cls.__module__.startswith("bitsandbytes") and "8bit" in optimizer_cls.__name__:
        from bitsandbytes.optim.optimizer import GlobalOptimManager

        manager: Any = GlobalOptimManager
        manager = manager.get_instance()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer
