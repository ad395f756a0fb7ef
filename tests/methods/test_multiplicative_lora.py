"""Multiplicative LoRA against its formula (arXiv 2410.01870, section 5.3)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peanut import MultiplicativeLoraConfig, PeanutConfig, PeanutError
from peanut.operators import LowRank
from peanut.protocols import METHODS
from peanut.weights import FrozenLayer, kind_of

from ..support import distance, one_thread, scattered  # noqa: F401

METHOD = METHODS["MULTIPLICATIVE_LORA"]
LAYERS = {
    "linear": lambda: nn.Linear(6, 5),
    "conv1d": lambda: Conv1D(5, 6),
    "conv": lambda: nn.Conv2d(3, 5, (3, 2)),
    "embedding": lambda: nn.Embedding(9, 5),
}


def frozen(module: nn.Module) -> FrozenLayer:
    kind = kind_of(module)
    assert kind is not None
    return FrozenLayer(module.requires_grad_(False), kind)


@pytest.mark.parametrize("kind", LAYERS)
def test_change_is_the_formula(kind: str) -> None:
    layer, config = frozen(LAYERS[kind]().double()), MultiplicativeLoraConfig(r=2, scaling=0.5, dropout=0.1)
    values = METHOD.start(config, layer, torch.Generator().manual_seed(1))
    change = METHOD.change(config, values, layer)
    assert not change.delta.dense().any()
    assert change.dropout == 0.1
    scattered(values.values())
    values = {name: value.double() for name, value in values.items()}
    A, B = values["multiplicative_lora_A.weight"], values["multiplicative_lora_B.weight"]
    assert (A.shape, B.shape) == ((layer.in_features, 2), (2, layer.in_features))
    delta = METHOD.change(config, values, layer).delta
    assert isinstance(delta, LowRank)
    assert delta.rank == 2
    assert distance(delta.dense(), 0.5 * layer.matrix() @ A @ B) < 1e-12


def test_it_is_peanut_without_its_activation() -> None:
    layer, peanut = frozen(nn.Linear(6, 5).double()), METHODS["PEANUT"]
    values = METHOD.start(MultiplicativeLoraConfig(r=2, init_weights=False), layer, torch.Generator().manual_seed(1))
    A, B = values["multiplicative_lora_A.weight"].double(), values["multiplicative_lora_B.weight"].double()
    config = PeanutConfig(r=2, act_fn="linear", side="in", scaling=0.5)
    same = peanut.change(config, {"peanut_A.weight": A.T, "peanut_B.weight": B.T}, layer)
    ours = METHOD.change(
        MultiplicativeLoraConfig(r=2, scaling=0.5),
        {"multiplicative_lora_A.weight": A, "multiplicative_lora_B.weight": B},
        layer,
    )
    assert distance(ours.delta.dense(), same.delta.dense()) < 1e-12
    assert ours.delta.dense().abs().max() > 1e-3


def test_a_16_bit_weight_is_read_as_it_is() -> None:
    layer, config = frozen(nn.Linear(6, 5).bfloat16()), MultiplicativeLoraConfig(r=2, init_weights=False)
    values = METHOD.start(config, layer, torch.Generator().manual_seed(1))
    delta = METHOD.change(config, values, layer).delta
    assert delta.up.dtype == delta.down.dtype == torch.float32
    A, B = values.values()
    assert distance(delta.dense(), layer.matrix().float() @ A @ B) < 0.02


def test_parameters_start_as_those_of_lora() -> None:
    layer = frozen(nn.Linear(300, 200))
    values = METHOD.start(MultiplicativeLoraConfig(r=64), layer, torch.Generator().manual_seed(1))
    assert values["multiplicative_lora_A.weight"].std() == pytest.approx(1 / math.sqrt(3 * 300), rel=0.03)
    assert not values["multiplicative_lora_B.weight"].any()


def test_rank_pattern_is_for_its_layers() -> None:
    config = MultiplicativeLoraConfig(r=4, rank_pattern={"query": 2})
    assert (config.for_layer("layer.0.query").r, config.for_layer("layer.0.key").r) == (2, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, r"^r=0; expected a whole number of at least 1; "),
        ({"scaling": math.nan}, r"^scaling=nan; expected a finite number from "),
        ({"dropout": 1}, r"^dropout=1; expected a probability "),
        ({"rank_pattern": {"query": 0}}, r"^rank_pattern\['query'\]=0; "),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PeanutError, match=message):
        MultiplicativeLoraConfig(**options)
