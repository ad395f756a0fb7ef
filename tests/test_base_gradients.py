"""The gradients of a base's own weight and bias, where somebody trains them beside adapters, are those of W' = f(W)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peanut import PeftModel

from .dense import layer_of, written_out
from .support import CASES, FIRST_CASES, Case, directed, distance, one_thread  # noqa: F401

ON_LINEAR = [case for case in CASES if (case.kind, case.layer) == ("linear", "wide")]
CHOSEN = ON_LINEAR + [case for case in FIRST_CASES if case.kind != "linear"]


def found_and_expected(model: PeftModel, case: Case, names: list[str], x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For the base's parameters: the gradient that the adapted layer gives, and that of the dense formula."""
    layer = layer_of(model)
    own = [parameter.requires_grad_() for parameter in layer.base_layer.parameters()]
    gradients = [
        torch.autograd.grad(directed(y), own, allow_unused=True) for y in (model(x), written_out(case, layer, names, x))
    ]
    pairs = [
        tuple(torch.zeros_like(parameter) if grad is None else grad for grad in pair)
        for parameter, *pair in zip(own, *gradients, strict=True)
    ]
    assert any(bool(expected.any()) for _, expected in pairs) or case.method == "LN_TUNING"
    return pairs  # type: ignore[return-value]


def assert_close(pairs: list[tuple[Tensor, Tensor]]) -> None:
    assert pairs
    for found, expected in pairs:
        if bool(expected.any()):
            assert distance(found, expected) < 1e-11
        else:  # the adapter has put another in its place
            assert float(found.abs().max()) < 1e-11


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_one_adapter(case: Case) -> None:
    model, x = case.adapted(), case.input()
    assert_close(found_and_expected(model, case, ["default"], x))
    if case.kind in ("linear", "conv1d"):  # few tokens may be computed otherwise
        assert_close(found_and_expected(model, case, ["default"], x[0, :5]))


@pytest.mark.parametrize("case", [case for case in FIRST_CASES if case.kind == "linear"], ids=str)
def test_two_adapters(case: Case) -> None:
    model = case.adapted("one", "two")
    model.set_adapter(["one", "two"])
    assert_close(found_and_expected(model, case, ["one", "two"], case.input()))
