"""A batch without samples, or of samples without tokens: an empty answer and gradients of zero, as the layer's own."""

from __future__ import annotations

import pytest
import torch

from peanut.operators.per_sample import PerSample

from .support import FIRST_CASES, Case, gradients, one_thread, same_bits  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:Net returned no loss")  # of methods with a penalty


@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
def test_an_empty_batch(case: Case) -> None:
    base, model, full = case.net(), case.adapted(), case.input()
    for part in (full[:0], full[:0] if case.kind == "conv" else full[:, :0]):  # an image has pixels
        expected = base(part).detach()
        x = part.clone().requires_grad_(part.is_floating_point())
        for training in (False, True):
            y = model.train(training)(x)
            assert same_bits(y.detach(), expected)
            y.sum().backward()
            assert not any(grad.any() for grad in gradients(model).values())
        assert gradients(model).keys() == {name for name, each in model.named_parameters() if each.requires_grad}
        assert x.grad is not None or not x.requires_grad
        model.zero_grad()
        with model.eval().inference(), torch.no_grad():
            assert same_bits(model(x), expected)
        if case.mergeable:
            model.merge_adapter()
            assert same_bits(model(x).detach(), expected)
            model.unmerge_adapter()


def test_no_samples_with_a_change_of_each() -> None:
    operator = PerSample(torch.ones(0, 5, 2), torch.ones(0, 2, 3))
    assert operator.apply(torch.ones(0, 7, 3)).shape == (0, 7, 5)
    assert operator.apply(torch.ones(0, 3)).shape == (0, 5)


@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
def test_no_samples_with_an_adapter_for_each(case: Case) -> None:
    base, model, x = case.net(), case.adapted().eval(), case.input()[:0]
    assert same_bits(model(x, adapter_names=[]).detach(), base(x).detach())
