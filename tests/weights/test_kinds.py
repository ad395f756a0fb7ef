"""Each kind of layer, seen as a matrix, and what it answers to a change of that matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peanut.operators import Dense, LowRank
from peanut.weights import KINDS, FrozenLayer, LayerKind, kind_of

from ..support import INPUTS, LAYERS, distance, one_thread, same_bits  # noqa: F401

EVERY_LAYER = [(kind, layer) for kind in LAYERS for layer in LAYERS[kind]]
every_layer = pytest.mark.parametrize(("kind", "layer"), EVERY_LAYER)


def built(kind: str, layer: str) -> tuple[Any, LayerKind]:
    module = LAYERS[kind][layer]().double()
    found = kind_of(module)
    assert found is not None
    assert found.name == kind
    return module, found


def input_of(kind: str, layer: str) -> Tensor:
    x = INPUTS.get(layer, INPUTS[kind])()
    return x.double() if x.is_floating_point() else x


@every_layer
def test_layout_undoes_matrix_bit_for_bit(kind: str, layer: str) -> None:
    module, found = built(kind, layer)
    matrix = found.matrix(module, module.weight)
    assert matrix.shape == found.shape(module)
    assert same_bits(found.layout(module, matrix), module.weight)
    assert found.layout(module, matrix).is_contiguous()


@pytest.mark.parametrize("low_rank", [True, False], ids=["low rank", "dense"])
@every_layer
def test_response_is_what_the_output_gains(kind: str, layer: str, low_rank: bool) -> None:
    module, found = built(kind, layer)
    x, (out, inputs) = input_of(kind, layer), found.shape(module)
    product = LowRank(torch.randn(out, 2).double(), torch.randn(2, inputs).double(), 0.5)
    delta = product if low_rank else Dense(product.dense())
    matrix = found.matrix(module, module.weight) + delta.dense()
    changed = torch.func.functional_call(module, {"weight": found.layout(module, matrix)}, (x,))
    assert distance(found.respond(module, x, delta), changed - module(x)) < 1e-12


@every_layer
def test_shapes_of_factors_multiply_to_the_matrix(kind: str, layer: str) -> None:
    module, found = built(kind, layer)
    frozen = FrozenLayer(module, found)
    up, down = torch.ones(frozen.up_shape(3)).flatten(1), torch.ones(frozen.down_shape(3)).flatten(1)
    assert (up @ down).shape == (frozen.out_features, frozen.in_features) == found.shape(module)


def test_matrix_of_linear_layers_is_the_one_of_the_formula() -> None:
    x = torch.randn(3, 12)
    linear, conv1d = nn.Linear(12, 20), Conv1D(20, 12)
    for module in (linear, conv1d):
        frozen = FrozenLayer(module, built_kind(module))
        assert distance(module(x), x @ frozen.matrix().T + frozen.bias()) < 1e-6


def built_kind(module: nn.Module) -> LayerKind:
    found = kind_of(module)
    assert found is not None
    return found


def test_matrix_of_a_convolution_acts_on_patches() -> None:
    module, x = nn.Conv2d(4, 10, 3, bias=False), torch.randn(2, 4, 5, 5)
    patches = nn.functional.unfold(x, 3)  # (2, 4·3·3, positions)
    matrix = built_kind(module).matrix(module, module.weight)
    assert distance(module(x).flatten(2), matrix @ patches) < 1e-5


def test_other_layers_are_of_no_kind() -> None:
    assert {kind.name for kind in KINDS} == set(LAYERS)
    for module in (
        nn.BatchNorm1d(4),
        nn.LayerNorm(4, elementwise_affine=False),
        nn.ConvTranspose1d(4, 4, 1),
        nn.EmbeddingBag(4, 4),
        nn.Sequential(),
        None,
        "linear",
    ):
        assert kind_of(module) is None


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("module", [nn.Linear(3, 4), Conv1D(4, 3)], ids=["linear", "conv1d"])
def test_a_layer_is_fused_only_while_nothing_else_happens_in_its_call(module: nn.Module) -> None:
    kind = built_kind(module)
    assert kind.fused(module)
    for hooked in (module.register_forward_hook, module.register_forward_pre_hook, module.register_full_backward_hook):
        handle = hooked(lambda *_: None)
        assert not kind.fused(module)
        handle.remove()
    assert kind.fused(module)
    module.forward = module.forward  # type: ignore[method-assign]
    assert not kind.fused(module)


def test_subclasses_and_parametrized_layers_are_not_fused() -> None:
    assert not built_kind(Doubled(3, 4)).fused(Doubled(3, 4))
    module = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    assert not built_kind(module).fused(module)
    for kind in ("conv", "embedding"):
        module, found = built(kind, "plain")
        assert not found.fused(module)
