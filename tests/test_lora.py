"""LoRA against its formula (arXiv 2106.09685), with the peer's variants of scale, start and bias."""

from __future__ import annotations

import math
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peanut
from peanut import LoraConfig, PeanutError, PeftModel, PeftWarning, get_peft_model
from peanut.model.layers.layer import AdaptedLayer

from .support import Net, directed, distance, one_thread, randomised, refused, same_bits  # noqa: F401


def adapted(layer: nn.Module, **options: Any) -> tuple[PeftModel, AdaptedLayer]:
    model = get_peft_model(Net(layer.double()), LoraConfig(target_modules=["layer"], **options))
    return randomised(model).eval(), model.get_base_model().layer


def values_of(layer: AdaptedLayer) -> dict[str, Tensor]:
    return {suffix: value.detach() for suffix, value in layer.adapters["default"].values_by_suffix().items()}


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_for_no_layer_is_refused(pattern: str) -> None:
    model = Net(nn.Linear(12, 8))
    with refused(model, f"^{pattern} names 'ayer', which none of the 1 adapted layers is called; .*nearest: 'layer'"):
        get_peft_model(model, LoraConfig(target_modules=["layer"], **{pattern: {"ayer": 2}}))


@pytest.mark.parametrize(
    ("options", "scaling"),
    [
        ({"r": 4, "lora_alpha": 10}, 2.5),
        ({"r": 4, "lora_alpha": 10, "use_rslora": True}, 5.0),
        ({"r": 4, "lora_alpha": 10, "rank_pattern": {"layer": 2}}, 5.0),
        ({"r": 4, "lora_alpha": 10, "rank_pattern": {"layer": 2}, "alpha_pattern": {"^lay.*": 3}}, 1.5),
    ],
)
def test_linear_is_the_formula(options: dict[str, Any], scaling: float) -> None:
    model, layer = adapted(nn.Linear(6, 5), **options)
    A, B = values_of(layer).values()
    W, b, x = layer.base_layer.weight, layer.base_layer.bias, torch.randn(3, 6, dtype=torch.float64)
    assert A.shape[0] == B.shape[1] == options.get("rank_pattern", {}).get("layer", 4)
    assert distance(model(x), x @ (W + scaling * B @ A).T + b) < 1e-12


def test_other_kinds_are_the_formula() -> None:
    x, pixels, ids = torch.randn(3, 6).double(), torch.randn(2, 3, 7, 7).double(), torch.tensor([[1, 4], [0, 1]])
    model, layer = adapted(Conv1D(5, 6), r=2)
    A, B = values_of(layer).values()
    assert distance(model(x), layer.base_layer(x) + 4 * (x @ A.T) @ B.T) < 1e-12
    model, layer = adapted(nn.Conv2d(3, 4, 3, stride=2, padding=1), r=2)
    A, B = values_of(layer).values()
    assert (A.shape, B.shape) == ((2, 3, 3, 3), (4, 2, 1, 1))
    added = F.conv2d(F.conv2d(pixels, A, stride=2, padding=1), B)
    assert distance(model(pixels), layer.base_layer(pixels) + 4 * added) < 1e-12
    model, layer = adapted(nn.Embedding(7, 5), r=2)
    A, B = values_of(layer).values()
    assert (A.shape, B.shape) == ((2, 7), (5, 2))
    assert distance(model(ids), layer.base_layer(ids) + 4 * A.T[ids] @ B.T) < 1e-12


def test_biases_are_the_formula() -> None:
    x = torch.randn(3, 6, dtype=torch.float64)
    model, layer = adapted(nn.Linear(6, 5), r=4, lora_bias=True)
    values = values_of(layer)
    assert set(values) == {"lora_A.weight", "lora_B.weight", "lora_B.bias"}
    low = x @ values["lora_A.weight"].T @ values["lora_B.weight"].T + values["lora_B.bias"]
    assert distance(model(x), layer.base_layer(x) + 2 * low) < 1e-12
    model, layer = adapted(nn.Linear(6, 5), r=8, bias="lora_only")
    values = values_of(layer)
    assert set(values) == {"lora_A.weight", "lora_B.weight", "base_layer.bias"}
    W = layer.base_layer.weight + values["lora_B.weight"] @ values["lora_A.weight"]
    assert distance(model(x), x @ W.T + values["base_layer.bias"]) < 1e-12
    with model.disable_adapter():
        assert same_bits(model(x), layer.base_layer(x))
    model, layer = adapted(nn.Linear(6, 5, bias=False), r=8, bias="lora_only")
    assert set(values_of(layer)) == {"lora_A.weight", "lora_B.weight"}


