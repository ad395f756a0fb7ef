"""C3A against its circulant blocks (arXiv 2407.19342) and the peer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from peanut import PeanutError, get_peft_model
from peanut.methods.c3a import C3AConfig

from ..support import PEER_WARNINGS, Net, distance, one_thread, peer_model, randomised, refused  # noqa: F401

pytestmark = PEER_WARNINGS


def config(**options: Any) -> C3AConfig:
    return C3AConfig(target_modules=["layer"], **options)


def test_the_update_is_made_of_circulant_blocks() -> None:
    model = randomised(get_peft_model(Net(nn.Linear(8, 12).double()), config(block_size=4)))
    layer = model.get_base_model().layer
    kernel = layer.values("default")["c3a_kernel"]
    assert kernel.shape == (3, 2, 4)
    expected = torch.empty(12, 8, dtype=torch.float64)
    for o in range(12):
        for i in range(8):
            expected[o, i] = kernel[o // 4, i // 4, (i - o) % 4] / 8
    assert distance(layer.delta("default"), expected) < 1e-14
    x = torch.randn(3, 8, dtype=torch.float64)
    assert distance(model(x), x @ (layer.base_layer.weight + expected).T + layer.base_layer.bias) < 1e-13


def test_the_update_is_the_peers() -> None:
    ours = get_peft_model(Net(nn.Linear(8, 12)), config(block_size=4)).get_base_model().layer
    theirs = peer_model(Net(nn.Linear(8, 12)), config(block_size=4)).base_model.model.layer
    theirs.c3a_kernel["default"].data.copy_(ours.values("default")["c3a_kernel"])
    assert distance(ours.delta("default"), theirs.get_delta_weight("default")) < 1e-6


@pytest.mark.parametrize(
    ("init_weights", "limit"),
    [
        ("xavier_uniform", math.sqrt(6 / (60 + 90))),
        (False, math.sqrt(6 / (60 + 90))),
        ("kaiming_uniform", math.sqrt(1 / 60)),
    ],
)
def test_uniform_starts(init_weights: Any, limit: float) -> None:
    model = get_peft_model(Net(nn.Linear(60, 90)), config(block_size=15, init_weights=init_weights))
    kernel = model.get_base_model().layer.values("default")["c3a_kernel"].detach()
    assert 0.95 * limit < kernel.max() <= limit
    assert -limit <= kernel.min() < -0.95 * limit
    assert abs(kernel.std() / (limit / math.sqrt(3)) - 1) < 0.1


def test_other_starts() -> None:
    for init_weights, spread in (("gaussian", 1.0), (True, 0.0)):
        model = get_peft_model(Net(nn.Linear(60, 90)), config(block_size=15, init_weights=init_weights))
        kernel = model.get_base_model().layer.values("default")["c3a_kernel"].detach()
        assert kernel.shape == (6, 4, 15)
        assert abs(kernel.std() - spread) < 0.1
        assert (kernel.abs().max() == 0) == (init_weights is True)


def test_patterns() -> None:
    net = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 8))
    chosen = C3AConfig(target_modules=["0", "1"], block_size=6, block_size_pattern={"1": 4})
    kernels = [layer.values("default")["c3a_kernel"] for layer in get_peft_model(net, chosen).base_model.model]
    assert [tuple(kernel.shape) for kernel in kernels] == [(2, 2, 6), (2, 3, 4)]


@pytest.mark.parametrize("size", [(8, 12), (12, 8)], ids=str)
def test_a_block_that_does_not_divide(size: tuple[int, int]) -> None:
    net = Net(nn.Linear(*size))
    with refused(net, rf"block_size=6 for 'layer' of {size[1]}×{size[0]}; expected a divisor of both, that is of 4"):
        get_peft_model(net, config(block_size=6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size=0; expected a whole number of at least 1"),
        ({"init_weights": "xavier"}, "init_weights='xavier'; expected True, False, 'gaussian'"),
        ({"bias": "lora_only"}, "bias='lora_only'; expected .*'c3a_only'"),
        ({"block_size_pattern": {"q": 0}}, r"block_size_pattern\['q'\]=0"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PeanutError, match=message):
        C3AConfig(**options)
