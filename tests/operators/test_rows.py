"""Rows on an embedding and on a head, against a matrix filled row by row."""

from __future__ import annotations

import pytest
import torch

from peanut.operators.rows import Rows

from ..support import distance, one_thread  # noqa: F401
from .test_materialised import check_laws

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.mark.parametrize("head", [False, True], ids=["embedding", "head"])
@pytest.mark.parametrize("ids", [[4, 0, 9], [2], [3, 2, 1, 0, 9, 8, 7]], ids=str)
def test_laws(head: bool, ids: list[int]) -> None:
    torch.manual_seed(1)
    vectors = torch.randn(len(ids), 6, dtype=torch.float64, requires_grad=True)
    table = torch.stack(
        [vectors[ids.index(token)] if token in ids else torch.zeros(6, dtype=torch.float64) for token in range(10)]
    )
    dense = table if head else table.T
    x = torch.randn(2, 30, dense.shape[1], dtype=torch.float64, requires_grad=True)
    check_laws(Rows(vectors, torch.tensor(ids), 10, head), (vectors,), dense, x, compiled=len(ids) == 3)


def test_other_tokens_change_by_exactly_nothing() -> None:
    vectors = torch.full((2, 6), torch.inf)
    rows = Rows(vectors, torch.tensor([7, 3]), 10).rows(torch.arange(10))
    assert torch.isfinite(rows).all(1).tolist() == [token not in (3, 7) for token in range(10)]
    assert rows.nan_to_num(posinf=0).abs().max() == 0


def test_a_head_adds_to_its_tokens_alone() -> None:
    x, weight = torch.randn(4, 6), torch.randn(10, 6)
    operator = Rows(torch.randn(2, 6), torch.tensor([7, 3]), 10, head=True)
    y, plain = operator.joined(x, weight, None), x @ weight.T
    others = [token for token in range(10) if token not in (3, 7)]
    assert torch.equal(y[:, others], torch.nn.functional.linear(x, weight)[:, others])
    assert distance(y[:, [7, 3]], plain[:, [7, 3]] + x @ operator.vectors.T) < 1e-6
