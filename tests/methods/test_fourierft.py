"""FourierFT against its sum of waves (arXiv 2405.03003) and the peer's places."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from peanut import PeanutError, get_peft_model
from peanut.methods.fourierft import FourierFTConfig

from ..support import PEER_WARNINGS, Net, distance, one_thread, peer_model, randomised, refused  # noqa: F401

pytestmark = PEER_WARNINGS


def config(**options: Any) -> FourierFTConfig:
    return FourierFTConfig(target_modules=["layer"], **options)


def test_the_update_is_a_sum_of_waves() -> None:
    model = randomised(get_peft_model(Net(nn.Linear(6, 5).double()), config(n_frequency=9, scaling=40.0)))
    layer = model.get_base_model().layer
    values = layer.values("default")
    j, k = torch.arange(5).double()[:, None], torch.arange(6).double()
    expected = torch.zeros(5, 6, dtype=torch.float64)
    for c, row, column in zip(values["fourierft_spectrum"], *values["fourierft_places"].tolist(), strict=True):
        expected = expected + 40 / 30 * c * torch.cos(2 * math.pi * (row * j / 5 + column * k / 6))
    assert distance(layer.delta("default"), expected) < 1e-13
    x = torch.randn(3, 6, dtype=torch.float64)
    W, b = layer.base_layer.weight, layer.base_layer.bias
    assert distance(model(x), x @ (W + expected).T + b) < 1e-13


@pytest.mark.parametrize("seed", [0, 777, 123456])
@pytest.mark.parametrize("size", [(6, 5), (5, 6), (8, 3)], ids=str)
def test_places_are_the_peers(seed: int, size: tuple[int, int]) -> None:
    chosen = config(n_frequency=7, random_loc_seed=seed)
    places = get_peft_model(Net(nn.Linear(*size)), chosen).get_base_model().layer.values("default")["fourierft_places"]
    theirs = peer_model(Net(nn.Linear(*size)), chosen).base_model.model.layer.indices["default"]
    assert torch.equal(places, theirs)


def test_start() -> None:
    layer = nn.Linear(60, 50)
    values = get_peft_model(Net(layer), config()).get_base_model().layer.values("default")
    spectrum = values["fourierft_spectrum"].detach()
    assert spectrum.shape == (1000,)
    assert abs(spectrum.mean()) < 0.15
    assert abs(spectrum.std() - 1) < 0.1
    model = get_peft_model(Net(layer), config(init_weights=True))
    assert model.get_base_model().layer.values("default")["fourierft_spectrum"].abs().max() == 0


def test_a_file_holds_the_spectrum_alone(tmp_path: Path) -> None:
    get_peft_model(Net(nn.Linear(6, 5)), config(n_frequency=9)).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {key: tuple(value.shape) for key, value in saved.items()} == {
        "base_model.model.layer.fourierft_spectrum": (9,)
    }


def test_patterns() -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6))
    chosen = FourierFTConfig(target_modules=["0", "1"], n_frequency=9, n_frequency_pattern={"1": 4})
    sizes = [
        layer.values("default")["fourierft_spectrum"].numel() for layer in get_peft_model(net, chosen).base_model.model
    ]
    assert sizes == [9, 4]


def test_more_entries_than_the_weight_has() -> None:
    net = Net(nn.Linear(6, 5))
    with refused(net, r"n_frequency=31 for 'layer' of 5×6; expected at most 30"):
        get_peft_model(net, config(n_frequency=31))
    get_peft_model(net, config(n_frequency=30))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_frequency": 0}, "n_frequency=0; expected a whole number of at least 1"),
        ({"scaling": math.inf}, "scaling=inf; expected a finite number"),
        ({"random_loc_seed": None}, "random_loc_seed=None; expected a whole number"),
        ({"bias": "fourierft_only"}, "bias='fourierft_only'; expected .*'fourier_only'"),
        ({"n_frequency_pattern": {"(": 3}}, "n_frequency_pattern='\\(' is no regular expression"),
        ({"n_frequency_pattern": {"q": -3}}, r"n_frequency_pattern\['q'\]=-3"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PeanutError, match=message):
        FourierFTConfig(**options)


def test_defaults() -> None:
    chosen = FourierFTConfig()
    assert (chosen.n_frequency, chosen.scaling, chosen.random_loc_seed) == (1000, 300.0, 777)
