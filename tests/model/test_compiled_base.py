"""Adapters in a model that torch.compile is around already: nothing names what it puts there."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peanut import (
    LoraConfig,
    PeanutConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)

from ..support import distance, randomised

X = torch.linspace(-1, 1, 16).reshape(4, 4)
CONFIGS = [LoraConfig(r=2, target_modules=["0"]), PeanutConfig(r=2, target_modules=["0"])]
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own


def _bases() -> tuple[nn.Module, Any]:
    base = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    return base, torch.compile(copy.deepcopy(base), backend="eager")


@pytest.mark.parametrize("config", CONFIGS)
def test_an_adapter_lives_in_it_as_in_the_model(config: Any, tmp_path: Path) -> None:
    base, compiled = _bases()
    before = compiled(X)
    model = randomised(get_peft_model(compiled, config))
    expected = model(X).detach()
    assert distance(expected, before) > 1e-3
    assert model.get_base_model() is compiled
    assert all(key.startswith("base_model.model.0.") for key in get_peft_model_state_dict(model))
    model.save_pretrained(tmp_path)
    for fresh in (copy.deepcopy(base), torch.compile(copy.deepcopy(base), backend="eager")):
        assert distance(PeftModel.from_pretrained(fresh, tmp_path)(X), expected) < 1e-6  # type: ignore[arg-type]
    with model.disable_adapter():
        assert torch.equal(model(X), before)
    merged = model.merge_and_unload()
    assert merged is compiled
    assert distance(merged(X), expected) < 1e-6
    assert torch.equal(get_peft_model(torch.compile(base, backend="eager"), config).unload()(X), before)  # type: ignore[arg-type]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_state_dict_names_the_layers(config: Any, first: bool) -> None:
    bases = _bases()
    model = randomised(inject_adapter_in_model(config, bases[first]))
    state = get_peft_model_state_dict(model)
    assert all(key.startswith("0.") for key in state)
    _, other = _bases()
    assert inject_adapter_in_model(config, other, state_dict=state) is other
    assert set_peft_model_state_dict(other, state).missing_keys == []
    after = get_peft_model_state_dict(other)
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], value) for key, value in state.items())
    assert distance(other(X), other._orig_mod(X)) < 1e-6
