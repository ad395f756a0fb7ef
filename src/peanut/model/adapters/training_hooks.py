"""Adds penalties to the loss and runs after each optimizer step, without a call in the training loop."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ...operators.delta import captured

__all__ = ["follow", "unfollow"]

_FOLLOWED: weakref.WeakSet[Any] = weakref.WeakSet()
"""The sets of adapters (``AdapterSet``) whose methods have penalties or schedules."""


def follow(adapters: Any) -> None:
    """From now on, penalties of ``adapters`` enter the loss that the model returns, and schedules follow the optimizer.

    The loss is the one that the model returns in training, so that any loop that uses it (transformers' Trainer,
    accelerate, one's own) has the penalty in it. Schedules run in torch's hook after each optimizer step.
    """
    _FOLLOWED.add(adapters)
    if _before_loss_leaves not in adapters.model._forward_hooks.values():
        adapters.model.register_forward_hook(_before_loss_leaves)


def unfollow(adapters: Any) -> None:
    """Takes back what ``follow`` did."""
    _FOLLOWED.discard(adapters)
    hooks = adapters.model._forward_hooks
    for key in [key for key, hook in hooks.items() if hook is _before_loss_leaves]:
        del hooks[key]


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if not _FOLLOWED:
        return
    updated = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for adapters in list(_FOLLOWED):
        adapters.after_step(updated)


def _before_loss_leaves(model: nn.Module, args: Any, output: Any) -> Any:
    """The model's output with the penalty of its active adapters in its loss."""
    adapters = model.__dict__.get("_adapter_set")
    if adapters is None or not model.training or not (torch.is_grad_enabled() or captured()):
        return output  # (torch.jit.trace checks its graph without gradients)
    if not torch.compiler.is_compiling():
        _FOLLOWED.add(adapters)  # a copied model has this hook, but its adapters are not registered yet
    if adapters.state.disabled or not adapters.state.call.penalising:
        return output
    penalty = adapters.penalty()
    if penalty is None:
        return output
    if isinstance(output, dict) and isinstance(output.get("loss"), Tensor):
        output["loss"] = output["loss"] + penalty.to(output["loss"].device)
    elif isinstance(output, tuple) and output and isinstance(output[0], Tensor) and output[0].dim() == 0:
        output = (output[0] + penalty.to(output[0].device), *output[1:])
    else:
        warnings.warn(
            f"{type(model).__name__} returned no loss, so the penalty of its adapters is not in it: give the model "
            "labels, or add peanut.penalty(model) to your loss",
            stacklevel=2,
        )
    return output


register_optimizer_step_post_hook(_after_step)
