"""Blockwise and BlockAffine against their entries, and what Blockwise keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from peanut.operators.blockwise import BlockAffine, Blockwise

from ..support import distance, one_thread  # noqa: F401
from .test_materialised import check_laws

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.mark.parametrize("r", [1, 3, 4, 5, 8], ids=lambda r: f"r={r}")
@pytest.mark.parametrize("m", [2, 6], ids=["mini", "whole"])
def test_laws(r: int, m: int) -> None:
    torch.manual_seed(1)
    block = torch.randn(r, m, dtype=torch.float64, requires_grad=True)
    dense = torch.stack([torch.stack([block[i % r, o % m] for i in range(8)]) for o in range(6)])
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    operator = Blockwise(block, (6, 8))
    factors = operator.factors()
    assert factors[0].shape == (6, r)
    check_laws(operator, (block,), dense, x, compiled=r == 3, refuses_second=True)


@torch.no_grad()
@pytest.mark.parametrize("r", [3, 4], ids=lambda r: f"r={r}")
@pytest.mark.parametrize("m", [2, 6], ids=["mini", "whole"])
def test_settled_answers_the_same(r: int, m: int) -> None:
    operator = Blockwise(torch.randn(r, m, dtype=torch.float64), (6, 8))
    settled = operator.for_inference(torch.float64)
    x, W, b = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 3, 8), (6, 8), (6,)))
    dense = torch.stack([torch.stack([operator.block[i % r, o % m] for i in range(8)]) for o in range(6)])
    for some in (x, x[0, 0], x[:0]):
        expected = some @ (W + dense).T + b
        assert settled.joined(some, W, b).shape == expected.shape
        assert torch.allclose(settled.joined(some, W, b), expected, rtol=0, atol=1e-13)
        assert torch.allclose(settled.apply(some), some @ dense.T, rtol=0, atol=1e-13)


def test_a_product_keeps_r_numbers_a_token() -> None:
    block, weight = torch.randn(2, 6, requires_grad=True), torch.randn(6, 8)
    x = torch.randn(5, 8, requires_grad=True)
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        Blockwise(block, (6, 8)).joined(x, weight, None)
    assert sorted(tuple(value.shape) for value in kept) == [(2, 6), (5, 2), (6, 8)]


def test_a_trained_weight_and_bias_get_their_gradients() -> None:
    block, x = torch.randn(2, 6, requires_grad=True), torch.randn(5, 8)
    weight, bias = torch.randn(6, 8, requires_grad=True), torch.randn(6, requires_grad=True)
    direction = torch.randn(5, 6)
    found = torch.autograd.grad(Blockwise(block, (6, 8)).joined(x, weight, bias), (weight, bias), direction)
    assert distance(found[0], direction.T @ x) < 1e-6
    assert distance(found[1], direction.sum(0)) < 1e-6


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_affine_blocks(transposed: bool) -> None:
    torch.manual_seed(1)
    weight = torch.randn(8, 6, dtype=torch.float64).T if transposed else torch.randn(6, 8, dtype=torch.float64)
    block = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    one = torch.eye(2, dtype=torch.float64)
    dense = torch.cat(
        [
            torch.cat([(weight[2 * a : 2 * a + 2, 2 * c : 2 * c + 2] + one) @ block[a] for c in range(4)], dim=1)
            for a in range(3)
        ]
    )
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    operator = BlockAffine(block, weight)
    check_laws(operator, (block,), dense, x)
    other = torch.randn(6, 8, dtype=torch.float64)
    assert distance(operator.onto(other), other + dense) < 1e-14  # the weight that it is added to may be another
    assert operator.onto(weight).stride() == weight.stride()
