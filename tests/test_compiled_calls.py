"""A compiled model called inside and outside of contexts, and in threads, answers as the one that is not compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peanut import LoraConfig, PeanutConfig, PeftModel, get_peft_model

from .calls import Mlp, X, in_threads
from .support import distance, one_thread, randomised  # noqa: F401


def small() -> PeftModel:
    model = get_peft_model(Mlp().double(), LoraConfig(r=2, target_modules=["layers.0", "layers.2"]), "a")
    model.add_adapter("b", PeanutConfig(r=3, target_modules=["layers.0", "layers.1"]))
    return randomised(model).eval()  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo, of its own doing
@pytest.mark.parametrize("grad", [False, True], ids=["without gradients", "with gradients"])
def test_a_compiled_model_inside_and_outside(grad: bool) -> None:
    model = small()
    names = ["b", "__base__", "a", "b"]

    def answers(called: Any) -> list[Tensor]:
        found = [called(X)]
        with model.disable_adapter():
            found.append(called(X))
        found += [called(X), called(X, adapter_names=names), called(X)]
        with model.disable_adapter(), model.disable_adapter():
            found.append(called(X, adapter_names=names))
        model.set_adapter("b")
        found += [called(X), called(X, adapter_names=["a"] * 4)]
        with model.disable_adapter():
            found.append(called(X))
        model.set_adapter("a")
        return [*found, called(X)]

    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        expected = answers(model)
        compiled = torch.compile(model, backend="aot_eager")
        for _ in range(2):
            for own, right in zip(answers(compiled), expected, strict=True):
                assert distance(own, right) < 1e-9
        for parameter in model.parameters():
            parameter.data *= 1.3
        moved = answers(model)
        assert distance(moved[0], expected[0]) > 0.02
        for own, right in zip(answers(compiled), moved, strict=True):
            assert distance(own, right) < 1e-9
    assert distance(expected[1], expected[0]) > 0.02
    torch._dynamo.reset()


def test_a_compiled_model_in_two_threads() -> None:
    """Compiled beforehand for each call: threads then have their own answers."""
    model, wrong = small(), []
    names = ["b", "__base__", "a", "b"]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")

    @torch.no_grad()
    def disabled(called: Any) -> Tensor:
        with model.disable_adapter():
            return called(X)  # type: ignore[no-any-return]

    @torch.no_grad()
    def plain(called: Any) -> Tensor:
        return called(X)  # type: ignore[no-any-return]

    @torch.no_grad()
    def named(called: Any) -> Tensor:
        return called(X, adapter_names=names)  # type: ignore[no-any-return]

    kinds = [plain, disabled, named]
    expected = [each(model) for each in kinds]
    assert all(distance(each(compiled), right) < 1e-9 for each, right in zip(kinds, expected, strict=True))

    def work(number: int) -> None:
        far = [distance(kinds[number](compiled), expected[number]) for _ in range(30)]
        wrong.extend(kinds[number].__name__ for each in far if not each < 1e-9)

    in_threads([lambda number=number: work(number) for number in range(3)])
    assert wrong == []
    torch._dynamo.reset()
