"""The containers of an adapter's parameters, and how rows of a batch are shared out among samples."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from peanut import PeanutError
from peanut.model.layers.parameters import ByAdapter, Parameters
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


def test_modules_by_names_that_torch_would_refuse() -> None:
    modules = ByAdapter()
    names = ["0", "keys", "training", "forward", "weight"]
    for name in names:
        modules[name] = nn.Linear(1, 1)
    assert (list(modules), len(modules), "keys" in modules, "values" in modules) == (names, 5, True, False)
    assert not modules.eval()["training"].training
    assert modules.train()["training"].training
    assert {key.partition(".")[0] for key in modules.state_dict()} == set(names)
    del modules["keys"]
    assert "keys" not in modules


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
