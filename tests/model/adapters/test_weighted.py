"""``add_weighted_adapter``: what Hugging Face PEFT makes of LoRAs, and the same of any other methods."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from peanut import IA3Config, LoraConfig, OFTConfig, PeanutConfig, PeanutError, get_peft_model
from peanut.model.layers.layer import AdaptedLayer

from ...support import PEER_WARNINGS, distance, scattered

peft = pytest.importorskip("peft")
pytestmark = PEER_WARNINGS
X = torch.linspace(-1, 1, 15).reshape(5, 3)
WAYS: list[dict[str, Any]] = [
    {"combination_type": "linear"},
    {"combination_type": "cat"},
    {"combination_type": "svd"},
    {"combination_type": "svd", "svd_rank": 2, "svd_clamp": 0.9, "svd_full_matrices": False},
    *(
        {"combination_type": way + svd, "density": 0.6, **more}
        for svd in ("", "_svd")
        for way, more in (
            ("ties", {"majority_sign_method": "frequency"}),
            ("ties", {}),
            ("dare_linear", {}),
            ("dare_ties", {}),
            ("magnitude_prune", {}),
        )
    ),
]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def _pair(ours: Any, theirs: Any) -> tuple[Any, Any]:
    """Ours and the peer's model with adapters ``a`` and ``b`` of equal values."""
    base = Two()
    models = []
    for library, configs in ((get_peft_model, ours), (peft.get_peft_model, theirs)):
        models.append(library(copy.deepcopy(base), configs[0], "left"))
        models[-1].add_adapter("right", configs[1])
    scattered((p for name, p in models[0].named_parameters() if "base_layer" not in name), scale=0.5)
    models[1].load_state_dict(models[0].state_dict())
    return models[0].eval(), models[1].eval()


def _loras(library: Any, **more: Any) -> list[Any]:
    one = library(r=3, lora_alpha=5, target_modules=["first", "second"])
    return [one, library(**{"r": 3, "lora_alpha": 2, "target_modules": ["second"], **more})]


def _mask(share: torch.Tensor) -> torch.Tensor:
    """Random entries that do not depend on what was drawn before."""
    return (
        (torch.rand(share.numel(), generator=torch.Generator().manual_seed(share.numel())) < 0.6)
        .float()
        .reshape(share.shape)
    )


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
@pytest.mark.parametrize("weights", [[0.7, 0.4], [1.5, -0.5]], ids=str)
def test_loras_give_what_they_give_in_the_peer(
    way: dict[str, Any], weights: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "bernoulli", _mask)
    ours, theirs = _pair(_loras(LoraConfig), _loras(peft.LoraConfig))
    for model in (ours, theirs):
        model.base_model.add_weighted_adapter(["left", "right"], weights, "both", **way)
        model.set_adapter("both")
    expected = theirs(X)
    assert distance(ours(X), expected) < 1e-5
    assert (
        distance(
            expected, ours.get_base_model().second.base_layer(torch.tanh(ours.get_base_model().first.base_layer(X)))
        )
        > 0.01
    )
    assert ours.peft_config["both"].r == theirs.peft_config["both"].r


def test_gains_add_as_in_the_peer() -> None:
    configs = [
        [each(target_modules=["first", "second"], feedforward_modules=["second"]) for _ in range(2)]
        for each in (IA3Config, peft.IA3Config)
    ]
    ours, theirs = _pair(*configs)
    for model in (ours, theirs):
        model.add_weighted_adapter(["left", "right"], [0.7, 0.4], "both")
        model.set_adapter("both")
    assert distance(ours(X), theirs(X)) < 1e-6
    assert ours.peft_config["both"].peft_type == "IA3"


def _change(model: Any, name: str, path: str = "second") -> torch.Tensor:
    layer = model.get_base_model().get_submodule(path)
    assert isinstance(layer, AdaptedLayer)
    return layer.delta(name)


def _mixed() -> Any:
    model = get_peft_model(Two(), LoraConfig(r=2, target_modules=["second"]), "left")
    model.add_adapter("right", PeanutConfig(r=3, depth=1, target_modules=["first", "second"]))
    model.add_adapter("third", OFTConfig(r=2, target_modules=["second"]))
    scattered((p for name, p in model.named_parameters() if "base_layer" not in name), scale=0.3)
    return model.eval()


@pytest.mark.parametrize("way", ["cat", "task_arithmetic"])
def test_mixed_methods_add_exactly(way: str) -> None:
    model = _mixed()
    model.add_weighted_adapter(["left", "right"], [0.7, -0.4], "both", way)
    expected = 0.7 * _change(model, "left") - 0.4 * _change(model, "right")
    assert distance(_change(model, "both"), expected) < 1e-6
    assert distance(_change(model, "both", "first"), -0.4 * _change(model, "right", "first")) < 1e-6
    assert (model.peft_config["both"].peft_type, model.active_adapters) == ("LORA", ["left"])


@pytest.mark.parametrize("rank", [6, 40])
def test_svd_takes_what_is_no_thin_product_and_layers_narrower_than_the_rank(rank: int) -> None:
    model = _mixed()
    model.add_weighted_adapter(["left", "third"], [1, 2], "both", "svd", svd_rank=rank)
    assert model.peft_config["both"].r == rank
    assert distance(_change(model, "both"), _change(model, "left") + 2 * _change(model, "third")) < 1e-5


def test_slerp_keeps_the_length_of_what_it_turns() -> None:
    model = _mixed()
    model.add_weighted_adapter(["left", "right"], [0.5, 0.5], "both", "slerp")
    a, b, found = (_change(model, name) for name in ("left", "right", "both"))
    angle = torch.acos(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))
    expected = (a + b) * torch.sin(angle / 2) / torch.sin(angle)
    assert distance(found, expected) < 1e-5
    assert distance(found, (a + b) / 2) > 0.1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((["left", "x"], [1, 1], "new"), "'x'"),
        ((["left", "right"], [1], "new"), "1 weights for 2"),
        ((["left", "right"], [1, 1], "new", "linear"), "ranks"),
        ((["left", "third"], [1, 1], "new", "cat"), "no product"),
        ((["left", "right"], [1, 1], "new", "ties_svd"), "density"),
        ((["left", "right"], [1, 1], "new", "ties", None, None, True, None, 3.0), "density=3.0"),
        ((["left", "right"], [1, -1], "new", "slerp"), "'slerp' of 2 adapters with weights"),
        ((["left", "right", "left"], [1, 1, 1], "new", "slerp"), "'slerp' of 3 adapters"),
        ((["left", "right"], [1, 1], "new", "sum"), "combination_type"),
        ((["left", "right"], [1, 1], "right", "cat"), "there already"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(given: Any, message: str) -> None:
    model = _mixed()
    before = list(model.state_dict())
    with pytest.raises(PeanutError, match=message):
        model.add_weighted_adapter(*given)
    assert list(model.state_dict()) == before
    assert list(model.peft_config) == ["left", "right", "third"]
