"""A block that runs again in the backward (gradient checkpointing) sees the call that it ran in first.

Where the call cannot be known again, as under a ``torch.utils.checkpoint`` of the user's own whose backward runs after
the context was left, the answer is an error of one line, never another gradient.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peanut import (
    HRAConfig,
    LoraConfig,
    PeanutConfig,
    PeanutError,
    PeftModel,
    PolyConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from peanut.model.adapters.adapter_set import AdapterSet

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


def assert_right(
    found: Callable[[], dict[str, Tensor]], expected: dict[str, Tensor], *, or_refused: bool = False
) -> None:
    """The gradients are those expected, or, where that is allowed, there is an error of one line."""
    own, refusal = None, None
    try:
        own = found()
    except PeanutError as error:
        refusal = error
    assert refusal is None or (or_refused and one_line(refusal)), refusal
    if own is not None:
        assert own.keys() == expected.keys()
        for name, value in expected.items():
            assert distance(own[name], value) < 1e-9, name


def call(model: PeftModel, how: tuple[Context, dict[str, Any]], x: Tensor) -> Tensor:
    context, given = how
    torch.default_generator.manual_seed(7)  # Poly draws in training
    with context(model):
        return answer_of(model(**given, **({"inputs_embeds": x} if x.dim() == 3 and len(x) == 3 else {"x": x})))


def at_once(model: PeftModel, x: Tensor, how: str) -> dict[str, Tensor]:
    return gradients(model, x, call(model, HOW[how], x))


def in_another_thread(model: PeftModel, x: Tensor, how: str) -> dict[str, Tensor]:
    loss, found = call(model, HOW[how], x), []
    in_threads([lambda: found.append(gradients(model, x, loss))])
    return found[0]  # type: ignore[no-any-return]


def after_other_calls(model: PeftModel, x: Tensor, how: str) -> dict[str, Tensor]:
    loss = call(model, HOW[how], x)
    call(model, HOW["other names"], x)
    call(model, HOW["plain"], x)
    return gradients(model, x, loss)


def inside_another_context(model: PeftModel, x: Tensor, how: str) -> dict[str, Tensor]:
    loss = call(model, HOW[how], x)
    with model.disable_adapter():
        return gradients(model, x, loss)


LATER = [at_once, in_another_thread, after_other_calls, inside_another_context]
NEVER_REFUSED = {("plain", at_once), ("plain", in_another_thread), ("plain", after_other_calls)}
"""Under a checkpoint of the user's own: whatever else the backward of a call may be refused, these may not."""


@REENTRANT
@pytest.mark.parametrize("later", LATER, ids=lambda each: each.__name__)
@pytest.mark.parametrize("how", HOW)
def test_a_checkpoint_of_the_user_s_own(how: str, later: Any, reentrant: bool) -> None:
    model, x = blocks(), X.clone().requires_grad_()
    plain_answer = model(X).detach()
    expected, plain = at_once(model, x, how), at_once(model, x, "plain")
    assert {"disabled": 1, "disabled, with names": 1}.get(how, 4) <= len(expected)
    assert_right(lambda: later(model, x, how), expected)  # without a checkpoint
    model.get_base_model().reentrant = reentrant  # type: ignore[assignment]
    refusable = (how, later) not in NEVER_REFUSED
    for _ in range(2):
        assert_right(lambda: later(model, x, how), expected, or_refused=refusable)
    with model.disable_adapter():
        assert_right(lambda: later(model, x, how), disabled_gradients(), or_refused=True)
    gc.collect()  # an error that was raised in another thread still holds its graph
    assert_right(lambda: at_once(model, x, "plain"), plain)  # a refusal leaves nothing behind
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
    for _ in range(2):
        assert_right(both, expected, or_refused=(first, second) != ("plain", "plain"))


@REENTRANT
@pytest.mark.parametrize("how", LLAMA_HOW)
def test_checkpointing_of_transformers(how: str, reentrant: bool) -> None:
    model = transformer()
    x = model.get_base_model().get_input_embeddings()(IDS).detach().requires_grad_()
    expected = gradients(model, x, call(model, LLAMA_HOW[how], x))
    other = gradients(model, x, call(model, LLAMA_HOW[how], x), call(model, LLAMA_HOW["names"], x))
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert_right(lambda: gradients(model, x, call(model, LLAMA_HOW[how], x)), expected)

    def two() -> dict[str, Tensor]:
        return gradients(model, x, call(model, LLAMA_HOW[how], x), call(model, LLAMA_HOW["names"], x))

    def elsewhere() -> dict[str, Tensor]:
        loss, found = call(model, LLAMA_HOW[how], x), []
        in_threads([lambda: found.append(gradients(model, x, loss))])
        return found[0]  # type: ignore[no-any-return]

    assert_right(two, other)
    assert_right(elsewhere, expected)


# However the model is called, and whatever it answers with


@dataclass
class Answer:
    """Not a tree that torch knows."""

    y: Tensor


