"""Low-rank operators behind gates of each token: joined as the sum that defines it, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peanut import PeanutError
from peanut.lab.measure import saved_bytes
from peanut.operators import LowRank

from ..support import distance, one_thread  # noqa: F401

OUT, IN, RANKS = 6, 5, (2, 1, 3)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


Experts = list[tuple[LowRank, Tensor]]


def experts(shape: tuple[int, ...]) -> Experts:
    return [(LowRank(draw(OUT, rank), draw(rank, IN), 0.5 * rank), draw(*shape[:-1], 1)) for rank in RANKS]


def together(found: Experts) -> LowRank:
    return LowRank.sum([expert.gated(gate) for expert, gate in found])


def parts(found: Experts) -> list[Tensor]:
    return [part for expert, gate in found for part in (expert.up, expert.down, gate)]


def defined(found: Experts, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x @ weight.T + bias + sum(gate * (x @ expert.dense().T) for expert, gate in found)


@pytest.mark.parametrize("shape", [(2, 4, IN), (3, IN)], ids=str)
def test_equals_the_sum(shape: tuple[int, ...]) -> None:
    each, x, weight, bias = experts(shape), draw(*shape), draw(OUT, IN), draw(OUT)
    delta = together(each)
    found, expected = delta.joined(x, weight, bias), defined(each, x, weight, bias)
    assert delta.shape == (OUT, IN)
    assert distance(found, expected) < 1e-12
    assert distance(x @ weight.T + bias + delta.apply(x), expected) < 1e-12
    wanted = [x, weight, bias, *parts(each)]
    direction = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, wanted, direction), torch.autograd.grad(expected, wanted, direction), strict=True
    ):
        assert distance(one, other) < 1e-12
    with torch.no_grad():
        assert torch.equal(delta.joined(x, weight, bias), found)


def test_second_derivatives() -> None:
    each, x, weight, bias = experts((2, 3, IN)), draw(2, 3, IN), draw(OUT, IN), draw(OUT)

    def joined(x: Tensor, *own: Tensor) -> Tensor:
        again = zip(own[::3], own[1::3], own[2::3], RANKS, strict=True)
        return together([(LowRank(up, down, 0.5 * r), gate) for up, down, gate, r in again]).joined(x, weight, bias)

    assert torch.autograd.gradgradcheck(joined, (x, *parts(each)), fast_mode=True)


def test_keeps_the_factors_side_by_side_and_the_gates_and_nothing_of_the_size_of_the_tokens() -> None:
    each, x, weight, bias = experts((2, 64, IN)), draw(2, 64, IN), draw(OUT, IN), draw(OUT)
    delta = together(each)
    assert delta.gate is not None
    given = [x, weight, delta.up, delta.down, delta.gate]
    assert saved_bytes(lambda: delta.joined(x, weight, bias), [], given) == 0


def test_a_gate_that_is_broadcast_weights_whole_rows() -> None:
    one, x, weight = LowRank(draw(OUT, 2), draw(2, IN)), draw(3, 4, IN), draw(OUT, IN)
    gate = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64).view(3, 1, 1)
    found = one.gated(gate).joined(x, weight, None)
    assert distance(found, x @ weight.T + gate * (x @ one.dense().T)) < 1e-12


def test_dtype_and_no_matrix() -> None:
    narrow = together(experts((2, 4, IN))).to(torch.bfloat16)
    x, weight = torch.randn(2, 4, IN, dtype=torch.bfloat16), torch.randn(OUT, IN, dtype=torch.bfloat16)
    assert narrow.joined(x, weight, None).dtype == torch.bfloat16
    assert narrow.factors() is None
    with pytest.raises(PeanutError, match="another one for each token"):
        narrow.dense()
