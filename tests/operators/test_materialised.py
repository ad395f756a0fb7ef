"""Operators that are built in each pass: their products, their backward, what is kept, and compiling."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from peanut.errors import PeanutError
from peanut.operators import Delta
from peanut.operators.dense import Dense
from peanut.operators.materialised import Materialised

from ..support import directed, distance, one_thread  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@dataclass(frozen=True)
class Outer(Materialised):
    """Δ = scale · (u ∘ gain) vᵀ: two trained parts with a fixed tensor and a number between them in the fields."""

    trained = ("v", "u")

    u: Tensor
    gain: Tensor
    scale: float
    v: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.u), len(self.v)

    def dense(self) -> Tensor:
        return self.scale * torch.outer(self.u * self.gain, self.v)

    def pull(self, grad: Tensor) -> tuple[Tensor, ...]:
        return self.scale * (grad.T @ (self.u * self.gain)), self.scale * (grad @ self.v) * self.gain


def made(dtype: torch.dtype = torch.float64) -> tuple[Outer, Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    u, v = torch.randn(7, dtype=dtype, requires_grad=True), torch.randn(5, dtype=dtype, requires_grad=True)
    operator = Outer(u, torch.rand(7, dtype=dtype) + 0.5, 0.7, v)
    x = torch.randn(2, 3, 5, dtype=dtype, requires_grad=True)
    return operator, x, torch.randn(7, 5, dtype=dtype), torch.randn(7, dtype=dtype, requires_grad=True)


def tensors_of(operator: Delta) -> list[Tensor]:
    return [value for value in vars(operator).values() if isinstance(value, Tensor)]


def check_laws(
    operator: Delta,
    parts: tuple[Tensor, ...],
    dense: Tensor,
    x: Tensor,
    *,
    compiled: bool = True,
    refuses_second: bool = False,
) -> None:
    """What every operator promises, against ``dense``, Δ written out by another hand and differentiable in ``parts``.

    Products, rows and factors with their gradients; the same compiled in one graph; no tokens; 16 bits; and that a
    product keeps nothing of Δ's size but the frozen weight.
    """
    torch.manual_seed(7)
    out, inputs = operator.shape
    assert (out, inputs) == dense.shape
    assert distance(operator.dense(), dense) < 1e-13
    weight, bias = torch.randn(out, inputs, dtype=x.dtype), torch.randn(out, dtype=x.dtype, requires_grad=True)
    at = torch.arange(2 * inputs).reshape(2, inputs) % inputs

    def fast(x: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return (
            operator.apply(x),
            operator.joined(x, weight, bias),
            operator.joined(x, weight, None),
            operator.rows(at),
            operator.dense(),
        )

    slow = (x @ dense.T, x @ (weight + dense).T + bias, x @ (weight + dense).T, dense.T[at], dense)
    torch._dynamo.reset()
    runs = (fast, torch.compile(fast, backend="aot_eager", fullgraph=True))
    for run in runs if compiled else runs[:1]:
        for found, expected in zip(run(x, bias), slow, strict=True):
            assert distance(found, expected) < 1e-13
            direction = torch.randn_like(expected)
            for one, other in zip(
                torch.autograd.grad(found, [x, *parts, bias], direction, retain_graph=True, allow_unused=True),
                torch.autograd.grad(expected, [x, *parts, bias], direction, retain_graph=True, allow_unused=True),
                strict=True,
            ):
                if other is None:
                    assert one is None or (run is not fast and one.abs().max() == 0)
                else:
                    assert one is not None
                    assert distance(one, other) < 1e-13
    factors = operator.factors()
    assert factors is None or distance(factors[0] @ factors[1], dense) < 1e-13
    assert operator.apply(x[:0]).shape == (0, *x.shape[1:-1], out)
    empty = operator.joined(x[:0], weight, bias)
    assert torch.autograd.grad(empty.sum(), x)[0].abs().max() == 0
    towards = torch.randn_like(slow[1])
    for dtype in (torch.bfloat16, torch.float16):
        narrow = operator.to(dtype)
        y = narrow.joined(x.to(dtype), weight.to(dtype), bias.to(dtype))
        assert narrow.apply(x.to(dtype)).dtype == narrow.rows(at).dtype == y.dtype == dtype
        assert distance(narrow.apply(x.to(dtype)), slow[0]) < 10 * torch.finfo(dtype).eps
        assert distance(y, slow[1]) < 10 * torch.finfo(dtype).eps
        for one, other in zip(
            torch.autograd.grad(y, [x, *parts], towards.to(dtype)),
            torch.autograd.grad(slow[1], [x, *parts], towards, retain_graph=True),
            strict=True,
        ):
            assert distance(one, other) < 20 * torch.finfo(dtype).eps
    check_gradients(operator, parts, dense, x.detach(), refuses_second=refuses_second)
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        operator.apply(x)
        operator.joined(x, weight, bias)
    assert kept
    known = {value.data_ptr() for value in (x, weight, *tensors_of(operator))}
    new = [tuple(value.shape) for value in kept if value.data_ptr() not in known]
    assert not {(out, inputs), (inputs, out)} & set(new)


def check_gradients(
    operator: Delta, parts: tuple[Tensor, ...], dense: Tensor, x: Tensor, *, refuses_second: bool = False
) -> None:
    """Gradients for more tokens than are dealt with together; gradients of gradients, or that they are refused."""
    tokens = torch.randn(1100, x.shape[-1], dtype=x.dtype)
    direction = torch.randn(1100, dense.shape[0], dtype=x.dtype)
    found = torch.autograd.grad(operator.apply(tokens), parts, direction)
    expected = torch.autograd.grad(tokens @ dense.T, parts, direction, retain_graph=True)
    assert len(found) == len(parts) > 0
    for one, other in zip(found, expected, strict=True):
        assert distance(one, other) < 1e-12

    def twice(y: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad((y.sin() * direction[: len(x)]).sum(), [x, *parts], create_graph=True)
        return torch.autograd.grad(sum(directed(one) for one in first), [x, *parts], retain_graph=True)

    few = tokens[:5].requires_grad_()
    if refuses_second:
        with pytest.raises(PeanutError, match=r"^a gradient of the gradient"):
            twice(operator.apply(few), few)
        return
    for one, other in zip(twice(operator.apply(few), few), twice(few @ dense.T, few), strict=True):
        assert distance(one, other) < 1e-12


def test_laws() -> None:
    operator, x, _, _ = made()
    dense = 0.7 * (operator.u * operator.gain)[:, None] * operator.v
    check_laws(
        operator,
        [getattr(operator, name) for name in operator.trained if getattr(operator, name) is not None],
        dense,
        x,
    )


def test_a_trained_weight_gets_its_gradient() -> None:
    operator, x, weight, bias = made()
    weight.requires_grad_()
    direction = torch.randn(2, 3, 7, dtype=torch.float64)
    found = torch.autograd.grad(operator.joined(x, weight, bias), weight, direction)[0]
    assert distance(found, torch.einsum("abo,abi->oi", direction, x)) < 1e-14


def test_gradcheck() -> None:
    operator, x, weight, bias = made()

    def run(x: Tensor, u: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        again = Outer(u, operator.gain, 0.7, v)
        return again.apply(x), again.joined(x, weight, bias), again.rows(torch.tensor([1, 1, 3]))

    assert torch.autograd.gradcheck(run, (x, operator.u, operator.v, bias))


def test_nothing_is_kept_but_the_input_and_the_parts() -> None:
    operator, x, weight, bias = made()
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        operator.joined(x, weight, bias)
    known = {value.data_ptr() for value in (x, weight, operator.u, operator.v, operator.gain)}
    assert {value.data_ptr() for value in kept} == known


def test_sixteen_bits_do_not_round_a_small_change_away() -> None:
    weight, v = torch.ones(7, 5, dtype=torch.bfloat16), torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0])
    small = Outer(torch.full((7,), 1e-3), torch.ones(7), 1.0, v).to(torch.bfloat16)
    assert torch.equal(weight + small.dense(), weight)
    x = v.bfloat16()[None]
    assert distance(small.joined(x, weight, None), torch.full((1, 7), 4e-3)) < 0.01


def test_autocast() -> None:
    operator, x, _, _ = made(torch.float32)
    exact = operator.apply(x)
    directed(exact).backward()
    assert operator.u.grad is not None
    expected, operator.u.grad = operator.u.grad, None
    with torch.autocast("cpu", torch.bfloat16):
        y = operator.apply(x)
    assert y.dtype == torch.bfloat16
    assert distance(y, exact) < 0.03
    directed(y).backward()
    assert operator.u.grad.dtype == torch.float32
    assert distance(operator.u.grad, expected) < 0.06


def test_dense() -> None:
    matrix, x = torch.randn(7, 5, requires_grad=True), torch.randn(3, 5)
    operator = Dense(matrix)
    assert operator.shape == (7, 5)
    assert distance(operator.apply(x), x @ matrix.T) < 1e-6
    assert torch.equal(operator.rows(torch.tensor([[4, 0]])), matrix.T[torch.tensor([[4, 0]])])
    assert operator.dense() is matrix
    assert operator.to(torch.bfloat16).apply(x.bfloat16()).dtype == torch.bfloat16
