"""Writing a merged weight into a layer, and getting the old one back bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peanut import PeanutError
from peanut.weights import FrozenLayer, kind_of

from ..support import LAYERS, frozen_state, one_thread, same_bits  # noqa: F401


def frozen(module: nn.Module) -> FrozenLayer:
    kind = kind_of(module)
    assert kind is not None
    return FrozenLayer(module, kind)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_written_and_restored(kind: str, dtype: torch.dtype) -> None:
    module = next(iter(LAYERS[kind].values()))().to(dtype)
    layer, before = frozen(module), frozen_state(module)
    matrix, bias = layer.matrix().detach().clone(), layer.bias()
    for factor in (3.0, 5.0):  # a second merge starts from the same original
        layer.write(matrix * factor, None if bias is None else bias.detach() + factor)
        assert layer.merged
        assert same_bits(module.weight.detach(), (before["weight"] * factor))
        assert same_bits(layer.matrix().detach(), matrix)
        assert same_bits(layer.weight, before["weight"])
        assert bias is None or same_bits(layer.bias(), before["bias"])
    layer.restore()
    assert not layer.merged
    assert all(same_bits(value, before[key]) for key, value in module.state_dict().items())


def test_nothing_is_restored_where_nothing_was_written() -> None:
    module = nn.Linear(3, 4)
    layer = frozen(module)
    with torch.no_grad():
        module.weight += 1
    expected = module.weight.detach().clone()
    layer.restore()
    assert same_bits(module.weight.detach(), expected)


def test_forgotten_originals_make_the_merged_weight_the_own_one() -> None:
    module = nn.Linear(3, 4)
    layer = frozen(module)
    layer.write(torch.ones(4, 3), torch.ones(4))
    layer.forget()
    layer.restore()
    assert same_bits(module.weight.detach(), torch.ones(4, 3))
    assert same_bits(layer.matrix().detach(), torch.ones(4, 3))


def test_a_shared_weight_gets_its_own_place_and_is_shared_again() -> None:
    embedding, head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
    head.weight = embedding.weight
    layer, before = frozen(head), embedding.weight.detach().clone()
    layer.write(layer.matrix() + 1, None, shared=["weight"])
    assert layer.untied_from is not None
    assert same_bits(embedding.weight.detach(), before)
    assert same_bits(head.weight.detach(), before + 1)
    assert head.weight.requires_grad == embedding.weight.requires_grad
    layer.restore()
    assert head.weight is embedding.weight
    assert layer.untied_from is None


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.float32, torch.nan), (torch.float32, torch.inf), (torch.float16, 1e5)], ids=str
)
def test_what_is_not_finite_once_written_is_refused(dtype: torch.dtype, value: float) -> None:
    module = nn.Linear(3, 4).to(dtype)
    layer, before = frozen(module), frozen_state(module)
    with pytest.raises(PeanutError, match=r"not finite; expected finite values; check the adapter's training$"):
        layer.write(torch.full((4, 3), value), None)
    with pytest.raises(PeanutError, match="not finite"):
        layer.write(torch.zeros(4, 3), torch.full((4,), torch.nan))
    assert not layer.merged
    assert all(same_bits(kept, before[key]) for key, kept in module.state_dict().items())


def test_a_bias_needs_a_place() -> None:
    layer = frozen(nn.Linear(3, 4, bias=False))
    with pytest.raises(PeanutError, match="has none; expected a layer with a bias; use it unmerged"):
        layer.write(torch.zeros(4, 3), torch.zeros(4))
    assert not layer.merged


def test_a_layer_that_was_cast_while_merged_is_restored_in_its_new_dtype() -> None:
    module = nn.Linear(3, 4)
    layer, before = frozen(module), frozen_state(module)
    layer.write(torch.ones(4, 3), None)
    module.to(torch.float16)
    layer.restore()
    assert same_bits(module.weight.detach(), before["weight"].half())