@dataclass(frozen=True)
class Form:
    """A way to make a model with adapters ``a`` and ``b``, and to call it.

    Args:
        wrap: what the model answers with, made of the tensor.
        of: the tensor in that.
        inner: whether the base model itself is called.
        injected: whether the model was made by ``inject_adapter_in_model``, and no ``PeftModel`` is around it.
    """

    wrap: Callable[[Tensor], Any] = lambda y: y
    of: Callable[[Any], Tensor] = lambda output: output
    inner: bool = False
    injected: bool = False


FORMS = {
    "a tensor": Form(),
    "a dict": Form(lambda y: {"y": y}, lambda output: output["y"]),
    "a dataclass": Form(Answer, lambda output: output.y),
    "a dataclass in a list": Form(lambda y: [Answer(y)], lambda output: output[0].y),
    "of the base model": Form(inner=True),
    "a dataclass of the base model": Form(Answer, lambda output: output.y, inner=True),
    "of an injected model": Form(inner=True, injected=True),
    "a dataclass of an injected model": Form(Answer, lambda output: output.y, inner=True, injected=True),
}


class Wrapping(Blocks):
    """Blocks whose answer has another form."""

    wrap: Callable[[Tensor], Any] = staticmethod(lambda y: y)

    def forward(self, x: Tensor) -> Any:
        return self.wrap(super().forward(x))


class Called:
    """A model in one of the forms."""

    def __init__(self, form: Form, reentrant: bool | None) -> None:
        torch.manual_seed(0)
        self.form, self.base = form, Wrapping().double()
        self.base.wrap, self.base.reentrant = form.wrap, reentrant
        for name in "ab":
            inject_adapter_in_model(LoraConfig(r=2, target_modules=LAYERS), self.base, name)
        self.adapters = AdapterSet.of(self.base)
        self.peft = None if form.injected else PeftModel.around(self.base)
        randomised(self.base).train()
        self.activate("a")

    def activate(self, names: str | list[str]) -> None:
        """Both are trained on, so that a backward that was begun before has the same gradients."""
        self.adapters.activate(names)
        self.adapters.freeze("ab")

    def __call__(self, x: Tensor) -> Tensor:
        model: Any = self.base if self.form.inner or self.peft is None else self.peft
        return self.form.of(model(x))

    def disabled(self, x: Tensor) -> Tensor:
        with self.peft.disable_adapter() if self.peft else self.adapters.state.during(off=True):
            return self(x)


def changed_in_a_thread(model: Called) -> None:
    in_threads([lambda: model.activate("b")])


BEFORE_BACKWARD: dict[str, tuple[Callable[[Called, Tensor], Tensor], Callable[[Called], Any]]] = {
    "nothing": (Called.__call__, lambda model: None),
    "left disable_adapter": (Called.disabled, lambda model: None),
    "another adapter": (Called.__call__, lambda model: model.activate("b")),
    "both adapters": (Called.__call__, lambda model: model.activate(["a", "b"])),
    "another adapter, by another thread": (Called.__call__, changed_in_a_thread),
    "another adapter and back": (Called.__call__, lambda model: [model.activate(name) for name in "ba"]),
    "another call, disabled": (Called.__call__, lambda model: model.disabled(X.clone().requires_grad_())),
}
NEVER_REFUSED_BEFORE = {"nothing"}


@REENTRANT
@pytest.mark.parametrize("before", BEFORE_BACKWARD)
@pytest.mark.parametrize("form", FORMS)
def test_whatever_the_model_answers_with(form: str, before: str, reentrant: bool) -> None:
    forward, change = BEFORE_BACKWARD[before]

    def found(reentrant: bool | None) -> dict[str, Tensor]:
        model, x = Called(FORMS[form], reentrant), X.clone().requires_grad_()
        y = forward(model, x)
        change(model)
        y.backward(direction(y))
        named = {name: value.grad for name, value in [*model.base.named_parameters(), ("x", x)]}
        return {name: value for name, value in named.items() if value is not None and value.abs().max() > 0}

    expected = found(None)
    assert len(expected) >= (1 if before == "left disable_adapter" else 7)
    assert_right(lambda: found(reentrant), expected, or_refused=before not in NEVER_REFUSED_BEFORE)


@REENTRANT
def test_threads_that_train_under_checkpointing(reentrant: bool) -> None:
    """Forwards and backwards of several threads interleave: each has its own gradients, or an error of one line."""
    model, wrong, right = blocks(), [], []
    expected = {}
    for how, each in HOW.items():
        x = X.clone().requires_grad_()
        expected[how] = torch.autograd.grad(call(model, each, x).cumsum(-1).sum(), x)[0]
    model.get_base_model().reentrant = reentrant  # type: ignore[assignment]
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
                right.append(how)
                if not distance(x.grad, expected[how]) < 1e-9:  # type: ignore[arg-type]
                    wrong.append(how)

    in_threads([lambda how=how: work(how) for how in HOW])
    assert wrong == []
    in_threads([lambda: work("plain")] * 4)  # and where there are plain calls alone, none is refused
    assert wrong == []
    assert right.count("plain") >= 40
