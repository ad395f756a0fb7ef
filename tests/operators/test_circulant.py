"""Circulant against its blocks written entry by entry."""

from __future__ import annotations

import pytest
import torch

from peanut.operators.circulant import Circulant

from ..support import distance, one_thread  # noqa: F401
from .test_materialised import check_laws

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.mark.parametrize(
    "shape", [(3, 2, 4), (2, 3, 5), (1, 1, 6), (4, 3, 1), (2, 1, 2), (2, 1, 32), (1, 2, 33)], ids=str
)
def test_laws(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(1)
    rows, columns, b = shape
    kernel = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    dense = torch.stack(
        [
            torch.stack([0.3 * kernel[o // b, i // b, (i % b - o % b) % b] for i in range(columns * b)])
            for o in range(rows * b)
        ]
    )
    x = torch.randn(2, 3, columns * b, dtype=torch.float64, requires_grad=True)
    check_laws(Circulant(kernel, 0.3), (kernel,), dense, x, compiled=b in (5, 32))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 6), (4, 3, 1), (5, 4, 7), (2, 1, 2), (12, 3, 16)], ids=str)
@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_settled(shape: tuple[int, int, int], count: int) -> None:
    torch.manual_seed(1)
    rows, columns, b = shape
    kernel, x = torch.randn(shape, dtype=torch.float64), torch.randn(count, columns * b, dtype=torch.float64)
    expected = x.new_zeros(count, rows * b)
    for row in range(rows):
        for t in range(b):
            for column in range(columns):
                for u in range(b):
                    expected[:, row * b + t] += -0.3 * kernel[row, column, u] * x[:, column * b + (t + u) % b]
    settled = Circulant(kernel, -0.3).for_inference(torch.float64)
    weight = torch.randn(rows * b, columns * b, dtype=torch.float64)
    assert distance(settled.apply(x), expected) < 1e-13
    assert distance(settled.joined(x, weight, None), x @ weight.T + expected) < 1e-13
