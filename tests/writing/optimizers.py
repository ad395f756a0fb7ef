"""Ways to write to many tensors at once: flat vectors, torch's operators on lists, optimizers of every kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .target import Target, Values, Way, Write

__all__ = ["MANY", "OPTIMIZERS"]


def flat(target: Target) -> Write:
    """All tensors are views of one vector, which is written."""
    vector = torch.cat([tensor.detach().flatten() for tensor in target.tensors()])
    parts = vector.split([tensor.numel() for tensor in target.tensors()])
    for tensor, part in zip(target.tensors(), parts, strict=True):
        tensor.data = part.view(tensor.shape)

    def write(values: Values) -> None:
        vector.copy_(nn.utils.parameters_to_vector(values))

    return write


def vector_given(target: Target) -> Write:
    return lambda values: nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(values), target.tensors())


def vector_reused(target: Target) -> Write:
    """A vector that is given to ``vector_to_parameters`` each time, in the same memory."""
    vector = nn.utils.parameters_to_vector([tensor.detach() for tensor in target.tensors()])

    def write(values: Values) -> None:
        vector.copy_(nn.utils.parameters_to_vector(values))
        nn.utils.vector_to_parameters(vector, target.tensors())

    return write


@torch.no_grad()
def foreach_copied(tensors: Values, values: Values) -> None:
    torch._foreach_copy_(tensors, values)


@torch.no_grad()
def foreach_added(tensors: Values, values: Values) -> None:
    torch._foreach_sub_(tensors, torch._foreach_sub(tensors, values))


@torch.no_grad()
def fused_sgd(tensors: Values, values: Values) -> None:
    options = {"weight_decay": 0, "momentum": 0, "lr": 1, "dampening": 0, "nesterov": False}
    grads = torch._foreach_sub(tensors, values)
    torch._fused_sgd_(tensors, grads, [], **options, maximize=False, is_first_step=True)


def together(write: Callable[[Values, Values], None]) -> Way:
    return lambda target: lambda values: write([tensor.detach() for tensor in target.tensors()], values)


MANY: dict[str, Way] = {
    "flat buffer": flat,
    "vector_to_parameters": vector_given,
    "vector_to_parameters, one memory": vector_reused,
    "_foreach_copy_": together(foreach_copied),
    "_foreach_sub_": together(foreach_added),
    "_fused_sgd_": together(fused_sgd),
}

# Optimizers: the gradient is the way to the value, so that a step goes there or in its direction


def optimizer(kind: type[torch.optim.Optimizer], lr: float, *, begins: bool = False, **options: Any) -> Way:
    """A step of an optimizer made before any call; ``begins``: of a new one each time, as it turns back slowly."""

    def way(target: Target) -> Write:
        first = kind(target.tensors(), lr=lr, **options)  # type: ignore[call-arg]

        @torch.no_grad()
        def write(values: Values) -> None:
            had = [tensor.grad is not None for tensor in target.tensors()]

            def closure() -> float:
                for tensor, value in zip(target.tensors(), values, strict=True):
                    if tensor.grad is None:
                        tensor.grad = torch.zeros_like(tensor)
                    tensor.grad.data.copy_(tensor - value)
                return float(sum(tensor.grad.square().sum() / 2 for tensor in target.tensors()))  # type: ignore[union-attr]

            closure()
            made = kind(target.tensors(), lr=lr, **options) if begins else first  # type: ignore[call-arg]
            made.step(closure)
            for tensor, kept in zip(target.tensors(), had, strict=True):
                if kept:
                    tensor.grad.data.zero_()  # type: ignore[union-attr]
                else:
                    tensor.grad = None

        return write

    return way


def _optimizers() -> dict[str, Way]:
    found: dict[str, Way] = {}
    for kind, lr in ((torch.optim.SGD, 1.0), (torch.optim.Adam, 0.4), (torch.optim.AdamW, 0.4)):
        for mode in ("plain", "foreach", "fused"):
            options = {"foreach": mode == "foreach", "fused": mode == "fused"}
            found[f"{kind.__name__}, {mode}"] = optimizer(kind, lr, **options)
    found["SGD, fused, momentum"] = optimizer(torch.optim.SGD, 1.0, fused=True, momentum=0.5)
    found["Adagrad, fused"] = optimizer(torch.optim.Adagrad, 0.4, fused=True)
    found["Adam, fused, amsgrad"] = optimizer(torch.optim.Adam, 0.4, fused=True, amsgrad=True)
    others = {"Adadelta": 300.0, "Adamax": 0.4, "ASGD": 1.0, "NAdam": 0.4, "RAdam": 1.0, "RMSprop": 0.04}
    for name, lr in others.items():
        found[name] = optimizer(getattr(torch.optim, name), lr)
    found["Adafactor"] = optimizer(torch.optim.Adafactor, 0.5)
    found["LBFGS"] = optimizer(torch.optim.LBFGS, 1.0, max_iter=8, begins=True)
    found["Rprop"] = optimizer(torch.optim.Rprop, 0.4, begins=True)
    return found


OPTIMIZERS = _optimizers()
