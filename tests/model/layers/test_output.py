"""An adapter of an output says so where the model computes without calling the module."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peanut import PeftModel, get_peft_model
from peanut.protocols import METHODS

from ...support import distance, one_thread, randomised, same_bits  # noqa: F401


class Net(nn.Module):
    """Applies a layer in one of several ways."""

    def __init__(self, way: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.block = nn.Sequential(nn.Linear(8, 8))
        self.layer, self.way = nn.Linear(8, 8), way

    def forward(self, x: Tensor) -> Tensor:
        assert self.layer.weight.dtype == x.dtype  # as T5 does
        return self.way(self.layer, self.block(x))


X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(2))
WAYS: dict[str, tuple[Callable[[Any, Tensor], Tensor], bool]] = {
    "called": (lambda layer, x: layer(x), True),
    "read": (lambda layer, x: F.linear(x, layer.weight, layer.bias), False),
    "its forward": (lambda layer, x: layer.forward(x), False),
}


def adapted(way: str, method: str) -> PeftModel:
    config = METHODS[method].config_class(target_modules=["layer", "block.0"])
    return randomised(get_peft_model(Net(WAYS[way][0]), config)).eval()  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:.*prompt")
@pytest.mark.parametrize("method", ["BOTTLENECK", "LOREFT", "DIREFT"])
@pytest.mark.parametrize("way", WAYS)
def test_a_module_that_is_not_called_is_told_of_once(way: str, method: str) -> None:
    model = adapted(way, method)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        with model.disable_adapter():
            model(X)
        assert found == []
        y, again = model(X), model(X)
    assert same_bits(y, again)
    assert [str(each.message).partition(" (")[0] for each in found] == (
        [] if WAYS[way][1] else ["a Net ran and did not call 'layer'"]
    )
    silent = adapted("called", method)
    silent.get_base_model().layer._forward_hooks.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (distance(y, silent(X)) > 1e-3) == WAYS[way][1]
    model.unload()
    assert all(not module._forward_hooks for module in model.get_base_model().modules())


def test_a_module_that_was_called_before_need_not_be_called_again() -> None:
    model = adapted("called", "BOTTLENECK")
    net = model.get_base_model()
    y = model(X)
    net.way = WAYS["read"][0]
    assert distance(model(X), y) > 1e-3  # without a warning: attention calls no projection of keys that are cached


def test_the_hook_that_tells_stays_for_threads_that_are_about_to_call_it() -> None:
    model = adapted("called", "BOTTLENECK")
    base = model.get_base_model()
    before = dict(base._forward_hooks)
    model(X)
    assert dict(base._forward_hooks) == before
