"""A block that runs again in the backward (gradient checkpointing) sees the call that it ran in first.

Where the call cannot be known again, as under a ``torch.utils.checkpoint`` of the user's own whose backward runs after
the context was left, the answer is an error of one line, never another gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peanut import HRAConfig, LoraConfig, PeanutConfig, PeftModel, PolyConfig, get_peft_model

from .calls import Mlp, X, in_threads, one_line
from .support import distance, one_thread, randomised, same_bits  # noqa: F401
from .writing.llama import IDS, TARGETS, llama
from .writing.reference import answer_of, direction

pytestmark = pytest.mark.filterwarnings("ignore:.* returned no loss")

LAYERS = ["layers.0", "layers.1", "layers.2"]
REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])


class Blocks(Mlp):
    """Its layers in checkpoints of its own: ``None`` for none, else whether they are reentrant."""

    reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.layers:
            block = nn.Sequential(layer, nn.Tanh())
            y = block(y) if self.reentrant is None else checkpoint(block, y, use_reentrant=self.reentrant)
        return y


def blocks() -> PeftModel:
    model = get_peft_model(
        Blocks().double(), PolyConfig(r=2, n_tasks=3, n_skills=2, n_splits=2, target_modules=LAYERS), "a"
    )
    model.add_adapter("b", PeanutConfig(r=3, depth=1, target_modules=LAYERS))
    model.add_adapter("c", HRAConfig(r=2, target_modules=LAYERS))
    model.add_adapter("d", LoraConfig(r=2, target_modules=LAYERS))
    randomised(model)
    model.set_adapter("d")
    model.adapters.freeze("abcd")
    return model.eval()


def transformer() -> PeftModel:
    model = get_peft_model(llama(2), LoraConfig(r=2, target_modules=TARGETS["linear"], task_type="CAUSAL_LM"), "a")
    poly = PolyConfig(r=2, n_tasks=3, n_skills=2, target_modules=TARGETS["linear"], task_type="CAUSAL_LM")
    model.add_adapter("b", poly)
    randomised(model)
    model.adapters.freeze("ab")
    return model.train()


@contextmanager
def as_usual(_: PeftModel) -> Iterator[None]:
    yield


Context = Callable[[PeftModel], Any]
DISABLED: Context = PeftModel.disable_adapter
HOW: dict[str, tuple[Context, dict[str, Any]]] = {
    "plain": (as_usual, {}),
    "disabled": (DISABLED, {}),
    "names": (as_usual, {"adapter_names": ["b", "__base__", "c", "d"]}),
    "other names": (as_usual, {"adapter_names": ["d"] * 4}),
    "tasks": (as_usual, {"task_ids": [0, 2, 1, 0], "adapter_names": ["a", "a", "d", "a"]}),
    "disabled, with names": (DISABLED, {"adapter_names": ["b"] * 4}),
}
LLAMA_HOW: dict[str, tuple[Context, dict[str, Any]]] = {
    "plain": (as_usual, {}),
    "disabled": (DISABLED, {}),
    "names": (as_usual, {"adapter_names": ["a", "__base__", "a"]}),
    "tasks": (as_usual, {"task_ids": [0, 2, 1], "adapter_names": ["b", "b", "a"]}),
}


def trained(model: PeftModel) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def gradients(model: PeftModel, x: Tensor, *losses: Tensor) -> dict[str, Tensor]:
    """Those that a backward of the losses puts there."""
    for value in [x, *trained(model).values()]:
        value.grad = None
    sum((loss * direction(loss)).sum() for loss in losses).backward()  # type: ignore[union-attr]
    found = {name: value.grad for name, value in {**trained(model), "x": x}.items() if value.grad is not None}
    return {name: value for name, value in found.items() if value.abs().max() > 0}


def assert_right_or_refused(found: Callable[[], dict[str, Tensor]], expected: dict[str, Tensor]) -> bool:
    """The gradients are those expected, or there is an error of one line; whether they are."""
    try:
        own = found()
    except Exception as error:
        if one_line(error):
            return False
        raise
    assert own.keys() == expected.keys()
    for name, value in expected.items():
        assert distance(own[name], value) < 1e-9, name
    return True


def call(model: PeftModel, how: tuple[Context, dict[str, Any]], x: Tensor) -> Tensor:
    context, given = how
    torch.default_generator.manual_seed(7)  # Poly draws in training
    with context(model):
        return answer_of(model(**given, **({"inputs_embeds": x} if x.dim() == 3 and len(x) == 3 else {"x": x})))


@REENTRANT
@pytest.mark.parametrize("how", HOW)
def test_a_checkpoint_of_the_user_s_own(how: str, reentrant: bool) -> None:
    model, x = blocks(), X.clone().requires_grad_()
    plain_answer = model(X).detach()
    expected = gradients(model, x, call(model, HOW[how], x))
    assert {"disabled": 1, "disabled, with names": 1}.get(how, 4) <= len(expected)
    model.get_base_model().reentrant = reentrant  # type: ignore[assignment]
    right = assert_right_or_refused(lambda: gradients(model, x, call(model, HOW[how], x)), expected)
    assert right or how != "plain"

    def in_another_thread() -> dict[str, Tensor]:
        loss, found = call(model, HOW[how], x), []
        in_threads([lambda: found.append(gradients(model, x, loss))])
        return found[0]  # type: ignore[no-any-return]

    def after_another_call() -> dict[str, Tensor]:
        loss = call(model, HOW[how], x)
        call(model, HOW["other names"], x)
        call(model, HOW["plain"], x)
        return gradients(model, x, loss)

    def inside_another_context() -> dict[str, Tensor]:
        loss = call(model, HOW[how], x)
        with model.disable_adapter():
            return gradients(model, x, loss)

    for later in (in_another_thread, after_another_call, inside_another_context):
        assert_right_or_refused(later, expected)
    with model.disable_adapter():
        assert_right_or_refused(lambda: gradients(model, x, call(model, HOW[how], x)), disabled_gradients())
    model.get_base_model().reentrant = None  # type: ignore[assignment]
    assert same_bits(model(X).detach(), plain_answer)


def disabled_gradients() -> dict[str, Tensor]:
    model, x = blocks(), X.clone().requires_grad_()
    return gradients(model, x, call(model, HOW["disabled"], x))


@REENTRANT
@pytest.mark.parametrize("second", HOW)
@pytest.mark.parametrize("first", HOW)
def test_two_calls_before_one_backward(first: str, second: str, reentrant: bool) -> None:
    model, x = blocks(), X.clone().requires_grad_()

    def both() -> dict[str, Tensor]:
        return gradients(model, x, call(model, HOW[first], x), call(model, HOW[second], x))

    expected = both()
    model.get_base_model().reentrant = reentrant  # type: ignore[assignment]
    right = assert_right_or_refused(both, expected)
    assert right or (first, second) != ("plain", "plain")
    assert_right_or_refused(both, expected)


@REENTRANT
@pytest.mark.parametrize("how", LLAMA_HOW)
def test_checkpointing_of_transformers(how: str, reentrant: bool) -> None:
    model = transformer()
    x = model.get_base_model().get_input_embeddings()(IDS).detach().requires_grad_()
    expected = gradients(model, x, call(model, LLAMA_HOW[how], x))
    other = gradients(model, x, call(model, LLAMA_HOW[how], x), call(model, LLAMA_HOW["names"], x))
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    right = assert_right_or_refused(lambda: gradients(model, x, call(model, LLAMA_HOW[how], x)), expected)
    assert right or how == "disabled"

    def two() -> dict[str, Tensor]:
        return gradients(model, x, call(model, LLAMA_HOW[how], x), call(model, LLAMA_HOW["names"], x))

    assert_right_or_refused(two, other)

    def in_another_thread() -> dict[str, Tensor]:
        loss, found = call(model, LLAMA_HOW[how], x), []
        in_threads([lambda: found.append(gradients(model, x, loss))])
        return found[0]  # type: ignore[no-any-return]

    assert_right_or_refused(in_another_thread, expected)


@REENTRANT
def test_threads_that_train_under_checkpointing(reentrant: bool) -> None:
    """Forwards and backwards of several threads interleave: each has its own gradients, or an error of one line."""
    model, wrong = blocks(), []
    expected = {}
    for how, each in HOW.items():
        x = X.clone().requires_grad_()
        expected[how] = torch.autograd.grad(call(model, each, x).cumsum(-1).sum(), x)[0]
    model.get_base_model().reentrant = reentrant  # type: ignore[assignment]
    values = list(trained(model).values())
    model.get_base_model().requires_grad_(False)  # only x, which threads do not share, has a gradient

    def work(how: str) -> None:
        for _ in range(10):
            x = X.clone().requires_grad_()
            try:
                call(model, HOW[how], x).cumsum(-1).sum().backward()
            except Exception as error:
                if not one_line(error):
                    wrong.append(f"{how}: {type(error).__name__}: {error}"[:200])
            else:
                if not distance(x.grad, expected[how]) < 1e-9:  # type: ignore[arg-type]
                    wrong.append(how)

    in_threads([lambda how=how: work(how) for how in HOW])
    assert values
    assert wrong == []