@pytest.mark.parametrize(
    ("init", "std_a", "std_b"),
    [
        (True, 1 / math.sqrt(3 * 300), 0),
        ("gaussian", 1 / 64, 0),
        (False, 1 / math.sqrt(3 * 300), 1 / math.sqrt(3 * 64)),
    ],
)
def test_parameters_start_as_published(init: bool | str, std_a: float, std_b: float) -> None:
    config = LoraConfig(r=64, init_lora_weights=init, target_modules=["layer"])
    layer = get_peft_model(Net(nn.Linear(300, 200)), config).get_base_model().layer
    A, B = values_of(layer).values()
    assert A.std() == pytest.approx(std_a, rel=0.03)
    assert B.std() == pytest.approx(std_b, rel=0.03)
    assert init == "gaussian" or A.abs().max() <= 1 / math.sqrt(300)


@pytest.mark.parametrize(("init", "std_a", "std_b"), [(True, 0, 1), ("gaussian", 0, 1), (False, 1, 1)])
def test_embeddings_start_silent_in_the_factor_that_is_looked_up(init: bool | str, std_a: float, std_b: float) -> None:
    config = LoraConfig(r=64, init_lora_weights=init, target_modules=["layer"])
    A, B = values_of(get_peft_model(Net(nn.Embedding(300, 200)), config).get_base_model().layer).values()
    assert A.std() == pytest.approx(std_a, rel=0.03)
    assert B.std() == pytest.approx(std_b, rel=0.03)


def test_a_bias_that_was_trained_merges_into_the_bias() -> None:
    model, layer = adapted(nn.Linear(6, 5), r=2, bias="lora_only", lora_bias=True)
    x, before = torch.randn(3, 6, dtype=torch.float64), layer.base_layer.bias.detach().clone()
    expected = model(x)
    model.merge_adapter()
    assert distance(model(x), expected) < 1e-12
    assert distance(layer.base_layer.bias, before) > 0.05
    model.unmerge_adapter()
    assert same_bits(layer.base_layer.bias.detach(), before)


def test_a_half_precision_base_keeps_its_bias_and_the_adapter_float32() -> None:
    net = Net(nn.Linear(6, 5)).bfloat16()
    model = randomised(get_peft_model(net, LoraConfig(target_modules=["layer"], bias="lora_only", lora_bias=True)))
    y = model(torch.randn(3, 6, dtype=torch.bfloat16))
    directed(y).backward()
    assert y.dtype == net.layer.base_layer.bias.dtype == torch.bfloat16
    for _, value in model.adapters.parameters("default"):
        assert value.dtype == value.grad.dtype == torch.float32


@pytest.mark.parametrize("layer", [nn.Linear(6, 5, bias=False), nn.Conv2d(2, 4, 3, bias=False), nn.Embedding(6, 5)])
def test_a_bias_for_a_layer_without_one_is_said_not_to_merge(layer: nn.Module) -> None:
    config = LoraConfig(target_modules=["layer"], lora_bias=True)
    with pytest.warns(PeftWarning, match=f"lora_bias=True for {type(layer).__name__} layers without a bias"):
        model = get_peft_model(Net(layer), config)
    with pytest.raises(PeanutError, match="the adapter changes the bias of a layer that has none"):
        model.merge_adapter()


def test_biases_are_trained_in_the_places_where_the_peer_trains_them() -> None:
    found = []
    for library, leaf in ((peanut, "trained_bias.default"), (peft, "bias")):
        for bias in ("none", "all", "lora_only"):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6, bias=False))
            model = library.get_peft_model(net, library.LoraConfig(target_modules=["0", "3"], bias=bias))
            trained = [name for name, value in model.named_parameters() if value.requires_grad and name.endswith(leaf)]
            found.append({name.removeprefix("base_model.model.")[0] for name in trained})
    assert found[:3] == found[3:] == [set(), {"0", "1", "2"}, {"0"}]
