"""Rescaled random bases: their products, their backward, what is kept between the two, dtypes and compiling."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from peanut.operators import LowRank
from peanut.operators.inference import WrittenOut
from peanut.operators.random_bases import RandomBases

from ..support import directed, distance, one_thread, same_bits  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def made(side: str, dtype: torch.dtype = torch.float64) -> RandomBases:
    """Δ of shape (7, 5): with the left factor rescaled by vectors, or the right one, of three bases of rank 2."""
    torch.manual_seed(3)
    rank = 9 if side == "full up" else 4
    if side == "down":
        shapes: tuple[tuple[int, ...], ...] = (2, 1, 5), (2, 3, 1), (3, 5), (7, 6)
    else:
        shapes = (7, rank), (7, 1), (rank,), (rank, 5)
    side = side.removeprefix("full ")
    basis, left, right, fixed = (torch.randn(shape, dtype=dtype) for shape in shapes)
    return RandomBases(basis, left.requires_grad_(), right.requires_grad_(), fixed, side, 0.7)  # type: ignore[arg-type]


def written_out(operator: RandomBases) -> Tensor:
    if operator.side == "up":
        return 0.7 * torch.diag(operator.left[:, 0]) @ operator.basis @ torch.diag(operator.right) @ operator.fixed
    rows = [
        operator.left[k, j, 0] * operator.basis[k, 0] * operator.right[j]
        for k in range(len(operator.left))
        for j in range(len(operator.right))
    ]
    return 0.7 * operator.fixed @ torch.stack(rows)


@pytest.mark.parametrize("side", ["up", "down", "full up"])
def test_products_and_gradients_are_those_of_the_dense_form(side: str) -> None:
    operator = made(side)
    x, ids = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True), torch.tensor([[0, 4], [4, 1]])
    W = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    b = torch.randn(7, dtype=torch.float64, requires_grad=True)
    dense = written_out(operator)
    assert operator.shape == dense.shape == (7, 5)
    pairs = {
        "dense": (operator.dense(), dense),
        "apply": (operator.apply(x), x @ dense.T),
        "one token": (operator.apply(x[0, 0]), x[0, 0] @ dense.T),
        "joined": (operator.joined(x, W, b), x @ (W + dense).T + b),
        "joined without bias": (operator.joined(x, W, None), x @ (W + dense).T),
        "rows": (operator.rows(ids), dense.T[ids]),
    }
    for name, (found, expected) in pairs.items():
        assert distance(found, expected) < 1e-12, name
        direction = torch.randn_like(expected)
        for gradients in zip(
            torch.autograd.grad(found, [x, W, b, operator.left, operator.right], direction, True, allow_unused=True),
            torch.autograd.grad(expected, [x, W, b, operator.left, operator.right], direction, True, allow_unused=True),
            strict=True,
        ):
            if gradients[1] is None:
                assert gradients[0] is None, name
            else:
                assert distance(*gradients) < 1e-12, name


@pytest.mark.parametrize("side", ["up", "down"])
def test_gradcheck(side: str) -> None:
    operator = made(side)
    x, W = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.randn(7, 5, dtype=torch.float64)

    def product(x: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
        own = replace(operator, left=left, right=right)
        return own.apply(x), own.joined(x, W, None), own.rows(torch.tensor([1, 4]))

    assert torch.autograd.gradcheck(product, (x, operator.left, operator.right))


def test_factors_are_given_below_full_rank() -> None:
    up, down = made("up").factors() or pytest.fail("rank 4 of 5")
    assert distance(up @ down, made("up").dense()) < 1e-12
    assert made("down").factors() is None  # rank 6 of 5


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("side", "kind"), [("up", LowRank), ("down", WrittenOut), ("full up", WrittenOut)])
def test_settled_answers_the_same(side: str, kind: type, dtype: torch.dtype) -> None:
    operator, x, W, b = made(side), torch.randn(2, 3, 5), torch.randn(7, 5), torch.randn(7)
    settled, near = operator.for_inference(dtype), 1e-12 if dtype == torch.float64 else 0.02
    assert isinstance(settled, kind)
    x, W, b = x.to(dtype), W.to(dtype), b.to(dtype)
    dense, wide = written_out(operator), x.double()
    for rows, exact in ((x, wide), (x.repeat(20, 1, 1), wide.repeat(20, 1, 1))):  # of few tokens W + Δ is kept
        assert distance(settled.apply(rows), exact @ dense.T) < near
        assert distance(settled.joined(rows, W, b), exact @ (W.double() + dense).T + b.double()) < near
    assert distance(settled.dense(), dense) < near
    assert distance(settled.rows(torch.tensor([4, 0])), dense.T[[4, 0]]) < near


@pytest.mark.parametrize("side", ["up", "down"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_the_input_and_the_parts_are_kept(side: str, dtype: torch.dtype) -> None:
    operator = made(side, torch.float32)
    x, W = torch.randn(2, 3, 5, dtype=dtype, requires_grad=True), torch.randn(7, 5, dtype=dtype)
    given = {t.data_ptr() for t in (x, W, operator.basis, operator.left, operator.right, operator.fixed)}
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor):
        y = operator.to(dtype).joined(x, W, None)
    assert kept
    assert {tensor.data_ptr() for tensor in kept} <= given
    assert y.dtype == dtype
    directed(y).backward()
    assert operator.left.grad is not None
    assert operator.left.grad.dtype == torch.float32
    assert distance(y, x.float() @ (W.float() + written_out(operator)).T) < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("side", ["up", "down"])
def test_empty_batch(side: str) -> None:
    operator = made(side)
    x = torch.empty(0, 3, 5, dtype=torch.float64, requires_grad=True)
    for y in (operator.apply(x), operator.joined(x, torch.zeros(7, 5, dtype=torch.float64), None)):
        assert y.shape == (0, 3, 7)
        grads = torch.autograd.grad(y.sum(), [x, operator.left, operator.right])
        assert [grad.shape for grad in grads] == [x.shape, operator.left.shape, operator.right.shape]
        assert all(same_bits(grad, torch.zeros_like(grad)) for grad in grads)


@pytest.mark.parametrize("side", ["up", "down"])
def test_compiles_in_one_graph(side: str) -> None:
    torch._dynamo.reset()
    operator, x = made(side, torch.float32), torch.randn(2, 3, 5)
    W = torch.randn(7, 5)
    expected = torch.autograd.grad(directed(operator.joined(x, W, None)), [operator.left, operator.right])

    def run(left: Tensor, right: Tensor) -> Tensor:
        return replace(operator, left=left, right=right).joined(x, W, None)

    y = torch.compile(run, backend="aot_eager", fullgraph=True)(operator.left, operator.right)
    for found, wanted in zip(torch.autograd.grad(directed(y), [operator.left, operator.right]), expected, strict=True):
        assert distance(found, wanted) < 1e-5


@pytest.mark.parametrize("rank", [2, 9], ids=["low rank", "beyond full rank"])
@pytest.mark.parametrize("side", ["up", "down"])
def test_gradients_of_gradients(side: Literal["up", "down"], rank: int) -> None:
    torch.manual_seed(0)
    up, down, W = (torch.randn(shape, dtype=torch.float64) for shape in ((7, rank), (rank, 5), (7, 5)))
    basis, fixed = (up, down) if side == "up" else (down, up)
    x, left, right = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((40, 5), (len(basis), 1), (1, basis.shape[1]))
    )

    def run(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return RandomBases(basis, left, right, fixed, side, 0.3).joined(x, W, None).sin()

    assert torch.autograd.gradcheck(run, (x, left, right))
    assert torch.autograd.gradgradcheck(run, (x, left, right))
