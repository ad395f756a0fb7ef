"""What a method needs of a training loop, without a call in it: penalties in the loss, and a turn after each step."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Collection
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .state import AdapterState

__all__ = ["Followed", "follow"]


class Followed(Protocol):
    """What the hooks must know of a model's adapters."""

    model: nn.Module
    state: AdapterState

    def penalty(self) -> Tensor | None:
        """What is added to the loss."""

    def after_step(self, updated: Collection[int]) -> None:
        """Runs after an optimizer has updated the parameters of these ids."""


_FOLLOWED: weakref.WeakSet[Followed] = weakref.WeakSet()
_HOOKED: list[Any] = []


def follow(adapters: Followed) -> None:
    """From now on, penalties of ``adapters`` enter the loss that the model returns, and schedules follow the optimizer.

    The loss is the one that the model returns in training, so that any loop that uses it (transformers' Trainer,
    accelerate, one's own) has the penalty in it. Schedules hang on torch's hook after every optimizer's step.
    """
    if adapters in _FOLLOWED:
        return
    if not _HOOKED:
        _HOOKED.append(register_optimizer_step_post_hook(_after_step))
    _FOLLOWED.add(adapters)
    adapters.model.register_forward_hook(_add_penalty)


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    updated = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for adapters in list(_FOLLOWED):
        adapters.after_step(updated)


def _add_penalty(model: nn.Module, args: Any, output: Any) -> Any:
    """The model's output with the penalty of its active adapters in its loss."""
    adapters = model.__dict__.get("_adapter_set")
    if adapters is None or not adapters.state.penalising or not model.training or not torch.is_grad_enabled():
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
            f"{type(model).__name__} returned no loss, so the penalty of adapter {adapters.state.active[0]!r} is not "
            "in it: give the model labels, or add peanut.penalty(model) to your loss",
            stacklevel=2,
        )
    return output
