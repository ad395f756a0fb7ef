"""Adapters that are switched off in some layers: beside Hugging Face PEFT, and what a model makes of it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peanut
from peanut import LoraConfig, OFTConfig, PeanutConfig, PeanutError, PeftModel, get_peft_model, to_peft

from ...support import PEER_WARNINGS, distance, randomised, same_bits

pytestmark = PEER_WARNINGS
X = torch.linspace(-1, 1, 24).reshape(4, 6).sin()


def base() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))


def layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "enable_adapters")]


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_one_layer_off_is_what_the_peer_makes_of_it() -> None:
    peft = pytest.importorskip("peft")
    settings = {"target_modules": ["0", "2"], "modules_to_save": ["4"], "init_lora_weights": False}
    theirs = peft.get_peft_model(base(), peft.LoraConfig(**settings))
    ours = get_peft_model(base(), LoraConfig(**settings))
    layers(theirs)[2].modules_to_save["default"].weight.data += 1
    ours.load_state_dict(theirs.state_dict())
    steps: list[list[bool | None]] = [
        [False, None, None],
        [None, False, None],
        [None, None, False],
        [None, True, None],
        [True, None, True],
        [False, False, False],
        [True, True, True],
    ]
    seen = list[Tensor]()
    for step in steps:
        for model in (theirs, ours):
            for layer, enabled in zip(layers(model), step, strict=True):
                if enabled is not None:
                    layer.enable_adapters(enabled)
        states = [[layer.disable_adapters for layer in layers(model)] for model in (theirs, ours)]
        assert states[0] == states[1]
        assert distance(ours(X), theirs(X)) < 1e-6
        assert ours.get_model_status().enabled == theirs.get_model_status().enabled
        off = {f"base_model.model.{name}." for name, is_off in zip("024", states[1], strict=True) if is_off}
        assert not any(name.startswith(tuple(off)) for name in trained(ours))
        seen.append(ours(X))
    assert len({tuple(outputs.flatten().tolist()) for outputs in seen}) == 5
    assert same_bits(seen[2], base()(X))


@pytest.mark.parametrize(
    "config",
    [PeanutConfig(r=2, depth=1), OFTConfig(oft_block_size=3), LoraConfig(r=2, use_dora=True)],
    ids=lambda config: config.method,
)
def test_a_layer_off_stays_off_until_it_is_switched_on(config: Any) -> None:
    config.target_modules = ["0", "2"]
    model = randomised(get_peft_model(base(), config)).eval()
    expected, trainable = model(X), trained(model)
    first: Any = model.get_submodule("base_model.model.0")
    first.enable_adapters(False)
    off = model(X)
    assert distance(off, expected) > 1e-3
    assert trained(model) == {name for name in trainable if ".model.2." in name}
    with model.disable_adapter():
        assert same_bits(model(X), base()(X))
    assert same_bits(model(X), off)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_bits(again(X), off)
    model.merge_adapter()
    assert distance(model(X), off) < 1e-5
    model.unmerge_adapter()
    with model.inference(), torch.no_grad():
        assert distance(model(X), off) < 1e-5
        first.enable_adapters(True)
        assert distance(model(X), expected) < 1e-5
    assert trained(model) == trainable
    first.enable_adapters(False)
    model.base_model.enable_adapter_layers()
    assert same_bits(model(X), expected)


def test_what_reads_the_weight_reads_the_bases() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, self.inner.weight, self.inner.bias)

    model = randomised(get_peft_model(Reader(), LoraConfig(target_modules=["inner"])))
    model.add_adapter("b", LoraConfig(target_modules=["inner"]))
    inner: Any = model.get_submodule("base_model.model.inner")
    changed = model(X)
    inner.enable_adapters(False)
    assert same_bits(model(X), inner.base_layer(X))
    assert distance(model(X), changed) > 1e-3


def test_it_does_not_go_over_to_the_peer_in_silence() -> None:
    pytest.importorskip("peft")
    model = get_peft_model(base(), LoraConfig(target_modules=["0", "2"]))
    layers(model)[0].enable_adapters(False)
    with pytest.raises(PeanutError, match=r"^adapters are disabled; expected adapters that act; call enable_adapter"):
        to_peft(model)
    assert isinstance(model, PeftModel)
    assert peanut.get_model_status(model).enabled == "irregular"


def test_other_active_adapters_in_one_layer_are_what_the_peer_makes_of_it() -> None:
    peft = pytest.importorskip("peft")
    settings = {"target_modules": ["0", "2"], "modules_to_save": ["4"], "init_lora_weights": False}
    theirs = peft.get_peft_model(base(), peft.LoraConfig(**settings))
    ours = get_peft_model(base(), LoraConfig(**settings))
    for model, library in ((theirs, peft), (ours, peanut)):
        model.add_adapter("b", library.LoraConfig(**settings))
    for index, name in enumerate(("default", "b")):
        layers(theirs)[2].modules_to_save[name].weight.data += index + 1
    ours.load_state_dict(theirs.state_dict())
    expected = trained(ours)
    seen = list[Tensor]()
    steps = [(0, "b"), (1, ["b", "default"]), (2, "b"), (1, "b"), (0, ["default"]), (1, ["default"]), (2, ["default"])]
    for index, names in steps:
        for model in (theirs, ours):
            layers(model)[index].set_adapter(names)
        assert distance(ours(X), theirs(X)) < 1e-6
        assert [layer.active_adapters for layer in layers(ours)] == [
            [layer.active_adapters] if isinstance(layer.active_adapters, str) else list(layer.active_adapters)
            for layer in layers(theirs)
        ]
        assert trained(ours) == trained(theirs)
        seen.append(ours(X))
    assert len({tuple(outputs.flatten().tolist()) for outputs in seen}) == len(steps)
    assert trained(ours) == expected
    layers(ours)[0].set_adapter("b")
    assert peanut.get_model_status(ours).active_adapters == "irregular"
    with pytest.raises(
        PeanutError, match=r"^'0' with other active adapters \(\['b'\]\) than the model; expected the sa"
    ):
        ours.merge_adapter()
    ours.set_adapter("default")
    assert same_bits(ours(X), seen[-1])


def two(**settings: Any) -> Any:
    model = get_peft_model(base(), LoraConfig(target_modules=["0", "2"], **settings))
    model.add_adapter("b", LoraConfig(target_modules=["0", "2"], **settings))
    return randomised(model, ["default", "b"]).eval()


def test_another_active_adapter_in_one_layer_is_not_computed_with_what_is_merged() -> None:
    model = two()
    plain = copy.deepcopy(model)
    layers(plain)[0].set_adapter("b")
    model.merge_adapter()
    with pytest.warns(UserWarning, match=r"^adapter 'default' was merged, and is unmerged so that \['b'\] can be act"):
        layers(model)[0].set_adapter("b")
    assert distance(model(X), plain(X)) < 1e-5


def test_what_was_of_one_layer_goes_with_the_adapters() -> None:
    model = two()
    expected = model(X)
    layers(model)[0].set_adapter("b")
    model.delete_adapter("b")
    assert same_bits(model(X), expected)
    model.merge_adapter()
    model.unmerge_adapter()
    layers(model)[0].enable_adapters(False)
    model.delete_adapter("default")
    model.add_adapter("new", LoraConfig(target_modules=["0", "2"], init_lora_weights=False))
    model.set_adapter("new")
    assert not any(layer.disable_adapters for layer in layers(model))
    assert {name for name, _ in model.named_parameters() if "new" in name} == trained(model)


def test_heads_and_freezing_are_as_in_the_whole_model() -> None:
    model = two(modules_to_save=["4"])
    with pytest.raises(PeanutError, match=r"^adapters 'default' and 'b' each have a trained copy of '4'"):
        layers(model)[2].set_adapter(["default", "b"])
    layers(model)[0].set_adapter("b")
    assert any(".b." in name for name in trained(model))
    model.set_requires_grad("b", requires_grad=False)
    assert not any(".b." in name for name in trained(model))


def test_a_merge_for_good_says_that_it_takes_what_is_off() -> None:
    model = two()
    expected = model(X)
    layers(model)[0].enable_adapters(False)
    with pytest.warns(UserWarning, match=r"^adapters that are switched off at '0' are merged too$"):
        plain = model.merge_and_unload()
    assert distance(plain(X), expected) < 1e-5
