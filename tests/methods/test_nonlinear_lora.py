"""Nonlinear LoRA against its formula (arXiv 2410.01870, section 5.3)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from peanut import NonlinearLoraConfig, PeanutError
from peanut.operators import LowRank
from peanut.protocols import METHODS
from peanut.weights import FrozenLayer, kind_of

from ..support import distance, one_thread, scattered  # noqa: F401

METHOD = METHODS["NONLINEAR_LORA"]
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
@pytest.mark.parametrize(
    ("act_fn", "sigma"),
    [("relu", torch.relu), ("gelu", F.gelu), ("sine", lambda x: torch.sin(2 * math.pi * x)), ("linear", lambda x: x)],
)
def test_change_is_the_formula(kind: str, act_fn: str, sigma: Any) -> None:
    layer, config = frozen(LAYERS[kind]()), NonlinearLoraConfig(r=2, act_fn=act_fn, scaling=0.5, dropout=0.1)
    values = METHOD.start(config, layer, torch.Generator().manual_seed(1))
    change = METHOD.change(config, values, layer)
    assert not change.delta.dense().any()
    assert change.dropout == 0.1
    scattered(values.values())
    A, B = values["nonlinear_lora_A.weight"].double(), values["nonlinear_lora_B.weight"].double()
    assert (A.shape, B.shape) == ((layer.out_features, 2), (2, layer.in_features))
    delta = METHOD.change(config, {name: value.double() for name, value in values.items()}, layer).delta
    assert isinstance(delta, LowRank)
    assert delta.rank == 2
    assert distance(delta.dense(), 0.5 * sigma(A) @ B) < 1e-12


def test_parameters_start_as_those_of_lora() -> None:
    layer = frozen(nn.Linear(300, 200))
    values = METHOD.start(NonlinearLoraConfig(r=64), layer, torch.Generator().manual_seed(1))
    assert values["nonlinear_lora_A.weight"].std() == pytest.approx(1 / math.sqrt(3 * 200), rel=0.03)
    assert not values["nonlinear_lora_B.weight"].any()
    values = METHOD.start(NonlinearLoraConfig(r=64, init_weights=False), layer, torch.Generator().manual_seed(1))
    assert values["nonlinear_lora_B.weight"].std() == pytest.approx(1 / math.sqrt(3 * 300), rel=0.03)


def test_rank_pattern_is_for_its_layers() -> None:
    config = NonlinearLoraConfig(r=4, rank_pattern={"query": 2})
    assert (config.for_layer("layer.0.query").r, config.for_layer("layer.0.key").r) == (2, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, r"^r=0; expected a whole number of at least 1; "),
        ({"act_fn": "sinus"}, r"^act_fn='sinus'; expected a key of transformers' ACT2FN or 'sine'; nearest: "),
        ({"scaling": math.inf}, r"^scaling=inf; expected a finite number from "),
        ({"dropout": 1}, r"^dropout=1; expected a probability "),
        ({"rank_pattern": {"query": 0}}, r"^rank_pattern\['query'\]=0; "),
        ({"rank_pattern": {"(": 2}}, r"^rank_pattern='\(' is no regular expression "),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PeanutError, match=message):
        NonlinearLoraConfig(**options)
