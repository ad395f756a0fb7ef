"""Layers with the smallest condition numbers are chosen, as Hugging Face PEFT chooses them."""

from __future__ import annotations

import peft.helpers
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import peanut
from peanut import LoraConfig, PeanutError, get_peft_model
from peanut.helpers import KappaTuneSelector


def net() -> nn.Module:
    torch.manual_seed(0)
    wide = nn.ModuleDict({"up": nn.Linear(6, 30, bias=False), "down": nn.Linear(30, 6), "embed": nn.Embedding(4, 6)})
    return nn.ModuleDict({"q": nn.Linear(6, 6), "k": nn.Linear(6, 6), "v": nn.Linear(6, 6), "mlp": wide})


def selectors(most: int = 16384) -> tuple[KappaTuneSelector, peft.helpers.KappaTuneSelector]:
    return tuple(  # type: ignore[return-value]
        kind(net(), max_dim_size_to_analyze=most, show_progress=False)
        for kind in (KappaTuneSelector, peft.helpers.KappaTuneSelector)
    )


@pytest.mark.parametrize("most", [16384, 20])
@pytest.mark.parametrize("how", [{}, {"top_p": 0.5}, {"top_p": 0.01}, {"num_modules": 2}, {"threshold": 99.0}])
def test_layers_are_those_of_hugging_face_peft(how: dict[str, float], most: int) -> None:
    ours, theirs = (each.get_best_targets(**how) for each in selectors(most))
    assert ours == theirs
    assert ours


def test_a_config_takes_them() -> None:
    model = net()
    found = peanut.find_kappa_target_modules(model, top_p=0.4, show_progress=False)
    assert found == peft.find_kappa_target_modules(model, top_p=0.4, show_progress=False)
    adapted = get_peft_model(model, LoraConfig(**found))
    assert sorted(adapted.base_model.targeted_module_names) == sorted(found["target_modules"] or [])


def test_a_singular_weight_comes_last_and_layers_of_gpt2_count() -> None:
    model = net()
    nn.init.zeros_(model.get_parameter("q.weight"))
    model.add_module("conv", Conv1D(6, 6))
    found = KappaTuneSelector(model, show_progress=False).get_best_targets()
    assert found[-1] == "q"
    assert "conv" in found


def test_what_torch_reads_past_its_layer_is_left_out() -> None:
    found = KappaTuneSelector(nn.TransformerEncoderLayer(8, 2), show_progress=False).get_best_targets()
    assert sorted(found) == ["linear1", "linear2"]


def test_fused_experts_are_said_to_be_left_out() -> None:
    model = net()
    assert KappaTuneSelector(model).get_best_target_parameters() == []
    model.register_parameter("down_proj", nn.Parameter(torch.ones(2, 6, 6)))
    with pytest.warns(UserWarning, match=r"1 parameters of experts \(down_proj\) are left out"):
        found = peanut.find_kappa_target_modules(model, show_progress=False)
    assert found["target_parameters"] is None
    with pytest.raises(PeanutError, match="'down_proj', fused experts"):
        KappaTuneSelector(model).get_best_target_parameters()
