"""BitFit: the biases are trained, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from peanut import PeanutError, PeftModel, get_peft_model
from peanut.methods.bitfit import BitFitConfig
from peanut.model.adapters.adapter_set import AdapterSet

from ..support import Net, distance, one_thread, randomised, same_bits  # noqa: F401


def bert() -> BertModel:
    torch.manual_seed(1)
    config = BertConfig(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
    model = BertModel(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def test_adapter_is_the_biases_trained_by_themselves(tmp_path: Path) -> None:
    own, base = bert(), bert()
    model = get_peft_model(base, BitFitConfig())
    own.requires_grad_(False)
    biases = {name: parameter for name, parameter in own.named_parameters() if name.endswith("bias")}
    x, target = torch.arange(8)[None], torch.randn(1, 8, 8)
    for parameter in biases.values():
        parameter.requires_grad_(True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(p.numel() for p in trained) == sum(p.numel() for p in biases.values())
    for network, parameters in ((own, list(biases.values())), (model, trained)):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            (network(x).last_hidden_state - target).square().mean().backward()
            optimizer.step()
    y = model(x).last_hidden_state
    assert distance(y, own(x).last_hidden_state) < 1e-5
    assert distance(y, bert()(x).last_hidden_state) > 1e-3
    model.save_pretrained(tmp_path)
    assert same_bits(PeftModel.from_pretrained(bert(), tmp_path)(x).last_hidden_state, y)
    merged = model.merge_and_unload()
    for name, parameter in merged.named_parameters():
        assert torch.allclose(parameter, own.get_parameter(name), atol=1e-6), name


def test_value_is_that_of_the_new_bias() -> None:
    torch.manual_seed(1)
    base = Net(nn.Linear(12, 8).double())
    W, b = base.layer.weight.detach(), base.layer.bias.detach().clone()
    model = get_peft_model(base, BitFitConfig(target_modules=["layer"]))
    layer = next(layer for _, layer in AdapterSet.of(model).layers())
    assert same_bits(layer.values("default")["bias"].detach(), b)
    randomised(model)
    x, new = torch.randn(5, 12, dtype=torch.float64), layer.values("default")["bias"].detach()
    assert distance(new, b) > 0.1
    assert distance(model(x), x @ W.T + new) < 1e-12


def test_layer_without_bias_is_refused() -> None:
    with pytest.raises(PeanutError, match=r"'layer' \(12 → 8\) has no bias; expected layers that have one"):
        get_peft_model(Net(nn.Linear(12, 8, bias=False)), BitFitConfig(target_modules=["layer"]))
