"""Weights that accelerate keeps elsewhere between forwards: adapters read, change and write them where they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import remove_hook_from_submodules
from torch import nn

from peanut import PeftModel, get_peft_model
from peanut.weights.stored import offload_hook

from ..support import FIRST_CASES, Case, Net, directed, distance, filled, gradients, one_thread  # noqa: F401

WAYS = ["memory", "disk", "memory, adapters first"]


def offloaded(model: nn.Module, way: str, folder: Path) -> nn.Module:
    """``model`` with all of its weights away."""
    if way == "disk":
        disk_offload(model, folder, execution_device=torch.device("cpu"))
    else:
        cpu_offload(model, execution_device=torch.device("cpu"))
    return model


def two(case: Case, way: str, folder: Path) -> tuple[PeftModel, PeftModel]:
    """An adapted model, and the same with its base offloaded."""
    model = case.adapted()
    values = dict(model.adapters.parameters("default"))
    if way == "memory, adapters first":
        other = filled(get_peft_model(case.net(), case.config()).eval(), values)
        offloaded(other.get_base_model(), way, folder)
    else:
        net: Any = offloaded(case.net(), way, folder)
        other = filled(get_peft_model(net, case.config()).eval(), values)
    assert offload_hook(other.get_base_model().layer.base_layer) is not None
    assert other.get_base_model().layer.base_layer.weight.is_meta
    return model, other


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
def test_same_as_if_it_were_there(case: Case, way: str, tmp_path: Path) -> None:
    (model, away), x = two(case, way, tmp_path / "weights"), case.input()
    assert distance(away(x), model(x)) < 1e-12
    directed(model(x)).backward()
    directed(away(x)).backward()
    found, expected = gradients(away), gradients(model)
    assert found.keys() == expected.keys()
    assert all(distance(found[name], expected[name]) < 1e-11 for name in expected if expected[name].any())
    assert not any(value.is_meta for _, value in away.adapters.parameters("default"))
    if way != "disk" or not case.mergeable:
        return
    away.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(offloaded(case.net(), way, tmp_path / "other"), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert distance(loaded(x), model(x)) < 1e-12
        base = away.get_base_model()
        with away.disable_adapter():
            original = away(x)
        away.merge_adapter()
        assert distance(away(x), model(x)) < 1e-11
        with away.disable_adapter():
            assert torch.equal(away(x), original)
        away.unmerge_adapter()
        with away.disable_adapter():
            assert torch.equal(away(x), original)
        merged = away.merge_and_unload()
        assert merged is base
        assert distance(merged(x), model(x)) < 1e-11
        remove_hook_from_submodules(merged)
        assert distance(merged(x), model(x)) < 1e-11
