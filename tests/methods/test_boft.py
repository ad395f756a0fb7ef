"""BOFT against its formula, against the peer, and its options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peanut import PeanutError, PeftModel, get_peft_model
from peanut.methods.boft import BOFTConfig
from peanut.model.adapters.adapter_set import AdapterSet
from peanut.protocols import METHODS

from ..support import Net, distance, one_thread, peer_loaded, peer_model, randomised  # noqa: F401

pytestmark = [
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1"),
]


def net(layer: nn.Module | None = None, dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(1)
    made = Net(nn.Linear(24, 10) if layer is None else layer).to(dtype)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def adapted(base: Net, **options: Any) -> PeftModel:
    return randomised(get_peft_model(base, BOFTConfig(target_modules=["layer"], **options))).eval()


def layer_of(model: PeftModel) -> Any:
    return next(layer for _, layer in AdapterSet.of(model).layers())


def weight_written_out(W: Tensor, M: Tensor, s: Tensor) -> Tensor:
    """diag(s) W F₀ F₁ …, factor i = P diag(…) Pᵀ with P built one entry at a time."""
    factors, n, b, _ = M.shape
    width, half = n * b, b // 2
    for level in range(factors):
        blocks = []
        for block in M[level]:
            S, eye = (block - block.T) / 2, torch.eye(b, dtype=M.dtype)
            blocks.append((eye + S) @ torch.linalg.inv(eye - S))
        P = torch.eye(width, dtype=M.dtype)
        if factors > 1:
            # Within each stretch of b·2^level features, first the half blocks at even places, then those at odd ones.
            stretch = b * 2**level
            order = [
                start + place * half + offset
                for start in range(0, width, stretch)
                for parity in (0, 1)
                for place in range(parity, stretch // half, 2)
                for offset in range(half)
            ]
            P = P[order]
        W = W @ (P @ torch.block_diag(*blocks) @ P.T)
    return s.reshape(-1, 1) * W


OPTIONS: list[dict[str, Any]] = [
    {},
    {"boft_block_size": 3},
    {"boft_block_size": 0, "boft_block_num": 2},
    {"boft_n_butterfly_factor": 2},
    {"boft_block_size": 2, "boft_n_butterfly_factor": 3},
    {"boft_block_size": 0, "boft_block_num": 4, "boft_n_butterfly_factor": 3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_weight_is_as_the_formula_says(options: dict[str, Any]) -> None:
    base = net()
    model = adapted(base, **options)
    layer = layer_of(model)
    values = {name: value.detach() for name, value in layer.values("default").items()}
    W, bias = layer.frozen.matrix().detach(), base.layer.bias
    expected = weight_written_out(W, values["boft_R"], values["boft_s"])
    assert distance(W + layer.delta("default"), expected) < 1e-12
    x = torch.randn(5, 24, dtype=torch.float64)
    assert distance(model(x), x @ expected.T + bias) < 1e-12
    rotation = layer.change("default").rotation.dense()
    assert distance(rotation @ rotation.T, torch.eye(24, dtype=torch.float64)) < 1e-12


class FastBlockDiagonal:
    """What the peer compiles for a GPU: batches of blocks (f, n, b, b) to (f, n·b, n·b), and back."""

    @staticmethod
    def forward(blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*row) for row in blocks])]

    @staticmethod
    def backward(grad: Tensor, blocks: Tensor) -> list[Tensor]:
        raise NotImplementedError


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_peer(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.tuners.boft.layer._FBD_CUDA", FastBlockDiagonal)
    model = adapted(net(dtype=torch.float32), **options)
    theirs = peer_model(net(dtype=torch.float32), BOFTConfig(target_modules=["layer"], **options))
    for name, value in layer_of(model).values("default").items():
        getattr(theirs.base_model.model.layer, name)["default"].data.copy_(value)
    x = torch.randn(5, 24)
    assert distance(model(x), theirs(x)) < 1e-5


@pytest.mark.parametrize(
    "options", [{"boft_block_size": 6}, {"boft_block_size": 2, "boft_n_butterfly_factor": 2}], ids=str
)
def test_equals_the_peer_on_a_convolution(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.tuners.boft.layer._FBD_CUDA", FastBlockDiagonal)

    def base() -> Net:
        return net(nn.Conv2d(4, 10, 3, stride=2, padding=1), torch.float32)

    model = adapted(base(), **options)
    theirs = peer_model(base(), BOFTConfig(target_modules=["layer"], **options))
    for name, value in layer_of(model).values("default").items():
        own = getattr(theirs.base_model.model.layer, name)["default"]
        assert own.shape == value.shape
        own.data.copy_(value)
    x = torch.randn(2, 4, 9, 7)
    assert distance(model(x), theirs(x)) < 1e-5


def test_file_with_the_one_factor_that_a_peer_without_compiler_keeps(tmp_path: Any) -> None:
    config = BOFTConfig(target_modules=["layer"], boft_n_butterfly_factor=3, boft_block_size=2)
    theirs = peer_model(net(dtype=torch.float32), config)
    layer = theirs.base_model.model.layer
    assert layer.boft_R["default"].shape == (1, 12, 2, 2)
    nn.init.normal_(layer.boft_R["default"], std=0.3)
    theirs.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(net(dtype=torch.float32), tmp_path)
    x = torch.randn(5, 24)
    assert layer_of(model).values("default")["boft_R"].shape == (3, 12, 2, 2)
    assert distance(model(x), theirs(x)) < 1e-5


def test_one_factor_is_read_by_the_peer(tmp_path: Any) -> None:
    model = adapted(net(dtype=torch.float32), boft_block_size=6)
    model.save_pretrained(tmp_path)
    x = torch.randn(5, 24)
    assert distance(peer_loaded(net(dtype=torch.float32), tmp_path)(x), model(x)) < 1e-5


def test_dropped_blocks_turn_nothing_and_belong_to_one_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peanut.operators.block_factors.WIDTH", 1)  # else blocks lie side by side in wider ones
    model = adapted(net(), boft_block_size=2, boft_n_butterfly_factor=3, boft_dropout=0.5)
    layer, eye = layer_of(model), torch.eye(2, dtype=torch.float64)
    torch.manual_seed(0)
    hit, total = set(), 0
    full = layer.change("default").rotation.levels
    for _ in range(60):
        sampled = layer.change("default", sample=True)
        R = sampled.rotation.levels
        dropped = (eye == R).all(-1).all(-1)
        assert torch.equal(R[~dropped], full[~dropped])
        hit |= (chosen := {level for level in range(3) if dropped[level].any()})
        assert len(chosen) <= 1
        total += int(dropped.sum())
    assert hit == {0, 1, 2}
    assert 0.4 < total / (60 * 12) < 0.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"boft_block_num": 4}, "boft_block_size=4 and boft_block_num=4; expected exactly one"),
        ({"boft_block_size": 0}, "boft_block_size=0 and boft_block_num=0; expected exactly one"),
        ({"boft_n_butterfly_factor": 0}, "boft_n_butterfly_factor=0"),
        ({"boft_dropout": -0.1}, "boft_dropout=-0.1"),
        ({"bias": "yes"}, "bias='yes'"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PeanutError, match=message):
        BOFTConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"boft_block_size": 5}, r"boft_block_size=5 for 'layer', whose input has 24 features; .*: 4 and 6"),
        ({"boft_block_size": 0, "boft_block_num": 7}, r"boft_block_num=7 for 'layer', whose input has 24 features"),
        (
            {"boft_block_size": 3, "boft_n_butterfly_factor": 2},
            r"boft_n_butterfly_factor=2 with 8 blocks of 3 for 'layer'",
        ),
        (
            {"boft_n_butterfly_factor": 3},
            r"boft_n_butterfly_factor=3 with 6 blocks of 4 for 'layer', .*a multiple of 4",
        ),
    ],
)
def test_blocks_that_do_not_fit_a_layer_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PeanutError, match=message):
        get_peft_model(net(), BOFTConfig(target_modules=["layer"], **options))


def test_kinds() -> None:
    assert METHODS["BOFT"].kinds == ("linear", "conv1d", "conv", "embedding")
