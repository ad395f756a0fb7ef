"""OFT against its formula, against the peer, and its options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peanut import PeanutError, PeftModel, get_peft_model
from peanut.methods.oft import OFTConfig, held, skew
from peanut.model.adapters.adapter_set import AdapterSet
from peanut.protocols import METHODS, PeftConfig

from ..support import Net, directed, distance, one_thread, peer_model, randomised  # noqa: F401

PARAMETER = "base_model.model.layer.oft_R.weight"


def linear(inputs: int = 12, dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(1)
    return Net(nn.Linear(inputs, 8)).to(dtype)


def adapted(net: Net, **options: Any) -> PeftModel:
    return randomised(get_peft_model(net, OFTConfig(target_modules=["layer"], **options))).eval()


def layer_of(model: PeftModel) -> Any:
    return next(layer for _, layer in AdapterSet.of(model).layers())


def weight_of(model: PeftModel) -> Tensor:
    return layer_of(model).values("default")["oft_R.weight"]


def rotation_written_out(weight: Tensor, b: int, width: int) -> Tensor:
    """The Cayley transforms of the skew-symmetric matrices with these upper triangles, block after block."""
    blocks = []
    for row in range(width // b):
        entries = iter(weight[min(row, len(weight) - 1)])
        S = torch.zeros(b, b, dtype=weight.dtype)
        for i in range(b):
            for j in range(i + 1, b):
                S[i, j] = next(entries)
                S[j, i] = -S[i, j]
        eye = torch.eye(b, dtype=weight.dtype)
        blocks.append((eye + S) @ torch.linalg.inv(eye - S))
    return torch.block_diag(*blocks)


@pytest.mark.parametrize(
    ("options", "b"),
    [({"r": 3}, 4), ({"oft_block_size": 6}, 6), ({"r": 1}, 12), ({"oft_block_size": 3, "block_share": True}, 3)],
)
def test_weight_is_turned_as_the_formula_says_and_keeps_its_angles(options: dict[str, Any], b: int) -> None:
    net = linear()
    model = adapted(net, **options)
    W = layer_of(model).frozen.matrix().detach()
    turned = W + layer_of(model).delta("default")
    R = rotation_written_out(weight_of(model).detach(), b, 12)
    assert distance(turned, W @ R) < 1e-12
    assert distance(turned @ turned.T, W @ W.T) < 1e-12  # rows keep their lengths and angles: the hyperspherical energy
    x = torch.randn(5, 12, dtype=torch.float64)
    assert distance(model(x), x @ (W @ R).T + net.layer.bias) < 1e-12


def test_shared_block_and_number_of_parameters() -> None:
    assert weight_of(adapted(linear(), r=3)).shape == (3, 6)
    assert weight_of(adapted(linear(), r=3, block_share=True)).shape == (1, 6)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 3},
        {"oft_block_size": 3, "block_share": True},
        {"oft_block_size": 4, "use_cayley_neumann": True},
        *({"r": 3, "use_cayley_neumann": True, "num_cayley_neumann_terms": terms} for terms in (1, 2, 3, 4, 8)),
        {"r": 3, "coft": True, "eps": 0.3},
        {"r": 3, "coft": True, "block_share": True, "eps": 0.3},
    ],
    ids=str,
)
def test_equals_the_peer(options: dict[str, Any]) -> None:
    model = adapted(linear(dtype=torch.float32), **options)
    theirs = peer_model(linear(dtype=torch.float32), OFTConfig(target_modules=["layer"], **options))
    theirs.base_model.model.layer.oft_R["default"].weight.data.copy_(weight_of(model))
    x = torch.randn(5, 12)
    assert distance(model(x), theirs(x)) < 1e-5


def test_series_is_a_rotation_by_minus_s_and_far_from_orthogonal_at_moderate_weights() -> None:
    eye = torch.eye(12, dtype=torch.float64)
    for scale, gap in ((0.01, 1e-6), (0.4, 0.5)):
        model = adapted(linear(), r=3, use_cayley_neumann=True)
        weight_of(model).data.mul_(scale / 0.4)
        R = layer_of(model).change("default").rotation.dense().detach()
        error = float((R @ R.T - eye).abs().max())
        assert (error < gap) if scale == 0.01 else (error > gap)
        if scale == 0.01:
            assert distance(R, rotation_written_out(-weight_of(model).detach(), 4, 12)) < 1e-6


def test_constrained_blocks_stay_in_their_ball() -> None:
    model = adapted(linear(), r=3, coft=True, eps=0.3)
    weight = weight_of(model)
    limit = 0.3 / 3**0.5
    assert (skew(weight, 4).norm(dim=(1, 2)) > limit).all()
    inside = held(weight.detach(), 0.3)
    assert torch.allclose(skew(inside, 4).norm(dim=(1, 2)), torch.full((3,), limit, dtype=torch.float64))
    assert distance(inside / inside.norm(dim=1, keepdim=True), weight / weight.norm(dim=1, keepdim=True)) < 1e-12
    assert torch.equal(held(0.01 * inside, 0.3), 0.01 * inside)
    R = layer_of(model).change("default").rotation.dense()
    assert distance(R, rotation_written_out(inside, 4, 12)) < 1e-12
    x = torch.randn(5, 12, dtype=torch.float64)
    (found,) = torch.autograd.grad(directed(model(x)), weight)
    free = adapted(linear(), r=3)
    weight_of(free).data.copy_(inside)
    (expected,) = torch.autograd.grad(directed(free(x)), weight_of(free))
    assert distance(found, expected) < 1e-12
    started = get_peft_model(linear(), OFTConfig(target_modules=["layer"], r=3, coft=True, init_weights=False))
    assert (skew(weight_of(started), 4).norm(dim=(1, 2)) <= 6e-5 / 3**0.5 * 1.001).all()


def test_constrained_training_takes_the_steps_that_the_peer_takes() -> None:
    config = OFTConfig(target_modules=["layer"], r=3, coft=True, eps=0.05)
    model = get_peft_model(linear(dtype=torch.float32), config)
    theirs = peer_model(linear(dtype=torch.float32), config)
    own, other = weight_of(model), theirs.base_model.model.layer.oft_R["default"].weight
    torch.manual_seed(3)
    x, target = torch.randn(16, 12), torch.randn(16, 8)
    for trained, parameter in ((model, own), (theirs, other)):
        optimizer = torch.optim.Adam([parameter], lr=0.02)
        for _ in range(6):
            optimizer.zero_grad()
            (trained(x) - target).square().mean().backward()
            optimizer.step()
    assert (own.norm(dim=1) > 0.01).any()
    assert (skew(own, 4).norm(dim=(1, 2)) <= 0.05 / 3**0.5 * 1.0001).all()
    assert distance(model(x), theirs(x)) < 1e-5


def test_dropped_blocks_turn_nothing_in_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peanut.operators.block_factors.WIDTH", 1)  # else blocks lie side by side in wider ones
    model = adapted(linear(), oft_block_size=2, module_dropout=0.4)
    layer, eye = layer_of(model), torch.eye(2, dtype=torch.float64)
    torch.manual_seed(0)
    still = 0
    for _ in range(100):
        R = layer.change("default", sample=True).rotation.levels[0]
        full = layer.change("default").rotation.levels[0]
        dropped = torch.tensor([torch.equal(block, eye) for block in R])
        assert torch.equal(R[~dropped], full[~dropped])
        still += int(dropped.sum())
    assert 0.3 < still / 600 < 0.5
    x = torch.randn(5, 12, dtype=torch.float64)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_default_is_eight_blocks_and_files_of_the_peer_load() -> None:
    config = OFTConfig()
    assert (config.r, config.oft_block_size) == (8, 0)
    by_size = OFTConfig(oft_block_size=16)
    assert (by_size.r, by_size.oft_block_size) == (0, 16)
    peers = {"peft_type": "OFT", "r": 0, "oft_block_size": 32, "use_cayley_neumann": True}
    loaded = PeftConfig.from_dict(peers)
    assert isinstance(loaded, OFTConfig)
    assert (loaded.r, loaded.oft_block_size, loaded.use_cayley_neumann) == (0, 32, True)
    assert OFTConfig.from_dict(loaded.to_dict()) == loaded


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 4, "oft_block_size": 4}, "r=4 and oft_block_size=4; expected exactly one"),
        ({"r": 0, "oft_block_size": 0}, "r=0 and oft_block_size=0; expected exactly one"),
        ({"r": -1}, "r=-1"),
        ({"module_dropout": 1.0}, "module_dropout=1.0"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"num_cayley_neumann_terms": 0}, "num_cayley_neumann_terms=0"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PeanutError, match=message):
        OFTConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"r=8 for 'layer', whose input has 12 features; .*nearest divisors: 6"),
        ({"oft_block_size": 5}, r"oft_block_size=5 for 'layer', whose input has 12 features; .*: 4 and 6"),
        ({"oft_block_size": 9}, r"nearest divisors: 6 and 12"),
        ({"r": 12}, r"r=12 for 'layer'.*at least 2; nearest divisors: 6"),
        ({"oft_block_size": 1}, r"oft_block_size=1 for 'layer'.*at least 2; nearest divisors: 2"),
    ],
)
def test_blocks_that_do_not_fit_a_layer_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PeanutError, match=message):
        get_peft_model(linear(), OFTConfig(target_modules=["layer"], **options))


def test_eight_blocks_on_gpt2() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    tiny = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=11, n_positions=8)
    config = OFTConfig(r=8, target_modules=["c_attn", "c_proj"], module_dropout=0.05, task_type="CAUSAL_LM")
    model = get_peft_model(GPT2LMHeadModel(tiny), config)
    assert {tuple(p.shape) for p in model.parameters() if p.requires_grad} == {(8, 6), (8, 120)}
    assert METHODS["OFT"].kinds == ("linear", "conv1d", "conv", "embedding")
