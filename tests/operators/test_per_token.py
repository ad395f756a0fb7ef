"""Experts behind gates of each token: joined as the sum that defines it, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peanut import PeanutError
from peanut.lab.measure import saved_bytes
from peanut.operators import LowRank, PerToken

from ..support import distance, one_thread  # noqa: F401

OUT, IN, RANKS = 6, 5, (2, 1, 3)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def operator(shape: tuple[int, ...]) -> PerToken:
    experts = tuple(LowRank(draw(OUT, rank), draw(rank, IN), 0.5 * rank) for rank in RANKS)
    return PerToken(experts, tuple(draw(*shape[:-1], 1) for _ in RANKS))


def defined(delta: PerToken, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    each = zip(delta.experts, delta.gates, strict=True)
    return x @ weight.T + bias + sum(gate * (x @ expert.dense().T) for expert, gate in each)


@pytest.mark.parametrize("shape", [(2, 4, IN), (3, IN)], ids=str)
def test_equals_the_sum(shape: tuple[int, ...]) -> None:
    delta, x, weight, bias = operator(shape), draw(*shape), draw(OUT, IN), draw(OUT)
    found, expected = delta.joined(x, weight, bias), defined(delta, x, weight, bias)
    assert delta.shape == (OUT, IN)
    assert distance(found, expected) < 1e-12
    assert distance(x @ weight.T + bias + delta.apply(x), expected) < 1e-12
    wanted = [x, weight, bias, *delta.gates, *(part for each in delta.experts for part in (each.up, each.down))]
    direction = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, wanted, direction), torch.autograd.grad(expected, wanted, direction), strict=True
    ):
        assert distance(one, other) < 1e-12
    with torch.no_grad():
        assert torch.equal(delta.joined(x, weight, bias), found)


def test_second_derivatives() -> None:
    delta, x, weight, bias = operator((2, 3, IN)), draw(2, 3, IN), draw(OUT, IN), draw(OUT)
    parts = [part for each in delta.experts for part in (each.up, each.down)]

    def joined(x: Tensor, *rest: Tensor) -> Tensor:
        gates, parts = rest[: len(RANKS)], rest[len(RANKS) :]
        pairs = zip(parts[::2], parts[1::2], RANKS, strict=True)
        experts = tuple(LowRank(up, down, 0.5 * rank) for up, down, rank in pairs)
        return PerToken(experts, tuple(gates)).joined(x, weight, bias)

    assert torch.autograd.gradgradcheck(joined, (x, *delta.gates, *parts), fast_mode=True)


def test_keeps_nothing_but_what_it_is_given() -> None:
    delta, x, weight, bias = operator((2, 64, IN)), draw(2, 64, IN), draw(OUT, IN), draw(OUT)
    given = [x, weight, *delta.gates, *(part for each in delta.experts for part in (each.up, each.down))]
    assert saved_bytes(lambda: delta.joined(x, weight, bias), [], given) == 0


def test_dtype_and_no_matrix() -> None:
    narrow = operator((2, 4, IN)).to(torch.bfloat16)
    x, weight = torch.randn(2, 4, IN, dtype=torch.bfloat16), torch.randn(OUT, IN, dtype=torch.bfloat16)
    assert narrow.joined(x, weight, None).dtype == torch.bfloat16
    assert narrow.factors() is None
    for ask in (narrow.dense, lambda: narrow.rows(torch.tensor([0]))):
        with pytest.raises(PeanutError, match="another one for each token"):
            ask()
