"""Hooks that users have put on a layer run around the adapted layer, as they do around the merged one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peanut import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model

from ...support import FIRST_CASES, Case, Net, directed, distance, one_thread, randomised, same_bits  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:.*returned no loss")

Handle = Any
HOOKS: dict[str, Callable[[nn.Module], Handle]] = {
    "forward": lambda layer: layer.register_forward_hook(lambda module, args, y: 2 * y),
    "forward, with kwargs": lambda layer: layer.register_forward_hook(
        lambda module, args, kwargs, y: y + len(args), with_kwargs=True, always_call=True
    ),
    "before": lambda layer: layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "before, with kwargs": lambda layer: layer.register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0] * 2,), kwargs), with_kwargs=True
    ),
    "backward": lambda layer: layer.register_full_backward_hook(
        lambda module, slopes, given: tuple(None if slope is None else 2 * slope for slope in slopes)
    ),
    "before the backward": lambda layer: layer.register_full_backward_pre_hook(
        lambda module, given: tuple(3 * slope for slope in given)
    ),
}
X = torch.randn(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
LORA = LoraConfig(r=4, target_modules=["layer"])


def linear_net() -> Net:
    torch.manual_seed(1)
    return Net(nn.Linear(12, 20)).double()


def adapted(net: nn.Module) -> PeftModel:
    torch.manual_seed(3)
    return randomised(get_peft_model(net, LORA)).eval()


def answers(model: nn.Module) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of the input."""
    x = X.clone().requires_grad_()
    y = model(x)
    directed(y).backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("way", HOOKS)
def test_a_hook_does_the_same_before_and_after_a_merge(way: str) -> None:
    net, plain = linear_net(), adapted(linear_net())
    handle = HOOKS[way](net.layer)
    model = adapted(net)
    y, slope = answers(model)
    expected = adapted(linear_net()).merge_and_unload()
    HOOKS[way](expected.layer)
    assert max(map(distance, answers(expected), (y, slope))) < 1e-12
    base = linear_net()
    HOOKS[way](base.layer)
    with model.disable_adapter():
        assert all(map(same_bits, answers(model), answers(base)))
    model.merge_adapter()
    assert max(map(distance, answers(model), (y, slope))) < 1e-12
    merged = copy.deepcopy(model).merge_and_unload()
    assert max(map(distance, answers(merged), (y, slope))) < 1e-12
    model.unmerge_adapter()
    handle.remove()
    assert all(map(same_bits, answers(model), answers(plain)))


CASES = [case for case in FIRST_CASES if case.method in ("LORA", "PEANUT", "OFT", "IA3", "LN_TUNING")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_hook_sees_the_layers_input_and_what_the_adapted_layer_computes(case: Case) -> None:
    net, seen = case.net(), []
    layer, x = net.layer, case.input()
    layer.register_forward_hook(lambda module, args, y: seen.append((module, args[0], y)))
    torch.manual_seed(3)
    expected = case.adapted()(x)
    torch.manual_seed(3)
    model = randomised(get_peft_model(net, case.config())).eval()
    assert same_bits(model(x), expected)
    for found, given, y in seen:
        assert found is layer  # as whoever looks up its name expects
        assert given is x
        assert same_bits(y, expected)
    assert len(seen) == 1


def test_hooks_stay_with_the_layer_whatever_becomes_of_the_adapters() -> None:
    net, seen = linear_net(), []
    layer = net.layer
    handles = [layer.register_forward_hook(lambda module, args, y: seen.append(("early", module)))]
    model = adapted(net)
    handles.append(net.layer.register_forward_hook(lambda module, args, y: seen.append(("late", module))))
    model(X)
    assert seen == [("early", layer), ("late", net.layer)]
    assert model.unload() is net
    assert net.layer is layer
    seen.clear()
    net(X)
    assert seen == [("early", layer), ("late", layer)]
    for handle in handles:
        handle.remove()
    inject_adapter_in_model(LORA, net)
    seen.clear()
    net(X)
    assert seen == []


def test_a_hook_on_the_base_layer_sees_the_base_and_a_merge_says_so() -> None:
    model, seen = adapted(linear_net()), []
    base = model.get_base_model().layer.base_layer
    base.register_forward_hook(lambda module, args, y: seen.append(y))
    y = model(X)
    assert same_bits(seen.pop(), linear_net()(X))
    with pytest.warns(UserWarning, match=r"hooks were put on 'layer\.base_layer', not on 'layer'"):
        model.merge_adapter()
    model(X)
    assert distance(seen.pop(), y) < 1e-12
    model.unmerge_adapter()
    model.unload()(X)
    assert same_bits(seen.pop(), linear_net()(X))


def test_handles_of_a_layers_own_hooks_remove_them_after_unload_though_the_base_layer_had_some_too() -> None:
    net, seen = linear_net(), []
    handle = net.layer.register_forward_hook(lambda *_: seen.append("own"))
    model = adapted(net)
    model.get_base_model().layer.base_layer.register_forward_hook(lambda *_: seen.append("base"))
    model.unload()(X)
    assert seen == ["base", "own"]
    handle.remove()
    net(X)
    assert seen == ["base", "own", "base"]


def test_a_merge_says_once_that_base_layers_have_hooks() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model = get_peft_model(net, LoraConfig(target_modules=["0", "1"]))
    for _, layer in model.adapters.layers():
        layer.base_layer.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"hooks were put on '0\.base_layer', not on '0' \(and 1 more\)") as told:
        model.merge_adapter()
    assert len(told) == 1


def test_hooks_of_a_module_that_is_trained_whole_stay_with_it() -> None:
    net, seen = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 5)).double(), []
    head = net[1]
    handle = head.register_forward_hook(lambda module, args, y: seen.append(module))
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])).eval()
    model(X)
    assert seen == [head]
    merged: Any = model.merge_and_unload()
    merged(X)
    assert seen == [head, merged[1]]
    handle.remove()
    merged(X)
    assert len(seen) == 2


def test_a_hook_that_makes_the_weight_goes_on_making_it() -> None:
    torch.manual_seed(1)
    net = Net(torch.nn.utils.prune.random_unstructured(nn.Linear(12, 20), "weight", 0.5)).double()
    mask = net.layer.weight_mask.clone()
    seen: list[Tensor] = []
    net.layer.register_forward_pre_hook(lambda module, args: seen.append(module.weight))
    model = adapted(net)
    with model.disable_adapter(), torch.no_grad():
        net.layer.base_layer.weight_orig.fill_(1.0)
        y = model(X)
    assert distance(y, X @ mask.T + net.layer.base_layer.bias) < 1e-12
    assert len(seen) == 1


def test_a_hook_is_called_with_the_layer_that_is_there_now() -> None:
    net, seen = linear_net(), []
    net.layer.register_forward_hook(lambda module, *_: seen.append(module))
    model = adapted(net)
    layer = model.get_base_model().layer
    layer.base_layer = copy.deepcopy(layer.base_layer)
    model(X)
    assert seen == [layer.base_layer]
