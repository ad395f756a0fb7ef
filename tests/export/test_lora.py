"""To LoRA and back: exact where the mathematics says so, measured where it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from peanut import (
    LinearProbingConfig,
    LoraConfig,
    PeanutConfig,
    PeanutError,
    PeftModel,
    from_lora,
    get_peft_model,
    to_lora,
)

from ..support import PEER_WARNINGS, Net, distance, randomised

pytestmark = PEER_WARNINGS
EXACT = 1e-5
IDS = torch.arange(28).reshape(4, 7)
TARGETS = {"tiny_llama": ["q_proj", "down_proj", "up_proj"], "tiny_gpt2": ["c_attn", "mlp.c_proj"]}
PEANUTS: list[dict[str, Any]] = [
    {"depth": 0},
    {"depth": 2, "side": "in", "act_fn": "sine"},
    {"depth": 1, "side": "auto", "scaling": 0.5, "dropout": 0.1},
]


@pytest.mark.parametrize("options", PEANUTS, ids=str)
@pytest.mark.parametrize("architecture", TARGETS)
def test_peer_reads_a_peanut_as_plain_lora(
    architecture: str, options: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    peft = pytest.importorskip("peft")
    build = request.getfixturevalue(architecture)
    ranks = {TARGETS[architecture][-1]: 3}
    config = PeanutConfig(
        r=5, target_modules=TARGETS[architecture], task_type="CAUSAL_LM", rank_pattern=ranks, **options
    )
    model = randomised(get_peft_model(build(), config)).eval()
    expected = model(IDS).logits
    assert distance(expected, build()(IDS).logits) > 0.05
    export = to_lora(model)
    assert export.largest_error < 1e-6
    assert export.rank == 5
    export.save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    assert distance(theirs(IDS).logits, expected) < EXACT
    assert distance(PeftModel.from_pretrained(build(), tmp_path)(IDS).logits, expected) < EXACT
    assert distance(model(IDS).logits, expected) == 0  # the source still acts alone


@pytest.mark.parametrize(
    "config",
    [
        PeanutConfig(r=5, rank_pattern={"up_proj": 3}, target_modules=TARGETS["tiny_llama"]),
        LoraConfig(
            r=4,
            lora_alpha=6,
            use_rslora=True,
            rank_pattern={"up_proj": 2, "q_proj": 7},
            alpha_pattern={"q_proj": 1},
            target_modules=TARGETS["tiny_llama"],
        ),
    ],
    ids=["PEANuT", "LoRA"],
)
def test_all_layers_have_one_rank_and_one_alpha(config: Any, tiny_llama: Any, tmp_path: Path) -> None:
    """llama.cpp scales each layer by α / the rank of its own tensors, and knows no patterns."""
    model = randomised(get_peft_model(tiny_llama().double(), config)).eval()
    expected = {path: layer.delta("default") for path, layer in model.adapters.layers("default")}
    to_lora(model).save(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["rank_pattern"], written["alpha_pattern"], written["use_rslora"]) == ({}, {}, False)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(expected) == 6
    for path, delta in expected.items():
        A, B = (tensors[f"base_model.model.{path}.lora_{part}.weight"] for part in "AB")
        assert len(A) == written["r"]
        assert distance(written["lora_alpha"] / len(A) * (B @ A), delta) < 1e-14


def test_head_goes_along(tiny_bert: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = randomised(get_peft_model(tiny_bert(), PeanutConfig(r=4, task_type="SEQ_CLS"))).eval()
    expected = model(IDS).logits
    to_lora(model).save(tmp_path)
    assert distance(peft.PeftModel.from_pretrained(tiny_bert(), tmp_path).eval()(IDS).logits, expected) < EXACT


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 10, 3, padding=1), nn.Embedding(11, 6)], ids=["conv", "embedding"])
@pytest.mark.parametrize(
    "config",
    [PeanutConfig(r=3, target_modules=["layer"]), LoraConfig(r=3, lora_bias=True, target_modules=["layer"])],
    ids=["peanut", "lora with a bias"],
)
def test_other_kinds_of_layer(layer: nn.Module, config: Any, tmp_path: Path) -> None:
    x = torch.randn(2, 4, 5, 5) if isinstance(layer, nn.Conv2d) else torch.arange(11)
    model = randomised(get_peft_model(Net(layer), config)).eval()
    expected = model(x)
    to_lora(model, new_name="written").save(tmp_path)
    again = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert distance(again(x), expected) < EXACT


def lora_on(shape: tuple[int, int]) -> Any:
    """A trained LoRA on one float64 layer (out, in) without bias."""
    net = Net(nn.Linear(shape[1], shape[0], bias=False)).double()
    config = LoraConfig(r=3, lora_alpha=5, lora_dropout=0.1, target_modules=["layer"])
    return randomised(get_peft_model(net, config)).eval()


@pytest.mark.parametrize(("shape", "side"), [((10, 14), "in"), ((14, 10), "out"), ((12, 12), "in")])
def test_peanut_starts_where_a_lora_ended(shape: tuple[int, int], side: Any) -> None:
    """Proposition 3.2 where W's left (right) singular space is everything: nothing is lost."""
    model, x = lora_on(shape), torch.randn(5, shape[1], dtype=torch.float64)
    expected = model(x)
    export = from_lora(model, side=side)
    config = model.peft_config[export.name]
    assert isinstance(config, PeanutConfig)
    assert (config.r, config.depth, config.act_fn, config.dropout) == (6, 0, "relu", 0.1)
    assert export.largest_error < 1e-6
    model.set_adapter(export.name)
    assert distance(model(x), expected) < 1e-6


def test_the_part_outside_the_singular_space_is_reported() -> None:
    model = lora_on((14, 10))
    layer = model.get_base_model().layer
    W, delta = layer.weight.detach(), layer.delta("default").detach()
    outside = delta - W @ torch.linalg.pinv(W) @ delta
    expected = float(outside.norm() / delta.norm())
    assert expected > 0.1
    export = from_lora(model)
    assert export.errors == {"layer": pytest.approx(expected, rel=1e-6)}
    projected = W @ torch.linalg.pinv(W) @ delta
    assert distance(layer.delta(export.name), projected) < 1e-6


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            PeanutConfig(target_modules=["layer"]),
            "adapter 'default' is a PeanutConfig; expected a plain LoRA without biases",
        ),
        (
            LoraConfig(target_modules=["layer"], lora_bias=True),
            "expected a plain LoRA without biases; start PEANuT from scratch",
        ),
    ],
)
def test_what_is_no_plain_lora_is_refused(config: Any, message: str) -> None:
    with pytest.raises(PeanutError, match=message):
        from_lora(get_peft_model(Net(nn.Linear(4, 4)), config))


def test_a_method_without_updates_has_no_lora(tiny_bert: Any) -> None:
    model = get_peft_model(tiny_bert(), LinearProbingConfig(task_type="SEQ_CLS"))
    with pytest.raises(PeanutError, match="adapter 'default' changes no layer; expected an adapter that does"):
        to_lora(model)
