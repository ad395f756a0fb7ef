"""What a model must answer: a fresh one, made from the values as they are now, and called once."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from peanut import PeftModel, get_peft_model

from ..support import Case, Net, randomised

__all__ = [
    "FROM_BASE",
    "HISTORIES",
    "Answers",
    "Given",
    "History",
    "anew",
    "answer",
    "answer_of",
    "answers",
    "base_key",
    "begun",
    "differences",
    "direction",
    "is_of_base",
    "learn",
    "remade",
    "to_eval",
    "to_train",
]

TIGHT = 1e-9
NETS: dict[str, Net] = {}
FROM_BASE = ("weight_norm",)
"""What an adapter reads off the base when it is made."""

Given = dict[str, Tensor]


def values_of(model: PeftModel, given: Given | None = None) -> Given:
    """Every tensor of a model by name, or what is ``given`` in its place."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers()), **(given or {})}


@torch.no_grad()
def remade(model: PeftModel, base: Any, adapt: Callable[[Any], PeftModel], given: Given | None = None) -> PeftModel:
    """A model in the mode of ``model`` and with its values: a fresh ``base``, adapted after it got those of the base.

    What is read off the base when an adapter is made is so read off the base as it is now.
    """
    values = values_of(model, given)
    of_base = {base_key(key): value for key, value in values.items() if is_of_base(key)}
    for name, own in base.named_parameters():
        own.copy_(of_base[name])
    fresh = adapt(base)
    for name, own in [*fresh.named_parameters(), *fresh.named_buffers()]:
        if not name.endswith(FROM_BASE):
            own.copy_(values[name])
    return fresh.train(model.training)


def anew(case: Case, model: PeftModel, given: Given | None = None) -> PeftModel:
    """A fresh model of a case, with the values of ``model``."""
    return remade(model, net_of(case), lambda base: get_peft_model(base, case.config()), given)


def begun(case: Case) -> PeftModel:
    """``case.adapted()`` in less time."""
    return randomised(get_peft_model(net_of(case), case.config())).eval()  # type: ignore[no-any-return]


def net_of(case: Case) -> Net:
    """``case.net()``, made once and copied."""
    return copy.deepcopy(NETS.get(str(case)) or NETS.setdefault(str(case), case.net()))


def is_of_base(key: str) -> bool:
    """Whether a tensor of this name is one that the base had before it was adapted."""
    return re.search(r"\.(default|a\d+|[ab])(\.|$)", key) is None  # what adapters are called in these tests


def base_key(key: str) -> str:
    """The name that the base itself has for a tensor."""
    return key.removeprefix("base_model.model.").replace(".base_layer.", ".").replace("original_module.", "")


@dataclass
class Answers:
    """What a model answers without and with gradients, and the gradients of what is trained."""

    plain: Tensor
    traced: Tensor
    gradients: Given = field(default_factory=dict)


def answers(model: PeftModel, x: Tensor, given: Given | None = None, traced_first: bool = False) -> Answers:
    """One call without gradients and one with them."""

    def call(grad: bool) -> Tensor:
        torch.default_generator.manual_seed(5)  # some methods draw in training
        with torch.set_grad_enabled(grad):
            y = functional_call(model, given, (x,)) if given else model(x)
        return answer_of(y)

    first = call(traced_first)
    second = call(not traced_first)
    plain, traced = (second, first) if traced_first else (first, second)
    trained = {key: value for key, value in values_of(model, given).items() if value.requires_grad}
    found = torch.autograd.grad(traced, list(trained.values()), direction(traced), allow_unused=True)
    gradients = {key: torch.zeros_like(trained[key]) if g is None else g for key, g in zip(trained, found, strict=True)}
    return Answers(plain, traced.detach(), gradients)


def answer_of(output: Any) -> Tensor:
    """The tensor that a model answers with, logits if there are others."""
    found: Tensor = output if isinstance(output, Tensor) else output["logits"]
    return found


def direction(y: Tensor) -> Tensor:
    """A loss's gradient: the same random one for a shape."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64).to(y.dtype)


def differences(found: Answers, expected: Answers) -> list[str]:
    """The names of what differs."""
    assert found.gradients.keys() == expected.gradients.keys()
    pairs = {"answer": (found.plain, expected.plain), "answer with gradients": (found.traced, expected.traced)}
    pairs |= {f"gradient of {key}": (own, expected.gradients[key]) for key, own in found.gradients.items()}
    return [
        f"{name} by {(one - other).abs().max():.1e}"
        for name, (one, other) in pairs.items()
        if not (one - other).abs().max() <= TIGHT * max(1.0, float(other.abs().max()))
    ]


# What was called before


def to_train(model: PeftModel, x: Tensor) -> None:
    model.train()


def to_eval(model: PeftModel, x: Tensor) -> None:
    model.eval()


@torch.no_grad()
def answer(model: PeftModel, x: Tensor) -> None:
    model(x)


@torch.inference_mode()
def infer(model: PeftModel, x: Tensor) -> None:
    model(x)


def learn(model: PeftModel, x: Tensor) -> None:
    y = answer_of(model(x))
    y.backward(direction(y))


def zero(model: PeftModel, x: Tensor) -> None:
    """As old training loops do it: in place, through ``.data``."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.data.zero_()


History = tuple[Callable[[PeftModel, Tensor], Any], ...]
HISTORIES: list[History] = [
    (to_eval, answer, answer),
    (to_eval, learn, answer),
    (to_eval, answer, learn),
    (to_eval, learn, zero, learn),
    (to_eval, infer, answer),
    (to_train, learn, learn),
    (to_train, learn, answer),
    (to_train, answer, answer),
    (to_train, learn, to_eval, answer, infer),
    (to_eval, answer, to_train, learn, zero),
    (to_train, learn, zero, to_eval, learn, answer),
]
"""Whatever could be kept of a call is kept after one of these; their last mode is that of the answers that follow."""
