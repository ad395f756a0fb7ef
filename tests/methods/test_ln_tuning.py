"""LayerNorm tuning: norms have new weights and biases, as the peer's copies of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from peanut import PeftModel, get_peft_model
from peanut.methods.ln_tuning import LNTuningConfig
from peanut.model.adapters.adapter_set import AdapterSet

from ..support import PEER_WARNINGS, Net, distance, one_thread, peer_loaded, peer_model, randomised, scattered  # noqa: F401

pytestmark = [*PEER_WARNINGS, pytest.mark.filterwarnings("ignore:Unsupported layer type")]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)
    ).eval()


def test_layer_norm_has_new_weight_and_bias() -> None:
    base = Net(nn.LayerNorm(12)).double()
    for parameter in base.parameters():
        nn.init.normal_(parameter)
    model = get_peft_model(base, LNTuningConfig(target_modules=["layer"]))
    layer = next(layer for _, layer in AdapterSet.of(model).layers())
    values = layer.values("default")
    assert torch.equal(values["ln_tuning_layers.weight"], base.layer.weight)
    assert torch.equal(values["ln_tuning_layers.bias"], base.layer.bias)
    randomised(model)
    x = torch.randn(5, 12, dtype=torch.float64)
    new = [values[f"ln_tuning_layers.{name}"] for name in ("weight", "bias")]
    expected = F.layer_norm(x, (12,), *new)
    assert distance(model(x), expected) < 1e-12
    model.merge_adapter()
    assert distance(model(x), expected) < 1e-12


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LayerNorm(12, bias=False),
        lambda: nn.LayerNorm((3, 4)),
        lambda: nn.GroupNorm(3, 12),
        lambda: LlamaRMSNorm(12),
        lambda: Gemma3RMSNorm(12),
    ],
    ids=["layer norm without bias", "of two dimensions", "group norm", "llama's", "gemma's"],
)
def test_equals_the_peer(make) -> None:  # type: ignore[no-untyped-def]
    config = LNTuningConfig(target_modules=["layer"])
    model = randomised(get_peft_model(Net(make()), config)).eval()
    theirs = peer_model(Net(make()), config)
    layer = next(layer for _, layer in AdapterSet.of(model).layers())
    own = dict(theirs.base_model.model.layer.ln_tuning_layers["default"].named_parameters())
    values = layer.values("default")
    assert {f"ln_tuning_layers.{name}" for name in own} == values.keys()
    for name, parameter in own.items():
        assert parameter.shape == values[f"ln_tuning_layers.{name}"].shape
        parameter.data.copy_(values[f"ln_tuning_layers.{name}"])
    x = torch.randn(5, 3, 4) if getattr(layer.base_layer, "normalized_shape", None) == (3, 4) else torch.randn(5, 12)
    assert distance(model(x), theirs(x)) < 1e-5


def test_files_go_both_ways(tmp_path: Path) -> None:
    x = torch.arange(8)[None]
    model = randomised(get_peft_model(llama(), LNTuningConfig())).eval()
    assert len(list(AdapterSet.of(model).layers())) == 5  # two in each block and the last
    model.save_pretrained(tmp_path / "ours")
    assert distance(peer_loaded(llama(), tmp_path / "ours")(x).logits, model(x).logits) < 1e-5
    theirs = peer_model(llama(), LNTuningConfig(target_modules=["input_layernorm", "norm"]))
    scattered([p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(llama(), tmp_path / "theirs")
    assert distance(again(x).logits, theirs(x).logits) < 1e-5
    assert distance(again(x).logits, llama()(x).logits) > 0.01
