"""Norms and effective ranks against the dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peanut import BottleneckConfig, PeanutConfig, get_peft_model
from peanut.model.inspection import effective_rank, inspect_adapter, inspect_places
from peanut.operators import LowRank

from ..support import Net, randomised


def test_report_equals_the_dense_matrices() -> None:
    model = randomised(get_peft_model(Net(nn.Linear(20, 12)).double(), PeanutConfig(r=5, target_modules=["layer"])))
    layer = model.get_base_model().layer
    (report,) = inspect_adapter(model)
    values = torch.linalg.svdvals(layer.delta("default").detach())
    shares = values / values.sum()
    shares = shares[shares > 1e-12]
    assert (report.path, report.method, report.kind, report.shape) == ("layer", "PEANUT", "linear", (12, 20))
    assert report.parameters == 2 * 5 * 12
    assert report.weight_norm == pytest.approx(float(layer.weight.norm()))
    assert report.delta_norm == pytest.approx(float(values.norm()))
    assert report.relative_norm == pytest.approx(report.delta_norm / report.weight_norm)
    assert report.effective_rank == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())), rel=1e-6)


def test_places_without_a_weight() -> None:
    config = BottleneckConfig(bottleneck_size=3, target_modules=["layer"])
    model = randomised(get_peft_model(Net(nn.Linear(20, 12)), config))
    assert inspect_adapter(model) == []
    (report,) = inspect_places(model)
    values = dict(model.adapters.parameters("default"))
    assert (report.path, report.method, report.parameters) == ("layer", "BOTTLENECK", 3 * 12 + 3 + 12 * 3 + 12)
    assert {f"layer.{suffix}" for suffix in report.tensors} == values.keys()
    for suffix, (shape, norm) in report.tensors.items():
        assert shape == tuple(values[f"layer.{suffix}"].shape)
        assert norm == pytest.approx(float(values[f"layer.{suffix}"].detach().norm()))


@pytest.mark.parametrize("rank", [1, 3, 9])  # 9 is more than the matrix has
def test_singular_values_without_the_matrix(rank: int) -> None:
    operator = LowRank(torch.randn(8, rank).double(), torch.randn(rank, 11).double(), 0.3)
    values = operator.singular_values()
    expected = torch.linalg.svdvals(operator.dense())[: len(values)]
    assert torch.allclose(values, expected)


def test_effective_rank_of_equal_and_of_no_values() -> None:
    assert effective_rank(torch.full((4,), 0.7, dtype=torch.float64)) == pytest.approx(4)
    assert effective_rank(torch.tensor([2.0, 0, 0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0
