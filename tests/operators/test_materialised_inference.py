"""Operators as evaluation keeps them: the same answers to few tokens and to many, and nothing large kept."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from peanut.operators import Delta
from peanut.operators.circulant import Circulant
from peanut.operators.fourier import Fourier
from peanut.operators.hard_concrete import HardConcrete
from peanut.operators.inference import FEW
from peanut.operators.materialised import Materialised
from peanut.operators.sparse import Sparse

from ..support import distance, one_thread  # noqa: F401

Case = Callable[[torch.dtype], tuple[Materialised, Tensor]]


def sparse(dtype: torch.dtype) -> tuple[Materialised, Tensor]:
    flat = torch.randperm(40 * 30)[:50]  # in no order
    values, dense = torch.randn(50, dtype=dtype), torch.zeros(40, 30, dtype=dtype)
    for value, place in zip(values, flat.tolist(), strict=True):
        dense[place // 30, place % 30] = value
    return Sparse(values, torch.stack([flat // 30, flat % 30]).int(), (40, 30)), dense


def circulant(dtype: torch.dtype) -> tuple[Materialised, Tensor]:
    kernel = torch.randn(3, 2, 20, dtype=dtype)
    entries = [[kernel[o // 20, i // 20, (i - o) % 20] for i in range(40)] for o in range(60)]
    return Circulant(kernel, 0.3), 0.3 * torch.tensor(entries, dtype=dtype)


def fourier(dtype: torch.dtype) -> tuple[Materialised, Tensor]:
    return waves((40, 30), dtype)


def odd_fourier(dtype: torch.dtype) -> tuple[Materialised, Tensor]:
    return waves((41, 29), dtype)


def waves(size: tuple[int, int], dtype: torch.dtype) -> tuple[Materialised, Tensor]:
    out, inputs = size
    # Places that are their own mirror in one dimension or in both, a pair of mirrors, and any.
    places = [(0, 0), (20, 0), (20, 15), (0, 15), (0, 4), (39, 29 % inputs), (1, 1), (33, 7), (7, 22), (20, 3)]
    spectrum, dense = torch.randn(len(places), dtype=dtype), torch.zeros(size, dtype=dtype)
    j, k = torch.arange(out, dtype=dtype)[:, None], torch.arange(inputs, dtype=dtype)
    for value, (row, column) in zip(spectrum, places, strict=True):
        dense += value * torch.cos(2 * math.pi * (row * j / out + column * k / inputs))
    return Fourier(spectrum, torch.tensor(places).T.contiguous(), size, 5.0), 5.0 / (out * inputs) * dense


def gated(dtype: torch.dtype) -> tuple[Materialised, Tensor]:
    values, logits = torch.randn(40, 30, dtype=dtype), torch.randn(40, 30, dtype=dtype)
    return HardConcrete(values, logits), values * (3 / (1 + torch.exp(-logits)) - 1.5).clamp(0, 1)


CASES = pytest.mark.parametrize(
    "case", [sparse, circulant, fourier, odd_fourier, gated], ids=lambda case: case.__name__
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(1)


@CASES
@pytest.mark.parametrize("shape", [(), (1, 1), (2, 3), (FEW,), (FEW + 1,)], ids=str)
@torch.no_grad()
def test_the_same_answers(case: Case, shape: tuple[int, ...]) -> None:
    operator, dense = case(torch.float64)
    settled = operator.for_inference(torch.float64)
    out, inputs = settled.shape
    assert (out, inputs) == dense.shape
    x, weight, bias = torch.randn(*shape, inputs).double(), torch.randn(out, inputs).double(), torch.randn(out).double()
    given = x.clone(), weight.clone(), bias.clone()
    for _ in range(2):  # the second time from what was kept
        assert distance(settled.apply(x), x @ dense.T) < 1e-13
        assert distance(settled.joined(x, weight, bias), x @ (weight + dense).T + bias) < 1e-13
        assert distance(settled.joined(x, weight, None), x @ (weight + dense).T) < 1e-13
    assert all(map(torch.equal, (x, weight, bias), given))  # what is added in place is added to the output alone
    at = torch.tensor([[3, 0], [5, 3]])
    assert distance(settled.rows(at), dense.T[at]) < 1e-13
    assert distance(settled.dense(), dense) < 1e-13
    assert settled.factors() is None
    assert settled.joined(x[None][:0], weight, bias).shape == (0, *shape, out)


@CASES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_sixteen_bits(case: Case, dtype: torch.dtype) -> None:
    operator, dense = case(torch.float32)
    settled = operator.for_inference(dtype)
    out, inputs = settled.shape
    x, weight = torch.randn(2, inputs), torch.randn(out, inputs)
    y = settled.joined(x.to(dtype), weight.to(dtype), None)
    assert settled.apply(x.to(dtype)).dtype == y.dtype == settled.dense().dtype == dtype
    assert distance(settled.apply(x.to(dtype)), x @ dense.T) < 10 * torch.finfo(dtype).eps
    assert distance(y, x @ (weight + dense).T) < 10 * torch.finfo(dtype).eps
    assert torch.equal(settled.joined(x.to(dtype), weight.to(dtype), None), y)


@pytest.mark.parametrize("case", [sparse, circulant, fourier], ids=lambda case: case.__name__)
@torch.no_grad()
def test_nothing_of_the_size_of_the_weight_is_kept(case: Case) -> None:
    settled = case(torch.float32)[0].for_inference(torch.float32)
    out, inputs = settled.shape
    settled.joined(torch.randn(1, inputs), torch.randn(out, inputs), None)
    assert numbers(settled) < out * inputs / 2


def numbers(operator: Delta) -> int:
    """How many numbers an operator keeps, in tensors and in operators within."""
    total = 0
    for value in vars(operator).values():
        if isinstance(value, Delta):
            total += numbers(value)
        elif isinstance(value, Tensor):
            total += 2 * value._nnz() if value.layout is torch.sparse_csr else value.numel()
        else:
            assert not isinstance(value, (dict, list)) or not value
    return total


@torch.no_grad()
def test_what_is_kept_is_let_go_when_many_tokens_come_in() -> None:
    operator, _ = gated(torch.float32)
    settled = operator.for_inference(torch.float32)
    weight = torch.randn(40, 30)
    settled.joined(torch.randn(1, 30), weight, None)
    assert settled.held  # type: ignore[attr-defined]
    settled.joined(torch.randn(FEW + 1, 30), weight, None)
    assert not settled.held  # type: ignore[attr-defined]


@torch.no_grad()
def test_a_small_change_is_not_rounded_away() -> None:
    settled = HardConcrete(torch.full((7, 5), 1e-3), torch.full((7, 5), 9.0)).for_inference(torch.bfloat16)
    x, weight = torch.tensor([[1.0, -1.0, 1.0, -1.0, 2.0]]).bfloat16(), torch.ones(7, 5).bfloat16()
    weight[:, 4] = 0
    assert distance(settled.joined(x, weight, None), torch.full((1, 7), 2e-3)) < 0.01


@CASES
@torch.no_grad()
def test_autocast(case: Case) -> None:
    operator, dense = case(torch.float32)
    settled, x, weight = (
        operator.for_inference(torch.bfloat16),
        torch.randn(3, dense.shape[1]),
        torch.randn(dense.shape),
    )
    with torch.autocast("cpu", torch.bfloat16):
        for some in (x, x[:1]):
            y = settled.joined(some.bfloat16(), weight.bfloat16(), None)
            assert y.dtype == torch.bfloat16
            assert distance(y, some @ (weight + dense).T) < 10 * torch.finfo(torch.bfloat16).eps
