"""DoRA against its formula (arXiv 2402.09353), and against the peer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peanut import LoraConfig, PeanutError, get_peft_model
from peanut.methods.dora import norms_with
from peanut.operators import LowRank
from peanut.protocols import METHODS
from peanut.weights import FrozenLayer, kind_of

from ..support import PEER_WARNINGS, Net, directed, distance, one_thread, peer_model, randomised, same_bits, scattered  # noqa: F401

pytestmark = PEER_WARNINGS
LORA = METHODS["LORA"]
LAYERS = {
    "linear": lambda: nn.Linear(6, 5),
    "conv1d": lambda: Conv1D(5, 6),
    "conv": lambda: nn.Conv2d(3, 5, (3, 2)),
    "conv 1d": lambda: nn.Conv1d(3, 5, 2),
    "conv 3d": lambda: nn.Conv3d(3, 5, (2, 1, 2)),
    "embedding": lambda: nn.Embedding(9, 5),
}
SHAPES = {"conv 1d": (1, 5, 1), "conv": (1, 5, 1, 1), "conv 3d": (1, 5, 1, 1, 1)}
every_kind = pytest.mark.parametrize("kind", LAYERS)


def frozen(module: nn.Module) -> FrozenLayer:
    kind = kind_of(module)
    assert kind is not None
    return FrozenLayer(module.requires_grad_(False), kind)


def started(layer: FrozenLayer, **options: Any) -> tuple[LoraConfig, dict[str, Tensor]]:
    """A config, and random values of its tensors in a layer."""
    config = LoraConfig(r=2, lora_alpha=3, use_dora=True, **options)
    values = LORA.start(config, layer, torch.Generator().manual_seed(1))
    for name in values.keys() - LORA.rebuilt(config):
        values[name] = values[name].to(layer.weight.dtype) + 0.3 * torch.randn_like(values[name]).to(layer.weight.dtype)
        values[name].requires_grad_()
    return config, values


def formula(layer: FrozenLayer, values: dict[str, Tensor], norm_is_constant: bool = True) -> Tensor:
    """m ⊙ (W + s·BA) / ‖W + s·BA‖ row by row, s = 3/2."""
    A, B = (value.flatten(1) for name, value in values.items() if name.split(".")[0][-2:] in ("_A", "_B"))
    turned = layer.matrix() + 1.5 * B @ A
    norms = turned.norm(dim=1, keepdim=True)
    return values["lora_magnitude_vector"].reshape(-1, 1) * turned / (norms.detach() if norm_is_constant else norms)


@every_kind
def test_change_is_the_formula_forward_and_backward(kind: str) -> None:
    layer = frozen(LAYERS[kind]().double())
    config, values = started(layer)
    W, delta = layer.matrix(), LORA.change(config, values, layer).delta
    wanted = [value for value in values.values() if value.requires_grad]
    assert len(wanted) == 3
    expected = formula(layer, values) - W
    assert distance(delta.dense(), expected) < 1e-12
    x = torch.randn(4, W.shape[1], dtype=torch.float64)
    assert distance(delta.joined(x, W, None), x @ formula(layer, values).T) < 1e-12
    direction = torch.randn(4, W.shape[0], dtype=torch.float64)
    found = torch.autograd.grad(delta.apply(x), wanted, direction)
    exact = torch.autograd.grad(x @ expected.T, wanted, direction)
    assert all(distance(one, other) < 1e-12 for one, other in zip(found, exact, strict=True))
    through_norm = torch.autograd.grad(x @ formula(layer, values, norm_is_constant=False).T, wanted, direction)
    assert any(distance(one, other) > 0.01 for one, other in zip(found, through_norm, strict=True))


@every_kind
def test_magnitude_starts_as_the_norms_of_the_rows(kind: str) -> None:
    layer = frozen(LAYERS[kind]())
    config = LoraConfig(r=2, use_dora=True)
    values = LORA.start(config, layer, torch.Generator())
    assert distance(values["lora_magnitude_vector"].flatten(), layer.matrix().norm(dim=1)) < 1e-6
    assert values["lora_magnitude_vector"].shape == SHAPES.get(kind, (5,))
    assert not LORA.rebuilt(config)
    delta = LORA.change(config, values, layer).delta
    assert not delta.dense().any()
    x = torch.randn(4, delta.shape[1])
    assert same_bits(delta.joined(x, layer.matrix(), None), nn.functional.linear(x, layer.matrix()))


def test_norms_are_exact_also_where_the_change_is_large_or_cancels_the_weight() -> None:
    W = torch.randn(8, 6, dtype=torch.float64)
    A, B = torch.randn(6, 6, dtype=torch.float64), 50 * torch.randn(8, 6, dtype=torch.float64)
    large = norms_with(W, LowRank(B, A, 0.3))
    assert distance(large, (W + 0.3 * B @ A).norm(dim=1)) < 1e-12
    undone = norms_with(W, LowRank(-W, torch.eye(6, dtype=torch.float64), 1.0))
    assert undone.isfinite().all()
    assert (undone > 0).all()
    assert undone.max() < 1e-7


def test_a_row_of_zeros_gives_numbers() -> None:
    module = nn.Linear(6, 5)
    nn.init.zeros_(module.weight.data[2])
    layer = frozen(module)
    config = LoraConfig(r=2, use_dora=True)
    values = {name: value.requires_grad_() for name, value in LORA.start(config, layer, torch.Generator()).items()}
    delta = LORA.change(config, values, layer).delta
    y = delta.apply(torch.randn(3, 6))
    directed(y).backward()
    assert not y.any()
    assert all(values[name].grad.isfinite().all() for name in ("lora_A.weight", "lora_magnitude_vector"))


def test_16_bit_norms_are_better_than_the_dtype() -> None:
    W = torch.randn(40, 64).bfloat16()
    A, B = torch.randn(4, 64) / 8, torch.randn(40, 4) / 8
    found = norms_with(W, LowRank(B, A, 1.0))
    assert found.dtype == torch.float32
    assert distance(found, (W.double() + B.double() @ A.double()).norm(dim=1)) < torch.finfo(torch.bfloat16).eps / 4


# Hugging Face PEFT drops nothing of an embedding's input, and of a convolution's only what B A sees.
@pytest.mark.parametrize(("kind", "dropout"), [*((kind, 0.0) for kind in LAYERS), ("linear", 0.5), ("conv1d", 0.5)])
def test_the_peer_does_the_same_in_training(kind: str, dropout: float) -> None:
    config = LoraConfig(r=2, lora_alpha=3, use_dora=True, lora_dropout=dropout, target_modules=["layer"])
    theirs = peer_model(Net(LAYERS[kind]()), config).base_model.model.layer.train()
    trained = {name.replace(".default", ""): value for name, value in theirs.named_parameters() if value.requires_grad}
    scattered(trained.values())
    trained["lora_magnitude_vector"] = trained.pop("lora_magnitude_vector.weight")
    layer = frozen(theirs.base_layer)
    delta = LORA.change(config, trained, layer).delta
    inputs = {"conv": torch.randn(2, 3, 6, 5), "conv 1d": torch.randn(2, 3, 6), "conv 3d": torch.randn(2, 3, 4, 3, 3)}
    x = (inputs | {"embedding": torch.arange(9)}).get(kind, torch.randn(4, 6))
    torch.manual_seed(7)
    expected = theirs(x)
    torch.manual_seed(7)
    seen = nn.functional.dropout(x, dropout) if dropout else x
    y = theirs.base_layer(x) + layer.kind.respond(layer.module, seen, delta)
    assert distance(y, expected) < 1e-5
    assert distance(y, theirs.base_layer(x)) > 0.05
    direction, wanted = torch.randn_like(expected), list(trained.values())
    found, exact = (torch.autograd.grad(one, wanted, direction) for one in (y, expected))
    assert len(wanted) == 3
    assert all(distance(one, other) < 1e-5 for one, other in zip(found, exact, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wide", [True, False])
def test_a_new_adapter_changes_no_bit_in_any_dtype(dtype: torch.dtype, wide: bool) -> None:
    net = Net(nn.Linear(60, 500)).to(dtype)
    net.layer.weight.data.mul_(1000)  # the norms' squares are beyond float16
    x = torch.randn(4, 60, dtype=dtype)
    before = net(x)
    model = get_peft_model(net, LoraConfig(use_dora=True, target_modules=["layer"]), autocast_adapter_dtype=wide)
    assert before.isfinite().all()
    assert same_bits(model.eval()(x), before)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_model_compiles_in_one_graph_and_takes_autocast() -> None:
    torch._dynamo.reset()
    model = randomised(get_peft_model(Net(nn.Linear(6, 5)), LoraConfig(r=2, use_dora=True, target_modules=["layer"])))
    x, trained = torch.randn(4, 6), [value for value in model.parameters() if value.requires_grad]
    y = model(x)
    expected = torch.autograd.grad(directed(y), trained)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    assert distance(compiled, y) < 1e-5
    found = torch.autograd.grad(directed(compiled), trained)
    assert all(distance(one, other) < 1e-5 for one, other in zip(found, expected, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(x)
    assert rough.dtype == torch.bfloat16
    assert distance(rough, y) < 0.05
    found = torch.autograd.grad(directed(rough.float()), trained)
    assert all(distance(one, other) < 0.1 for one, other in zip(found, expected, strict=True))


def test_a_bias_of_b_is_refused() -> None:
    with pytest.raises(PeanutError, match=r"^lora_bias=True with use_dora=True; expected one of the two; "):
        LoraConfig(use_dora=True, lora_bias=True)
