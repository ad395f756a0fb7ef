"""Factors of their own for each sample: applied as the dense matrices would be, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peanut import PeanutError
from peanut.lab.measure import saved_bytes
from peanut.operators import LowRank
from peanut.operators.compose import Sum
from peanut.operators.per_sample import PerSample

from ..support import distance, one_thread  # noqa: F401


def operator(batch: int = 3) -> PerSample:
    up, down = torch.randn(batch, 6, 2, dtype=torch.float64), torch.randn(batch, 2, 5, dtype=torch.float64)
    return PerSample(up.requires_grad_(), down.requires_grad_(), 0.5)


def written_out(delta: PerSample, x: Tensor) -> Tensor:
    """Each sample's rows times its own matrix; there may be several rows a sample."""
    share = len(x) // len(delta.up)
    return torch.stack([row @ (0.5 * delta.up[i // share] @ delta.down[i // share]).T for i, row in enumerate(x)])


@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 5), (6, 4, 5), (3, 2, 4, 5)], ids=str)
def test_equals_the_matrices(shape: tuple[int, ...]) -> None:
    delta, x = operator(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    found, expected = delta.apply(x), written_out(delta, x)
    assert distance(found, expected) < 1e-12
    direction = torch.randn_like(found)
    wanted = [x, delta.up, delta.down]
    for one, other in zip(
        torch.autograd.grad(found, wanted, direction), torch.autograd.grad(expected, wanted, direction), strict=True
    ):
        assert distance(one, other) < 1e-12


@pytest.mark.parametrize("shape", [(3, 5), (6, 4, 5)], ids=str)
def test_joined_has_the_gradients_of_the_matrices(shape: tuple[int, ...]) -> None:
    delta, x = operator(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    wanted = [x, weight.requires_grad_(), bias.requires_grad_(), delta.up, delta.down]
    found, expected = delta.joined(x, weight, bias), written_out(delta, x) + x @ weight.T + bias
    direction = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, wanted, direction), torch.autograd.grad(expected, wanted, direction), strict=True
    ):
        assert distance(one, other) < 1e-12
    hidden = 2 * 8 * delta.up.shape[-1] * (x.numel() // x.shape[-1])  # r numbers a token, before s and after
    assert saved_bytes(lambda: delta.joined(x, weight, bias), [], wanted) <= hidden
    with torch.no_grad():
        assert torch.equal(delta.joined(x, weight, bias), found)


def test_joined_and_summed() -> None:
    delta, x = operator(), torch.randn(3, 4, 5, dtype=torch.float64)
    weight, bias = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    other = LowRank(torch.randn(6, 1, dtype=torch.float64), torch.randn(1, 5, dtype=torch.float64))
    expected = written_out(delta, x) + x @ weight.T + bias
    assert distance(delta.joined(x, weight, bias), expected) < 1e-12
    for terms in ((delta, other), (other, delta)):
        assert distance(Sum(terms).joined(x, weight, bias), expected + x @ other.dense().T) < 1e-12


def test_gradcheck() -> None:
    weight = torch.randn(6, 5, dtype=torch.float64)

    def applied(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return PerSample(up, down, 0.5).apply(x)

    def joined(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return PerSample(up, down, 0.5).joined(x, weight, None)

    delta, x = operator(), torch.randn(6, 4, 5, dtype=torch.float64, requires_grad=True)
    for product in (applied, joined):
        assert torch.autograd.gradcheck(product, (x, delta.up, delta.down), fast_mode=True)
        assert torch.autograd.gradgradcheck(product, (x, delta.up, delta.down), fast_mode=True)


def test_dtype_shape_and_no_matrix() -> None:
    delta = operator()
    assert delta.factors() is None
    narrow = delta.to(torch.bfloat16)
    assert narrow.apply(torch.randn(3, 4, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert narrow.scaling == 0.5
    for ask in (delta.dense, lambda: delta.rows(torch.tensor([0]))):
        with pytest.raises(PeanutError, match="another one for each sample; expected one task for all; see task_ids"):
            ask()
