"""Weights that a parametrisation or a hook makes in each forward: read as they are made, and not merged into."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm
from torch.optim.swa_utils import AveragedModel

from peanut import LoraConfig, PeanutConfig, PeanutError, PeftModel, get_peft_model

from ..dense import layer_of, written_out
from ..support import (  # noqa: F401
    FIRST_CASES,
    Case,
    Net,
    directed,
    distance,
    gradients,
    one_thread,
    randomised,
    refused,
    same_bits,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*returned no loss"),
    pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.* is deprecated"),
    pytest.mark.filterwarnings("ignore:.*spectral_norm.* is deprecated"),
]


def by_hand(layer: Any) -> nn.Module:
    """A weight that a hook of the user makes: its rows have the norms that a parameter says."""
    layer.double()
    layer.long, layer.norms = nn.Parameter(layer.weight.detach()), nn.Parameter(torch.rand(6, 1).double() + 1)
    del layer.weight

    def make(module: Any, args: object = ()) -> None:
        module.weight = module.norms * module.long.detach()

    make(layer)
    layer.register_forward_pre_hook(make)
    return layer  # type: ignore[no-any-return]


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": old_weight_norm,
    "old spectral_norm": old_spectral_norm,
    "a hook": by_hand,
    "pruning": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    "two prunings": lambda layer: prune.l1_unstructured(prune.random_unstructured(layer, "weight", 0.3), "weight", 0.3),
}
REMOVED: dict[str, Callable[[Any], Any]] = {
    "weight_norm": lambda layer: parametrize.remove_parametrizations(layer, "weight"),
    "old weight_norm": nn.utils.remove_weight_norm,
    "old spectral_norm": nn.utils.remove_spectral_norm,
    "pruning": lambda layer: prune.remove(layer, "weight"),
}
CASES = [case for case in FIRST_CASES if case.kind in ("linear", "conv")]


def made(case: Case, way: str) -> Net:
    net = case.net()
    torch.manual_seed(2)  # of pruning and of the first vectors of spectral_norm
    net.layer = WAYS[way](net.layer)
    return net.eval()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_adapter_acts_on_the_weight_that_is_made(case: Case) -> None:
    for way in ("weight_norm", "old spectral_norm", "pruning"):
        base, x = made(case, way), case.input()
        plain = base(x)
        model = randomised(get_peft_model(made(case, way), case.config())).eval()
        y = model(x)
        # The dense form: the same adapter on a plain layer that has what is made as its weight.
        still = Net(case.net().layer)
        with torch.no_grad():
            still.layer.weight.copy_(base.layer.weight)
        torch.manual_seed(0)
        dense = get_peft_model(still, case.config()).eval()
        for (_, own), (_, other) in zip(
            dense.adapters.parameters("default"), model.adapters.parameters("default"), strict=True
        ):
            with torch.no_grad():
                own.copy_(other)
        wanted = written_out(case, layer_of(dense), ["default"], x)
        assert distance(wanted, plain) > 1e-3
        assert distance(y, wanted) < 1e-10
        with model.disable_adapter():
            assert same_bits(model(x), plain)


def net(way: str, kind: str = "linear") -> Net:
    torch.manual_seed(1)
    layer = nn.Linear(6, 6) if kind == "linear" else nn.Conv2d(3, 6, 2)
    return Net(WAYS[way](layer)).double()


X = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
PEANUT = PeanutConfig(r=2, depth=1, target_modules=["layer"])


def adapted(way: str, config: Any = PEANUT) -> PeftModel:
    base = net(way)
    torch.manual_seed(3)
    return randomised(get_peft_model(base, config)).eval()


@pytest.mark.parametrize("way", WAYS)
def test_it_is_saved_loaded_and_taken_out_as_any_other(way: str, tmp_path: Path) -> None:
    plain = net(way).eval()(X)
    model = adapted(way)
    y = model(X)
    assert distance(y, plain) > 0.01
    layer = layer_of(model)
    assert distance(y, X @ (layer.frozen.matrix() + layer.delta("default")).T + layer.frozen.bias()) < 1e-12
    model.save_pretrained(tmp_path)
    assert same_bits(PeftModel.from_pretrained(net(way), tmp_path)(X), y)
    assert same_bits(model.unload()(X), plain)


@pytest.mark.parametrize("way", WAYS)
def test_a_merge_that_the_next_forward_would_lose_is_refused(way: str) -> None:
    model = adapted(way)
    y = model(X)
    with refused(
        model, r"'layer' makes its weight anew in each forward.*would be lost; expected a parameter; .*remove_"
    ):
        model.merge_adapter()
    assert same_bits(model(X), y)
    with refused(model, r"makes its weight anew"):
        model.merge_and_unload()
    assert same_bits(model(X), y)


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_a_copy_has_the_adapters(way: str, name: str) -> None:
    """A parametrised class says itself how it is copied; what wraps its modules is not copied so."""
    model = adapted(way)
    if name == "bias":
        parametrizations.weight_norm(layer_of(model).base_layer, name, dim=None)
    y = model(X)
    for other in (copy.deepcopy(model), AveragedModel(model), copy.deepcopy(model.base_model)):
        assert same_bits(other(X), y)
    twin = copy.deepcopy(layer_of(model))
    assert twin is not layer_of(model)
    assert type(twin) is type(layer_of(model))


@pytest.mark.parametrize("way", REMOVED)
def test_a_weight_that_was_made_a_parameter_is_merged_into(way: str) -> None:
    model = adapted(way)
    y = model(X)
    REMOVED[way](layer_of(model).base_layer)
    assert distance(model(X), y) < 1e-12
    model.merge_adapter()
    assert distance(model(X), y) < 1e-12
    model.unmerge_adapter()
    assert distance(model(X), y) < 1e-12


@pytest.mark.parametrize("config", [PEANUT, LoraConfig(r=2, target_modules=["layer"])], ids=["PEANUT", "LORA"])
@pytest.mark.parametrize("way", WAYS)
def test_in_training_the_weight_that_is_read_is_the_one_of_that_forward(way: str, config: Any) -> None:
    model = adapted(way, config).train()
    layer = layer_of(model)
    if way == "old spectral_norm" and config is PEANUT:
        with pytest.raises(PeanutError, match=r"weight changes in each forward of training.*spectral_norm"):
            model(X)
        layer.base_layer.eval()
    for _ in range(3):
        y = model(X)
        directed(y).backward()
        with torch.no_grad():
            state = {key: value.clone() for key, value in layer.base_layer.state_dict().items()}
            layer.base_layer.eval()  # what was made last is made again, and not the next
            wanted = X @ (layer.frozen.matrix() + layer.delta("default")).T + layer.frozen.bias()
            layer.base_layer.train()
            assert all(same_bits(value, state[key]) for key, value in layer.base_layer.state_dict().items())
        assert distance(y, wanted) < 1e-12
        if way == "old spectral_norm" and config is PEANUT:
            layer.base_layer.eval()
    assert gradients(model)


def test_a_module_whose_weight_a_hook_of_the_user_makes_is_not_trained_whole() -> None:
    """The hook would go on making that of the base's module."""
    model = nn.Sequential(nn.Linear(6, 6), by_hand(nn.Linear(6, 6))).double().eval()
    y = model(X)
    with pytest.raises(PeanutError, match=r"'1' has its weight made by a hook, .*; leave it out"):
        get_peft_model(model, LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    assert same_bits(model(X), y)
    assert type(model[1]) is nn.Linear


@pytest.mark.parametrize("way", [way for way in WAYS if way != "a hook"])
def test_a_module_with_made_weights_is_trained_whole(way: str, tmp_path: Path) -> None:
    torch.manual_seed(4)

    def base() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 6), WAYS[way](nn.Linear(6, 6))).double()

    config = LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])
    model = get_peft_model(base(), config)
    assert distance(model.eval()(X), base().eval()(X)) < 1e-12
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1)
    directed(model(X)).backward()
    optimizer.step()
    y = model(X)
    assert distance(y, base().eval()(X)) > 0.01
    with model.disable_adapter():
        assert same_bits(model(X), base().eval()(X))
    model.save_pretrained(tmp_path)
    assert same_bits(PeftModel.from_pretrained(base(), tmp_path)(X), y)


