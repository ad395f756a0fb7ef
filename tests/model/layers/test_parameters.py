"""The containers of an adapter's parameters, and how rows of a batch are shared out among samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from peanut import LoraConfig, PeanutError, ShiraConfig, get_peft_model
from peanut.model.layers.by_adapter import ByAdapter, View
from peanut.model.layers.parameters import Parameters
from peanut.model.layers.state import AdapterState


def test_parameters_keep_their_suffixes_as_names() -> None:
    values = {
        "peanut_A.weight": torch.ones(2),
        "peanut_encoders.0.weight": torch.ones(1),
        "lora_embedding_A": torch.ones(3),
    }
    parameters = Parameters(values)
    assert list(parameters.values_by_suffix()) == list(values)
    assert all(value.requires_grad for value in parameters.values_by_suffix().values())
    layer = nn.Module()
    parameters.put(layer, "a")
    keys = {"peanut_A.a.weight", "peanut_encoders.a.0.weight", "lora_embedding_A.a"}
    assert layer.state_dict().keys() == keys
    layer.double()  # whatever replaces the parameters, they are read by name
    assert {value.dtype for value in parameters.values_by_suffix().values()} == {torch.float64}
    Parameters(values).put(layer, "b")
    parameters.take_out(layer, "a")
    assert layer.state_dict().keys() == {key.replace(".a", ".b") for key in keys}


def test_modules_of_one_weight_have_no_bias_and_numbered_ones_are_a_list() -> None:
    values = {"lora_A.weight": torch.ones(2, 3), "lora_B.bias": torch.ones(3), "lora_B.weight": torch.ones(3, 2)}
    levels = {f"peanut_encoders.{level}.weight": torch.full((2, 2), float(level)) for level in range(2)}
    layer: Any = nn.Module()
    Parameters({**values, **levels}).put(layer, "a")
    assert layer.lora_A["a"].bias is None
    with pytest.raises(PeanutError, match=r"^a Linear in the place of what adapter 'a' has; expected new tensors"):
        layer.lora_A["a"] = nn.Linear(3, 2)
    assert layer.lora_B["a"].bias.shape == (3,)
    assert (layer.lora_A["a"].in_features, layer.lora_A["a"].out_features) == (3, 2)
    assert torch.equal(layer.lora_B["a"](layer.lora_A["a"](torch.ones(4, 3))), torch.full((4, 3), 7.0))
    assert [each.weight[0, 0].item() for each in layer.peanut_encoders["a"]] == [0, 1]
    assert len(layer.peanut_encoders["a"]) == 2
    assert layer.peanut_encoders["a"][1].weight[0, 0].item() == 1
    assert len(layer.state_dict()) == len(list(layer.parameters())) == 5
    with pytest.raises(KeyError, match="b"):
        layer.lora_A["b"]
    fixed = Parameters({"gate.weight": torch.ones(2), "gate.bias": torch.ones(2)}, untrained=["gate.bias"])
    fixed.put(layer, "a")
    assert layer.gate["a"].state_dict().keys() == {"weight", "bias"}


def test_modules_by_names_that_torch_would_refuse() -> None:
    modules = ByAdapter()
    names = ["0", "keys", "training", "forward", "weight"]
    for name in names:
        modules[name] = nn.Linear(1, 1)
    assert (list(modules), len(modules), "keys" in modules, "values" in modules) == (names, 5, True, False)
    assert not modules.eval()["training"].training
    assert modules.train()["training"].training
    assert {key.partition(".")[0] for key in modules.state_dict()} == set(names)
    assert list(modules.values()) == [modules[name] for name in names]
    assert dict(modules.items()) == {name: modules[name] for name in names}
    assert modules.keys is modules["keys"]
    del modules["keys"]
    assert "keys" not in modules
    assert list(modules.keys()) == list(modules)


def test_what_adapters_have_is_read_as_a_dictionary() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]), "keys")
    model.add_adapter("b", ShiraConfig(target_modules=["0"], r=1))
    layer = model.base_model.model[0]
    assert isinstance(layer.lora_A, nn.ModuleDict)
    assert list(layer.shira_weight.keys()) == ["b"]
    assert [*layer.lora_A.values()] == [layer.lora_A["keys"]]
    assert dict(layer.shira_weight.items()) == {"b": layer.shira_weight["b"]}
    assert not hasattr(layer.lora_A, "pop")
    assert model.get_submodule("base_model.model.0.lora_A.keys") is layer.lora_A["keys"]


def test_a_tensor_is_put_in_the_place_of_another() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), ShiraConfig(target_modules=["0"], r=1))
    layer, x = model.base_model.model[0], torch.ones(1, 4)
    before = model(x)
    layer.shira_weight["default"] = torch.ones_like(layer.shira_weight["default"])
    assert layer.shira_weight["default"].requires_grad
    assert not torch.equal(model(x), before)
    assert model.base_model.model.state_dict()["0.shira_weight.default"].sum() == layer.shira_weight["default"].numel()
    with pytest.raises(PeanutError, match="of shape \\(3,\\) put in the place of adapter 'default'"):
        layer.shira_weight["default"] = torch.ones(3)


def test_a_view_writes_where_the_tensor_is() -> None:
    owner: dict[str, Any] = {"leaf": nn.Parameter(torch.zeros(2))}
    view = View({"weight": (owner, "leaf")})
    assert view.weight is owner["leaf"]
    view.weight = nn.Parameter(torch.ones(2))
    assert owner["leaf"] is view.weight
    view["weight"] = torch.full((2,), 2.0)
    assert owner["leaf"].tolist() == [2, 2]


def test_what_adapters_have_is_read_as_of_a_dict() -> None:
    modules = ByAdapter()
    modules["a"] = nn.Linear(1, 1)
    assert (list(modules.keys()), list(modules.values()), dict(modules.items())) == (
        ["a"],
        [modules["a"]],
        {"a": modules["a"]},
    )
    modules["values"] = nn.Linear(1, 1)
    assert modules.get_submodule("values") is modules["values"]  # an adapter's name wins


@settings(deadline=None, max_examples=25)
@given(samples=st.lists(st.sampled_from(["a", "b", "__base__"]), min_size=1, max_size=6), share=st.integers(1, 4))
def test_every_row_belongs_to_the_sample_it_came_from(samples: list[str], share: int) -> None:
    state = AdapterState()
    with state.during(samples=samples):
        groups = state.groups(len(samples) * share)
    assert sorted(row for rows in groups.values() for row in rows) == list(range(len(samples) * share))
    assert all(samples[row // share] == name for name, rows in groups.items() for row in rows)


@pytest.mark.parametrize(("samples", "rows"), [([], 3), (["a", "b"], 3), (["a", "b"], 1)])
def test_rows_that_no_sample_owns_are_refused(samples: list[str], rows: int) -> None:
    state = AdapterState()
    refusal = rf"^adapter_names has {len(samples)} names and a layer sees a batch of {rows}; .*'__base__' for none"
    with state.during(samples=samples), pytest.raises(PeanutError, match=refusal):
        state.groups(rows)


def test_names_hold_within_their_context_alone() -> None:
    state = AdapterState()
    with state.during(samples=["a"]):
        with state.during(samples=["b", "b"]):
            assert state.call.samples == ["b", "b"]
        assert state.call.samples == ["a"]
    assert state.call.samples is None
