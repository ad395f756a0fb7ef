"""The low-rank operator and its joined product against the matrix written out."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peanut.lab.measure import saved_bytes
from peanut.model.inspection import effective_rank
from peanut.operators import Delta, LowRank

from ..support import directed, distance, one_thread  # noqa: F401

OUT, IN, RANK = 5, 4, 2


def factor(*shape: int, trained: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=trained)


def operator(rank: int = RANK, scaling: float = 0.7) -> LowRank:
    return LowRank(factor(OUT, rank), factor(rank, IN), scaling)


@pytest.mark.parametrize("scaling", [1.0, -0.3])
def test_every_form_is_the_same_matrix(scaling: float) -> None:
    delta = operator(scaling=scaling)
    matrix, ids = scaling * delta.up @ delta.down, torch.tensor([[0, 3], [1, 1]])
    x = factor(2, 3, IN)
    assert delta.shape == (OUT, IN)
    assert delta.rank == RANK
    assert distance(delta.dense(), matrix) < 1e-14
    assert distance(delta.apply(x), x @ matrix.T) < 1e-14
    assert distance(delta.rows(ids), matrix.T[ids]) < 1e-14
    assert distance(Delta.rows(delta, ids), matrix.T[ids]) < 1e-14
    up, down = delta.factors()
    assert distance(up @ down, matrix) < 1e-14


def test_weighted_is_the_answer_weighted_token_by_token() -> None:
    delta = LowRank(torch.randn(OUT, 3).double(), torch.randn(3, IN).double(), 0.3)
    x, gate = torch.randn(2, 4, IN).double(), torch.rand(2, 4, 1).double().requires_grad_()
    found, expected = delta.gated(gate).apply(x), delta.apply(x) * gate
    assert distance(found, expected) < 1e-14
    direction = torch.randn_like(found)
    (ours,), (theirs,) = torch.autograd.grad(found, gate, direction), torch.autograd.grad(expected, gate, direction)
    assert distance(ours, theirs) < 1e-14


def test_gradients_flow_through_a_cast() -> None:
    delta = operator()
    half = delta.to(torch.bfloat16)
    assert half.apply(torch.randn(3, IN, dtype=torch.bfloat16)).dtype == torch.bfloat16
    directed(half.dense()).backward()
    assert delta.up.grad is not None
    assert delta.up.grad.dtype == torch.float64


@settings(deadline=None, max_examples=25)
@given(
    ranks=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    scalings=st.lists(st.floats(-2, 2), min_size=4, max_size=4),
    seed=st.integers(0, 1000),
)
def test_sum_is_the_sum_of_the_matrices(ranks: list[int], scalings: list[float], seed: int) -> None:
    torch.manual_seed(seed)
    operators = [operator(rank, scaling) for rank, scaling in zip(ranks, scalings, strict=False)]
    total = LowRank.sum(operators)
    assert total.rank == sum(ranks)
    expected = sum((single.dense() for single in operators), torch.zeros(OUT, IN, dtype=torch.float64))
    assert torch.allclose(total.dense(), expected, atol=1e-12)


@pytest.mark.parametrize("shape", [(IN,), (3, IN), (2, 3, IN), (0, IN)], ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_joined_is_the_frozen_product_plus_the_change(shape: tuple[int, ...], biased: bool) -> None:
    delta, x, weight = operator(), factor(*shape), factor(OUT, IN)
    bias = factor(OUT) if biased else None
    inputs = [value for value in (x, weight, bias, delta.up, delta.down) if value is not None]
    expected = x @ (weight + delta.dense()).T + (0 if bias is None else bias)
    found = delta.joined(x, weight, bias)
    assert torch.allclose(found, expected, rtol=1e-13, atol=1e-14)
    direction = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=5)), ids=str)
def test_joined_passes_gradcheck_whatever_is_trained(needs: tuple[bool, ...]) -> None:
    shapes = [(3, IN), (OUT, IN), (OUT,), (OUT, RANK), (RANK, IN)]
    inputs = [factor(*shape, trained=need) for shape, need in zip(shapes, needs, strict=True)]

    def joined(x: Tensor, weight: Tensor, bias: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return LowRank(up, down, 0.7).joined(x, weight, bias)

    if any(needs):
        assert torch.autograd.gradcheck(joined, inputs)
        assert torch.autograd.gradgradcheck(joined, inputs)
    else:
        assert not joined(*inputs).requires_grad


def test_joined_takes_what_is_not_contiguous() -> None:
    delta, weight = operator(), factor(IN, OUT).T
    x = factor(IN, 3, 2).permute(2, 1, 0)
    y, expected = delta.joined(x, weight, None), x @ (weight + delta.dense()).T
    assert distance(y, expected) < 1e-14
    wanted = [x, delta.up, delta.down]
    found, exact = (torch.autograd.grad(directed(each.transpose(0, 1)), wanted) for each in (y, expected))
    assert all(distance(one, other) < 1e-13 for one, other in zip(found, exact, strict=True))


@pytest.mark.parametrize(("inputs", "kept"), [(8 * RANK, RANK), (8 * RANK - 1, 0)], ids=["narrow", "wide"])
def test_joined_keeps_its_input_and_at_most_r_numbers_a_token(inputs: int, kept: int) -> None:
    x, weight, up, down = (
        factor(50, inputs),
        factor(OUT, inputs, trained=False),
        factor(OUT, RANK),
        factor(RANK, inputs),
    )
    found = saved_bytes(lambda: LowRank(up, down).joined(x, weight, None), [], [x, weight, up, down])
    assert found == 50 * kept * x.element_size()
    frozen = [up.detach(), down.detach()]
    assert saved_bytes(lambda: LowRank(*frozen).joined(x, weight, None), [], [x, weight, *frozen]) == 0


def test_joined_with_a_kept_product_may_be_differentiated_twice() -> None:
    x, weight = factor(3, 8 * RANK), factor(OUT, 8 * RANK, trained=False)

    def joined(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return LowRank(up, down, 0.7).joined(x, weight, None)

    parts = (x, factor(OUT, RANK), factor(RANK, 8 * RANK))
    assert torch.autograd.gradcheck(joined, parts)
    assert torch.autograd.gradgradcheck(joined, parts)


@pytest.mark.parametrize("rank", [1, 2, 6])
def test_spectrum_is_that_of_the_matrix(rank: int) -> None:
    delta = operator(rank)
    values = delta.singular_values()
    expected = torch.linalg.svdvals(delta.dense())[: len(values)]
    assert distance(values, expected) < 1e-12
    assert 1 <= effective_rank(values) <= min(rank, IN) + 1e-9
    assert effective_rank(torch.ones(3)) == pytest.approx(3)
    assert effective_rank(torch.zeros(2)) == 0
