"""Modules that are made without storage, and functions that are not touched by that."""

from __future__ import annotations

import peft.utils.integrations
import pytest
from torch import nn

from peanut.utils import integrations


def devices(made: nn.Module) -> list[str]:
    return [value.device.type for value in made.state_dict().values()]


@pytest.mark.parametrize("buffers", [None, True])
def test_modules_have_what_they_have_in_hugging_face_peft(buffers: bool | None) -> None:
    found = []
    for each in (integrations, peft.utils.integrations):
        with each.init_empty_weights(include_buffers=buffers):
            made = nn.BatchNorm1d(4)
        found.append(devices(made))
    assert found[0] == found[1]
    assert "meta" in found[0]
    assert devices(nn.Linear(2, 2)) == ["cpu", "cpu"]


def test_frozen_parameters_stay_frozen() -> None:
    with integrations.init_empty_weights():
        module = nn.Module()
        module.register_parameter("weight", nn.Parameter(nn.Linear(2, 2).weight.detach(), requires_grad=False))
    assert not module.get_parameter("weight").requires_grad


def test_functions_that_skip_it() -> None:
    @integrations.skip_init_on_device
    def outer(inputs: int) -> nn.Module:
        inner = integrations.skip_init_on_device(nn.Linear)(inputs, 2)
        return nn.Sequential(inner, nn.Linear(2, 2))

    assert set(devices(outer(3))) == {"cpu"}
    with integrations.init_empty_weights():
        assert set(devices(outer(3))) == {"cpu"}
        assert set(devices(nn.Linear(2, 2))) == {"meta"}
