"""Weights that others than the layer make or hold, and copies and calls of what is parametrised."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from peanut import LoraConfig, get_peft_model
from peanut.weights import with_tensors

from ..support import Net, distance, one_thread, randomised, refused, same_bits  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:.*returned no loss")

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("maker", [nn.Sequential, "property"], ids=["the model", "a property"])
def test_a_merge_into_what_another_than_the_layer_makes_is_refused(maker: Any) -> None:
    class Doubling(nn.Linear):
        weight = property(lambda self: 2 * self.part)  # type: ignore[assignment]

    torch.manual_seed(1)
    layer: Any = nn.Linear(6, 6)
    base = nn.Sequential(layer)
    layer.part = nn.Parameter(layer.weight.detach() / 2)
    del layer.weight
    if maker == "property":
        layer.__class__ = Doubling
    else:
        layer.weight = 2 * layer.part
        base.register_forward_pre_hook(lambda module, args: setattr(module[0], "weight", 2 * layer.part))
    model = randomised(get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))).eval()
    y = model(X)
    with refused(model, r"'0' makes its weight anew"):
        model.merge_adapter()
    assert same_bits(model(X), y)


def test_a_weight_that_is_a_view_of_a_parameter_is_merged_into() -> None:
    class Half(nn.Linear):
        weight = property(lambda self: self.both[6:])  # type: ignore[assignment]

    layer: Any = nn.Linear(6, 6)
    layer.both = nn.Parameter(torch.randn(12, 6))
    del layer.weight
    layer.__class__ = Half
    model = randomised(get_peft_model(nn.Sequential(layer), LoraConfig(r=2, target_modules=["0"]))).eval()
    y = model(X)
    model.merge_adapter()
    assert model.merged_adapters
    assert distance(model(X), y) < 1e-5
    model.unmerge_adapter()
    assert same_bits(model(X), y)


@torch.no_grad()
def test_a_copy_of_a_parametrised_model_has_the_adapters_and_what_is_trained_whole() -> None:
    base: Any = Net(parametrizations.weight_norm(nn.Linear(6, 6)))
    base.own = nn.Linear(6, 6)
    base.kept = nn.Parameter(torch.randn(6, 6))
    parametrizations.orthogonal(base, "kept")
    parametrizations.weight_norm(base.own)
    config = LoraConfig(r=2, target_modules=["layer"], modules_to_save=["own"])
    model = randomised(get_peft_model(base, config)).eval()
    for module in model.modules():
        assert type(copy.deepcopy(module)) is type(module)
    assert same_bits(copy.deepcopy(model)(X), model(X))


def test_what_a_call_replaces_is_not_made() -> None:
    layer, made = parametrizations.orthogonal(nn.Linear(6, 6)), list[None]()
    layer.parametrizations.weight[0].register_forward_hook(lambda *_: made.append(None))  # type: ignore[union-attr,index]
    x, weight = X, torch.randn(6, 6)
    assert same_bits(with_tensors(layer, {"weight": weight}, x), nn.functional.linear(x, weight, layer.bias))  # type: ignore[arg-type]
    assert not made
    with_tensors(layer, {"bias": torch.zeros(6)}, x)
    assert made


class Counting(nn.Linear):
    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x)


def test_what_a_forward_or_a_hook_sets_on_a_parametrised_layer_is_there() -> None:
    layer: Any = parametrizations.weight_norm(Counting(6, 6))
    model = get_peft_model(Net(layer), LoraConfig(r=2, target_modules=["layer"])).eval()
    layer.register_forward_hook(lambda module, args, y: setattr(module, "seen", y))
    before = layer.calls
    model(X)
    y = model(X)
    assert layer.calls == before + 2
    assert same_bits(layer.seen, y)
