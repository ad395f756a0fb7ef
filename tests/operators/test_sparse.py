"""Sparse against a matrix filled entry by entry."""

from __future__ import annotations

import pytest
import torch

from peanut.operators.sparse import Sparse

from ..support import one_thread  # noqa: F401
from .test_materialised import check_laws

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.mark.parametrize(
    "rows_and_columns",
    [
        [[0, 0, 2, 5], [0, 7, 3, 0]],
        [[5, 0, 2, 0], [0, 7, 3, 0]],
        [[5, 0, 2, 0, 1], [0, 7, 3, 0, 1]],  # so many that the gradient is the whole product's
    ],
    ids=["in order", "in no order", "many"],
)
def test_laws(rows_and_columns: list[list[int]]) -> None:
    torch.manual_seed(1)
    values = torch.randn(len(rows_and_columns[0]), dtype=torch.float64, requires_grad=True)
    places = torch.tensor(rows_and_columns, dtype=torch.int32)
    dense = torch.zeros(6, 8, dtype=torch.float64)
    for k, (row, column) in enumerate(places.T.tolist()):
        spot = torch.zeros_like(dense)
        spot[row, column] = 1
        dense = dense + values[k] * spot
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    check_laws(Sparse(values, places, (6, 8)), (values,), dense, x)


def test_the_sum_keeps_the_layout_of_the_weight() -> None:
    values, places = torch.tensor([2.0, 3.0]), torch.tensor([[0, 1], [2, 0]])
    operator = Sparse(values, places, (2, 3))
    for weight in (torch.arange(6.0).view(2, 3), torch.arange(6.0).view(3, 2).T):
        expected = weight.clone()
        expected[0, 2] += 2
        expected[1, 0] += 3
        assert torch.equal(operator.onto(weight), expected)
        assert operator.onto(weight).stride() == weight.stride()
