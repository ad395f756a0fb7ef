"""RoAd against its 2 × 2 rotations, pair by pair (arXiv 2409.00119)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peanut import PeanutError, get_peft_model
from peanut.methods.road import RoadConfig

from ..support import Net, distance, one_thread, randomised, refused  # noqa: F401

OUT, IN, GROUP = 12, 5, 4


def config(**options: Any) -> RoadConfig:
    return RoadConfig(target_modules=["layer"], **{"group_size": GROUP} | options)


def written_out(theta: Tensor, alpha: Tensor, variant: str) -> Tensor:
    """R entry by entry: output i of a group's first half makes a pair with output i + half."""
    R, half, each = torch.zeros(OUT, OUT, dtype=theta.dtype), GROUP // 2, len(theta) // (OUT // GROUP)
    for group in range(OUT // GROUP):
        own, scale = theta[group * each :][:each], alpha[group * each :][:each]
        for i in range(half):
            a, b = group * GROUP + i, group * GROUP + half + i
            # of the row of a: itself and its partner; then of that of b
            at = {"road_1": (i, i, i, i), "road_2": (i, i, half + i, half + i), "road_4": (i, 4 + i, 2 + i, 6 + i)}[
                variant
            ]
            R[a, a], R[a, b] = scale[at[0]] * own[at[0]].cos(), -scale[at[1]] * own[at[1]].sin()
            R[b, b], R[b, a] = scale[at[2]] * own[at[2]].cos(), scale[at[3]] * own[at[3]].sin()
    return R


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_outputs_are_turned_in_pairs(variant: str) -> None:
    model = randomised(get_peft_model(Net(nn.Linear(IN, OUT).double()), config(variant=variant)), scale=1.0).eval()
    layer = model.get_base_model().layer
    values = layer.values("default")
    assert len(values["road_theta"]) == {"road_1": OUT // 2, "road_2": OUT, "road_4": 2 * OUT}[variant]
    R, x = written_out(values["road_theta"], values["road_alpha"], variant), torch.randn(3, IN, dtype=torch.float64)
    W, b = layer.base_layer.weight.clone(), layer.base_layer.bias.clone()
    assert distance(model(x), (x @ W.T + b) @ R.T) < 1e-13
    assert distance(layer.delta("default"), R @ W - W) < 1e-13
    merged = model.merge_and_unload().layer
    assert distance(merged.weight, R @ W) < 1e-13
    assert distance(merged.bias, R @ b) < 1e-13


def test_two_turn_one_after_the_other() -> None:
    model = get_peft_model(Net(nn.Linear(IN, OUT).double()), config(), "a")
    model.add_adapter("b", config(variant="road_2"))
    randomised(model, scale=1.0).set_adapter(["a", "b"])
    layer, x = model.get_base_model().layer, torch.randn(3, IN, dtype=torch.float64)
    first, second = (
        written_out(values["road_theta"], values["road_alpha"], variant)
        for values, variant in ((layer.values("a"), "road_1"), (layer.values("b"), "road_2"))
    )
    expected = layer.base_layer(x) @ first.T @ second.T
    assert distance(model(x), expected) < 1e-13
    assert distance(expected, layer.base_layer(x) @ second.T @ first.T) > 0.02


def test_what_does_not_fit_is_refused() -> None:
    net = Net(nn.Linear(IN, 10))
    with refused(net, r"group_size=4 for 'layer', which has 10 outputs; expected a divisor of its outputs"):
        get_peft_model(net, config())
    for options, message in (({"variant": "road_3"}, "one of road_1"), ({"group_size": 3}, "an even number")):
        with pytest.raises(PeanutError, match=message):
            config(**options)
