"""PEANuT against the formulas of its paper (arXiv 2410.01870, section 3.3 and figure 2), written out densely."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peanut import PeanutConfig, PeftModel, get_peft_model
from peanut.model.layers.layer import AdaptedLayer

from .support import Net, distance, frozen_state, one_thread, randomised, same_bits  # noqa: F401

OUT, IN, R = 10, 14, 6
Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "sine": lambda x: torch.sin(2 * math.pi * x),
}


def adapted(dtype: torch.dtype = torch.float64, shape: tuple[int, int] = (OUT, IN), **options: object) -> PeftModel:
    torch.manual_seed(0)
    net = Net(nn.Linear(shape[1], shape[0])).to(dtype)
    config = PeanutConfig(r=R, init_weights=False, target_modules=["layer"], **options)
    return randomised(get_peft_model(net, config)).eval()


def layer_of(model: PeftModel) -> AdaptedLayer:
    return model.get_base_model().layer


def published(depth: int, W: Tensor, A: Tensor, B: Tensor, E: list[Tensor], D: list[Tensor], f: Activation) -> Tensor:
    """The tweaker of ``depth`` layers (2, 4 or 6), layer by layer, on a weight W (rows, width): (rows, width).

    Every layer but the last is followed by f; each decoding layer adds the output of the layer before the encoding one
    that it mirrors.
    """
    first = f(W @ A.T)
    if depth == 2:
        return first @ B.T
    if depth == 4:
        second = f(first @ E[0].T)
        third = f(second @ D[0].T) + first
        return third @ B.T
    second = f(first @ E[0].T)
    third = f(second @ E[1].T)
    fourth = f(third @ D[0].T) + second
    fifth = f(fourth @ D[1].T) + first
    return fifth @ B.T


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("act_fn", ACTIVATIONS)
@pytest.mark.parametrize("paper_depth", [2, 4, 6])
@pytest.mark.parametrize("side", ["out", "in"])
def test_forms_of_the_authors(side: str, paper_depth: int, act_fn: str, dtype: torch.dtype, tolerance: float) -> None:
    """Side "out" is the published code, ΔWᵀ = f(W⁰ᵀ); "in" the paper's equation and language-model code, ΔW = f(W⁰)."""
    depth = paper_depth // 2 - 1
    model = adapted(dtype, depth=depth, side=side, act_fn=act_fn, scaling=0.3)
    layer = layer_of(model)
    values = layer.adapters["default"].values_by_suffix()
    A, B = values["peanut_A.weight"], values["peanut_B.weight"]
    assert (A.shape, B.shape) == (((R, OUT), (OUT, R)) if side == "out" else ((R, IN), (IN, R)))
    E = [values[f"peanut_encoders.{level}.weight"] for level in range(depth)]
    D = [values[f"peanut_decoders.{level}.weight"] for level in range(depth)]
    assert len(values) == paper_depth
    W, b = layer.base_layer.weight, layer.base_layer.bias
    f = ACTIVATIONS[act_fn]
    delta = published(paper_depth, W.T, A, B, E, D, f).T if side == "out" else published(paper_depth, W, A, B, E, D, f)
    x = torch.randn(3, 5, IN, dtype=dtype, requires_grad=True)
    expected = x @ (W + 0.3 * delta).T + b
    y = model(x)
    assert distance(y, x @ W.T + b) > 0.05
    assert distance(y, expected) < tolerance
    assert distance(layer.delta("default"), 0.3 * delta) < tolerance
    assert torch.linalg.matrix_rank(layer.delta("default").double(), rtol=1e-4) <= R
    direction = torch.randn_like(y)
    inputs = [x, *values.values()]
    for found, wanted in zip(
        torch.autograd.grad(y, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    ):
        assert distance(found, wanted) < tolerance


def test_equation_of_section_3_3() -> None:
    """f(W⁰; Θ₁, Θ₂) = σ(W⁰Θ₁)Θ₂ with Θ₁ (d₂, r), Θ₂ (r, d₂): y = (W⁰ + f(W⁰)) x."""
    model = adapted(side="in")
    layer = layer_of(model)
    theta_1, theta_2 = (value.T for value in layer.adapters["default"].values_by_suffix().values())
    assert (theta_1.shape, theta_2.shape) == ((IN, R), (R, IN))
    W, b = layer.base_layer.weight, layer.base_layer.bias
    x = torch.randn(IN, dtype=torch.float64)
    assert distance(model(x), (W + F.relu(W @ theta_1) @ theta_2) @ x + b) < 1e-12


@pytest.mark.parametrize(("shape", "side"), [((6, 9), "out"), ((9, 6), "in"), ((6, 6), "out")], ids=str)
def test_side_auto_takes_the_smaller_dimension(shape: tuple[int, int], side: str) -> None:
    model, chosen = adapted(shape=shape, side="auto"), adapted(shape=shape, side=side)
    x = torch.randn(2, shape[1], dtype=torch.float64)
    assert layer_of(model).peanut_A["default"].weight.shape == (R, min(shape))
    assert same_bits(model(x), chosen(x))


@pytest.mark.parametrize("depth", [0, 2])
def test_parameters_start_as_published(depth: int) -> None:
    """Kaiming-uniform with a = √5, whose bound is 1/√fan_in, and B = 0 unless asked otherwise."""
    torch.manual_seed(0)
    config = PeanutConfig(r=64, depth=depth, target_modules=["layer"])
    model = get_peft_model(Net(nn.Linear(300, 200)), config)
    values = {suffix: value.detach() for suffix, value in layer_of(model).values("default").items()}
    assert values.pop("peanut_B.weight").abs().max() == 0
    assert len(values) == 1 + 2 * depth
    for value in values.values():
        bound = 1 / math.sqrt(value.shape[1])
        assert 0.98 * bound < value.abs().max() <= bound
        assert abs(value.mean()) < 0.05 * bound
        assert value.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    config = PeanutConfig(r=64, init_weights=False, target_modules=["layer"])
    random = layer_of(get_peft_model(Net(nn.Linear(300, 200)), config)).values("default")
    assert random["peanut_B.weight"].detach().std() == pytest.approx(1 / math.sqrt(3 * 64), rel=0.05)


@pytest.mark.parametrize("shape", [(8, 8), (6, 9)], ids=str)
def test_factors_come_from_the_weight_before_any_merge(shape: tuple[int, int]) -> None:
    model = adapted(shape=shape)
    layer, x = layer_of(model), torch.randn(2, shape[1], dtype=torch.float64)
    delta, before = layer.delta("default"), frozen_state(layer.base_layer)
    model.merge_adapter()
    assert distance(layer.base_layer.weight, before["weight"]) > 0.05
    assert same_bits(layer.delta("default"), delta)
    with torch.no_grad():
        layer.peanut_B["default"].weight.mul_(2)
    assert distance(layer.delta("default"), 2 * delta) < 1e-14
    model.unmerge_adapter()
    expected = model(x)
    model.merge_adapter()
    assert distance(model(x), expected) < 1e-12


def test_change_of_two_adapters_reads_the_weight_and_not_each_other() -> None:
    model = adapted()
    model.add_adapter("other", PeanutConfig(r=2, init_weights=False, target_modules=["layer"]))
    layer = layer_of(randomised(model, ["other"]))
    expected = layer.delta("default") + layer.delta("other")
    original = layer.base_layer.weight.detach().clone()
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    assert distance(layer.base_layer.weight - original, expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_reads_the_weight_in_its_own_dtype(dtype: torch.dtype) -> None:
    model = adapted(torch.float32, depth=1, act_fn="gelu")
    x = torch.randn(8, IN)
    reference = model(x)
    model.get_base_model().layer.base_layer.to(dtype)
    y = model(x.to(dtype))
    assert y.dtype == dtype
    assert all(parameter.dtype == torch.float32 for _, parameter in model.adapters.parameters("default"))
    assert distance(y, reference) < 8 * torch.finfo(dtype).eps


def test_dropout_drops_the_input_of_the_change_alone() -> None:
    model = adapted(dropout=0.5).train()
    layer, x = layer_of(model), torch.randn(4, IN, dtype=torch.float64)
    torch.manual_seed(7)
    y = model(x)
    torch.manual_seed(7)
    expected = layer.base_layer(x) + F.dropout(x, 0.5) @ layer.delta("default").T
    assert distance(y, expected) < 1e-12
    assert distance(model.eval()(x), layer.base_layer(x) + x @ layer.delta("default").T) < 1e-12
