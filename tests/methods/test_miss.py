"""MiSS and Bone against their blocks (arXiv 2409.15371), the peer's MiSS, and Bone's old files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peanut import PeanutError, PeftModel, get_peft_model, to_lora
from peanut.methods.bone import BoneConfig
from peanut.methods.miss import MissConfig

from ..support import PEER_WARNINGS, Net, distance, one_thread, peer_model, randomised, refused  # noqa: F401

pytestmark = PEER_WARNINGS
MODES: list[dict[str, Any]] = [
    {"r": 4},
    {"r": 5},
    {"r": 3, "init_weights": False},
    {"r": 4, "mini_r": 2, "init_weights": "mini"},
    {"r": 5, "mini_r": 6, "init_weights": "mini"},
    {"r": 2, "init_weights": "bat"},
]


def written_out(block: Tensor, W: Tensor) -> Tensor:
    """ΔW, entry by entry or block by block."""
    out, inputs = W.shape
    delta = torch.empty_like(W)
    if block.ndim == 3:
        r = block.shape[-1]
        for a in range(out // r):
            for c in range(inputs // r):
                at = slice(a * r, a * r + r), slice(c * r, c * r + r)
                delta[at] = W[at] @ block[a] + block[a]
        return delta
    r, m = block.shape
    for o in range(out):
        for i in range(inputs):
            delta[o, i] = block[i % r, o % m]
    return delta


@pytest.mark.parametrize("options", MODES, ids=str)
def test_the_update_is_its_blocks(options: dict[str, Any]) -> None:
    model = randomised(get_peft_model(Net(nn.Linear(8, 6).double()), MissConfig(target_modules=["layer"], **options)))
    layer = model.get_base_model().layer
    block, W = layer.values("default")["miss_block"].detach(), layer.base_layer.weight.detach()
    mode, r = options.get("init_weights"), options["r"]
    assert block.shape == ((3, 2, 2) if mode == "bat" else (r, options["mini_r"] if mode == "mini" else 6))
    expected = written_out(block, W)
    assert distance(layer.delta("default"), expected) < 1e-14
    x = torch.randn(3, 8, dtype=torch.float64)
    assert distance(model.eval()(x), x @ (W + expected).T + layer.base_layer.bias) < 1e-13


@pytest.mark.parametrize("options", MODES, ids=str)
def test_outputs_and_merged_weights_are_the_peers(options: dict[str, Any]) -> None:
    config = MissConfig(target_modules=["layer"], **options)
    torch.manual_seed(1)
    base = nn.Linear(8, 6)
    ours = randomised(get_peft_model(Net(nn.Linear(8, 6)), config)).eval()
    ours.get_base_model().layer.base_layer.load_state_dict(base.state_dict())
    theirs = peer_model(Net(base), config)
    theirs.base_model.model.layer.miss_block["default"].data.copy_(
        ours.get_base_model().layer.values("default")["miss_block"]
    )
    x = torch.randn(3, 8)
    assert distance(ours(x), theirs(x)) < 1e-6
    theirs.merge_adapter()
    ours.merge_adapter()
    weights = [model.base_model.model.layer.base_layer.weight for model in (ours, theirs)]
    assert distance(weights[0], weights[1]) < 1e-6


def test_start() -> None:
    for init_weights in (True, "mini", "bat"):
        model = get_peft_model(
            Net(nn.Linear(8, 6)), MissConfig(target_modules=["layer"], r=2, init_weights=init_weights)
        )
        assert model.get_base_model().layer.values("default")["miss_block"].abs().max() == 0
    model = get_peft_model(Net(nn.Linear(80, 60)), MissConfig(target_modules=["layer"], r=20, init_weights=False))
    block = model.get_base_model().layer.values("default")["miss_block"].detach()
    limit = 1 / 60**0.5  # Kaiming's bound at a = √5, for a block of 60 columns
    assert 0.95 * limit < block.abs().max() <= limit


@pytest.mark.parametrize("options", [{"r": 4}, {"r": 5}, {"r": 4, "mini_r": 2, "init_weights": "mini"}], ids=str)
def test_as_lora_it_is_exact(options: dict[str, Any]) -> None:
    model = randomised(get_peft_model(Net(nn.Linear(8, 6).double()), MissConfig(target_modules=["layer"], **options)))
    x = torch.randn(3, 8, dtype=torch.float64)
    expected = model.eval()(x)
    export = to_lora(model)
    assert export.rank == options["r"]
    model.set_adapter(export.name)
    assert distance(model(x), expected) < 1e-13


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 9}, "r=9 for 'layer' with 8 inputs; expected at most 8"),
        ({"r": 3, "init_weights": "bat"}, "r=3 with init_weights='bat' for 'layer' of 6×8; .* that is of 2"),
        ({"r": 4, "init_weights": "bat"}, "r=4 with init_weights='bat' for 'layer' of 6×8"),
        (
            {"r": 4, "mini_r": 4, "init_weights": "mini"},
            "mini_r=4 for 'layer' with 6 outputs; expected a divisor of 6",
        ),
    ],
)
def test_blocks_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    net = Net(nn.Linear(8, 6))
    with refused(net, message):
        get_peft_model(net, MissConfig(target_modules=["layer"], **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r=0; expected a whole number of at least 1"),
        ({"mini_r": 0}, "mini_r=0"),
        ({"miss_dropout": 1.0}, "miss_dropout=1.0; expected a probability"),
        ({"init_weights": "maxi"}, "init_weights='maxi'; expected True, False, 'bat' or 'mini'"),
        ({"bias": "miss_only"}, "bias='miss_only'; expected .*'MiSS_only'"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PeanutError, match=message):
        MissConfig(**options)


# Bone


@pytest.mark.parametrize(("init_weights", "shape"), [(True, (2, 6)), ("bat", (3, 2, 2))], ids=str)
def test_old_bone_files_load(init_weights: Any, shape: tuple[int, ...], tmp_path: Path) -> None:
    block = torch.randn(shape)
    save_file({"base_model.model.layer.bone_block": block}, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "exclude_modules": None,
        "inference_mode": True,
        "init_weights": init_weights,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": None,
        "peft_type": "BONE",
        "r": 2,
        "revision": None,
        "target_modules": ["layer"],
        "task_type": None,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    base = nn.Linear(8, 6)
    W, b, x = base.weight.detach().clone(), base.bias.detach(), torch.randn(3, 8)
    model = PeftModel.from_pretrained(Net(base), tmp_path)
    assert distance(model(x), x @ (W + written_out(block, W)).T + b) < 1e-6
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again/adapter_model.safetensors")
    assert torch.equal(again.pop("base_model.model.layer.bone_block"), block)
    assert not again


def test_bone_is_refused_like_miss() -> None:
    net = Net(nn.Linear(8, 6))
    with refused(net, "r=9 for 'layer' with 8 inputs"):
        get_peft_model(net, BoneConfig(target_modules=["layer"], r=9))
    with refused(net, "r=4 with init_weights='bat' for 'layer' of 6×8"):
        get_peft_model(net, BoneConfig(target_modules=["layer"], r=4, init_weights="bat"))
    with pytest.raises(PeanutError, match="init_weights='mini'; expected True, False or 'bat'"):
        BoneConfig(init_weights="mini")  # type: ignore[arg-type]
    with pytest.raises(PeanutError, match=r"bias='MiSS_only'; expected .*'bone_only'"):
        BoneConfig(bias="MiSS_only")  # type: ignore[arg-type]
    assert BoneConfig().r == 8