def test_a_bias_that_is_pruned_is_moved_but_not_merged_into() -> None:
    def base() -> Net:
        torch.manual_seed(1)
        return Net(prune.random_unstructured(nn.Linear(6, 6), "bias", 0.5)).double()

    lora = randomised(get_peft_model(base(), LoraConfig(r=2, target_modules=["layer"], bias="lora_only"))).eval()
    y = lora(X)
    with refused(lora, r"'layer' makes its bias anew"):
        lora.merge_adapter()
    assert same_bits(lora(X), y)
    still = randomised(get_peft_model(base(), LoraConfig(r=2, target_modules=["layer"]))).eval()
    y = still(X)
    still.merge_adapter()  # which leaves the bias alone
    assert distance(still(X), y) < 1e-12


def test_what_a_thread_makes_is_kept_for_its_call_alone() -> None:
    model, plain = adapted("weight_norm"), parametrizations.weight_norm(nn.Linear(6, 6))
    y, found = model(X), list[Tensor]()
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        inside.set()
        assert go_on.wait(10)

    layer_of(model).base_layer.register_forward_hook(wait)
    thread = threading.Thread(target=lambda: found.append(model(X)))
    thread.start()
    assert inside.wait(10)
    before = plain.weight.detach().clone()
    with torch.no_grad():
        plain.parametrizations.weight.original0.mul_(2)  # type: ignore[union-attr,operator]
    after = plain.weight
    go_on.set()
    thread.join()
    assert distance(after, 2 * before) < 1e-6
    assert same_bits(found[0], y)


@pytest.mark.parametrize("method", ["OFT", "LORA", "PEANUT"])
def test_a_bias_that_is_made_is_used_where_the_weight_is_changed(method: str) -> None:
    case = next(case for case in FIRST_CASES if (case.method, case.kind) == (method, "conv"))
    net = case.net()
    parametrizations.weight_norm(net.layer, "bias", dim=None)
    torch.manual_seed(3)
    model = randomised(get_peft_model(net, case.config())).eval()
    torch.manual_seed(3)
    assert distance(model(case.input()), case.adapted()(case.input())) < 1e-12
