"""What is kept of an operator while few tokens come in, and when it is let go."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from peanut.operators import Delta, LowRank
from peanut.operators.inference import FEW, WrittenOut

from ..support import distance, one_thread  # noqa: F401


@dataclass(frozen=True)
class Counted(Delta):
    """A low-rank operator that notes how often it is written out and applied."""

    inner: LowRank
    calls: list[str] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    def apply(self, x: Tensor) -> Tensor:
        self.calls.append("apply")
        return self.inner.apply(x)

    def dense(self) -> Tensor:
        self.calls.append("dense")
        return self.inner.dense()

    def to(self, dtype: torch.dtype) -> Counted:
        return Counted(self.inner.to(dtype), self.calls)


def made(dtype: torch.dtype = torch.float64) -> tuple[WrittenOut, Counted, Tensor, Tensor]:
    torch.manual_seed(3)
    up, down, W, b = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in ((7, 2), (2, 5), (7, 5), (7,)))
    inner = Counted(LowRank(up, down, 0.7))
    return WrittenOut(inner), inner, W, b


@torch.no_grad()
@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 3, 5), (FEW, 5), (FEW + 1, 5), (0, 5)], ids=str)
def test_answers_are_those_of_the_dense_form(shape: tuple[int, ...]) -> None:
    kept, inner, W, b = made()
    x, ids = torch.randn(shape, dtype=torch.float64), torch.tensor([[0, 4], [4, 1]])
    D = 0.7 * inner.inner.up @ inner.inner.down
    for found, expected in (
        (kept.apply(x), x @ D.T),
        (kept.joined(x, W, b), x @ (W + D).T + b),
        (kept.joined(x, W.T.contiguous().T, None), x @ (W + D).T),
        (kept.rows(ids), D.T[ids]),
        (kept.dense(), D),
    ):
        assert found.shape == expected.shape
        assert not expected.numel() or distance(found, expected) < 1e-13
    assert kept.shape == (7, 5)
    assert kept.factors() == inner.factors()


@torch.no_grad()
def test_few_tokens_build_once_and_many_let_go() -> None:
    kept, inner, W, _ = made()
    token = torch.randn(1, 5, dtype=torch.float64)
    for _ in range(3):
        kept.joined(token, W, None)
    assert inner.calls == ["dense"]
    kept.joined(token.expand(FEW + 1, 5), W, None)
    assert inner.calls == ["dense", "apply"]
    kept.joined(token, W, None)
    assert inner.calls == ["dense", "apply", "dense"]


@torch.no_grad()
def test_16_bits_keep_a_change_that_the_weight_would_swallow() -> None:
    W, x = torch.ones(7, 5, dtype=torch.bfloat16), torch.randn(3, 5).bfloat16()
    inner = LowRank(torch.full((7, 1), 1e-3), torch.ones(1, 5)).to(torch.bfloat16)
    y = WrittenOut(inner).joined(x, W, None)
    assert y.dtype == torch.bfloat16
    exact = x.float() @ (1.001 * torch.ones(7, 5)).T
    assert (W + inner.dense()).eq(1).all()
    assert distance(y, exact) < torch.finfo(torch.bfloat16).eps
    apart = WrittenOut(inner).joined(x, torch.zeros_like(W), None)
    assert distance(apart, x.float() @ (1e-3 * torch.ones(7, 5)).T) < 4 * torch.finfo(torch.bfloat16).eps


@torch.no_grad()
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 1, 0, 2, 2, 1)], ids=str)
def test_each_weight_has_its_own_answer(order: tuple[int, ...]) -> None:
    """W + Δ is that of the weight that is asked for, whichever was asked for before."""
    kept, inner, A, b = made()
    weights = [A, A.clone() + 1, 2 * A.clone()]
    token, D = torch.randn(1, 5, dtype=torch.float64), 0.7 * inner.inner.up @ inner.inner.down
    assert len(set(order)) == 3
    for number in order:
        W = weights[number]
        assert distance(kept.joined(token, W, b), token @ (W + D).T + b) < 1e-13
        assert distance(kept.apply(token), token @ D.T) < 1e-13
