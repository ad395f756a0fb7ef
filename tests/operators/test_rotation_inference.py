"""Rotations as evaluation keeps them, against matrices made of their blocks one after the other."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from peanut.lab.measure import peak_bytes
from peanut.operators import Rotation
from peanut.operators.block_factors import BlockFactors
from peanut.operators.inference import FEW

from ..support import distance, one_thread  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

Case = Callable[[], tuple[Rotation, Tensor]]


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def blocks(n: int, b: int, copies: int = 1) -> Case:
    values = drawn(n, b, b)
    return lambda: (BlockFactors.diagonal(values, copies), torch.block_diag(*[*values] * copies))


def butterfly(f: int, n: int, b: int) -> Case:
    """Factor i mixes half blocks j and j + 2^i of each run of 2^(i+1): found for each row of the matrix by itself."""
    levels, half = drawn(f, n, b, b), b // 2

    def make() -> tuple[Rotation, Tensor]:
        total = torch.eye(n * b, dtype=torch.float64)
        for level in range(f):
            factor, apart = torch.zeros_like(total), 2**level
            for first in (j for j in range(2 * n) if j // apart % 2 == 0):
                block = first // (2 * apart) * apart + first % apart
                at = [half * j + k for j in (first, first + apart) for k in range(half)]
                for row in range(b):
                    factor[at[row], at] = levels[level, block, row]
            total = total @ factor
        return BlockFactors.butterfly(levels), total

    return make


CASES = {
    "narrow blocks": blocks(24, 4),
    "narrow blocks, an odd number": blocks(7, 3),
    "wide blocks": blocks(3, 32),
    "wide blocks, many": blocks(33, 32),
    "repeated blocks": blocks(2, 5, 4),
    "one factor": butterfly(1, 6, 4),
    "three factors": butterfly(3, 12, 4),
    "three wide factors": butterfly(3, 4, 24),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@every_case
@pytest.mark.parametrize("shape", [(), (1, 1), (2, 3), (FEW,), (FEW + 1,), (0,)], ids=str)
@torch.no_grad()
def test_the_same_answers(case: Case, shape: tuple[int, ...]) -> None:
    operator, matrix = case()
    width = len(matrix)
    settled = operator.for_inference(torch.float64)
    x, weight, bias = drawn(*shape, width), drawn(9, width, seed=2), drawn(9, seed=3)
    before = x.clone()
    for found, expected in (
        (settled.apply(x), x @ matrix.T),
        (settled.turned(x, weight, bias), x @ (weight @ matrix).T + bias),
        (settled.turned(x, weight, None), x @ (weight @ matrix).T),
    ):
        assert found.shape == expected.shape
        assert not expected.numel() or distance(found, expected) < 1e-13
    assert torch.equal(x, before)
    assert distance(settled.dense(), matrix) < 1e-13
    assert distance(copy.deepcopy(settled).dense(), matrix) < 1e-13


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_sixteen_bits(case: Case, dtype: torch.dtype) -> None:
    operator, matrix = case()
    settled = operator.for_inference(dtype)
    for count in (1, 3):
        x = drawn(count, len(matrix))
        y = settled.apply(x.to(dtype))
        assert y.dtype == dtype
        assert distance(y, x @ matrix.T) < 20 * torch.finfo(dtype).eps
        with torch.autocast("cpu", dtype):
            assert torch.equal(settled.apply(x.to(dtype)), y)


@every_case
def test_gradients_still_flow_to_the_input(case: Case) -> None:
    operator, matrix = case()
    settled = operator.for_inference(torch.float64)
    x, direction = drawn(2, len(matrix)).requires_grad_(), drawn(2, len(matrix), seed=2)
    (grad,) = torch.autograd.grad(settled.apply(x), x, direction)
    assert distance(grad, direction @ matrix) < 1e-13


@torch.no_grad()
def test_many_tokens_are_turned_with_one_copy_of_them() -> None:
    settled = blocks(64, 32)()[0].for_inference(torch.float32)
    x = torch.randn(3000, 2048)
    size = x.untyped_storage().nbytes()
    assert size <= peak_bytes(lambda: settled.apply(x), x.device) < 1.8 * size
