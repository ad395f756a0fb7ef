"""RED against its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from peanut import PeanutError, get_peft_model
from peanut.methods.red import REDConfig
from peanut.model.adapters.adapter_set import AdapterSet

from ..support import Net, distance, one_thread, randomised  # noqa: F401


def layer_of(model: Any) -> Any:
    return next(layer for _, layer in AdapterSet.of(model).layers())


@pytest.mark.parametrize(
    ("layer", "along"),
    [
        (nn.Linear(12, 8), (-1,)),
        (nn.Linear(12, 8, bias=False), (-1,)),
        (nn.Conv2d(4, 10, 3), (-1, 1, 1)),
    ],
    ids=["linear", "no bias", "conv"],
)
def test_representation_is_scaled_and_shifted(layer: nn.Module, along: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    base = layer.double()
    x = torch.randn(2, 4, 9, 7, dtype=torch.float64) if isinstance(layer, nn.Conv2d) else torch.randn(5, 12).double()
    h = base(x)
    model = randomised(get_peft_model(Net(layer), REDConfig(target_modules=["layer"]))).eval()
    values = layer_of(model).values("default")
    scale, shift = values["red_scale"], values["red_shift"]
    assert scale.shape == shift.shape == (layer_of(model).frozen.out_features,)
    expected = scale.view(along) * h + shift.view(along)
    assert distance(model(x), expected) < 1e-12
    if getattr(base, "bias", None) is None:
        with pytest.raises(PeanutError, match="bias of a layer that has none"):
            model.merge_adapter()
    else:
        model.merge_adapter()
        assert distance(model(x), expected) < 1e-12


def test_starts() -> None:
    torch.manual_seed(1)
    still = layer_of(get_peft_model(Net(nn.Linear(4, 400)), REDConfig(target_modules=["layer"]))).values("default")
    assert torch.equal(still["red_scale"], torch.ones(400))
    assert torch.equal(still["red_shift"], torch.zeros(400))
    config = REDConfig(target_modules=["layer"], init_weights=False)
    moved = layer_of(get_peft_model(Net(nn.Linear(4, 400)), config)).values("default")
    assert abs(moved["red_scale"].mean() - 1) < 0.02
    assert abs(moved["red_shift"].mean()) < 0.02
    assert 0.09 < moved["red_scale"].std() < 0.11
    assert 0.09 < moved["red_shift"].std() < 0.11
