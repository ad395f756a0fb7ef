"""The operator of DoRA against its dense form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peanut.operators.magnitude import MagnitudeDirection

from ..support import directed, distance, one_thread, same_bits  # noqa: F401


def random_operator(
    out: int = 5, inputs: int = 7, r: int = 2, dtype: torch.dtype = torch.float64
) -> MagnitudeDirection:
    generator = torch.Generator().manual_seed(3)
    weight, up, down = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((out, inputs), (out, r), (r, inputs))
    )
    gain = torch.rand(out, generator=generator, dtype=torch.float64) + 0.5
    return MagnitudeDirection(weight, up, down, 0.7, gain if dtype == torch.float64 else gain.float(), whole=True)


def leaves(operator: MagnitudeDirection) -> list[Tensor]:
    return [value.requires_grad_() for value in (operator.up, operator.down, operator.gain)]


def written_out(operator: MagnitudeDirection) -> Tensor:
    W = operator.weight
    return torch.diag(operator.gain) @ (W + operator.scaling * operator.up @ operator.down) - W


def test_dense_is_the_formula() -> None:
    operator = random_operator()
    assert operator.shape == (5, 7)
    assert operator.factors() is None
    assert distance(operator.dense(), written_out(operator)) < 1e-14


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (2, 9, 7), (0, 7)], ids=str)  # (2, 9): W' is made
def test_products_are_the_dense_form_forward_and_backward(shape: tuple[int, ...], bias: bool) -> None:
    operator = random_operator()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    b = torch.randn(5, dtype=torch.float64, requires_grad=True) if bias else None
    W, trained = operator.weight, leaves(operator)
    dense = written_out(operator)
    for fast, slow, wanted in (
        (operator.apply(x), x @ dense.T, [x, *trained]),
        (operator.beside(x, x @ W.T), x @ dense.T, [x, *trained]),
        (operator.joined(x, W, b), F.linear(x, W + dense, b), [x, *trained, *([b] if b is not None else [])]),
    ):
        assert fast.shape == slow.shape
        if not x.numel():
            continue
        assert distance(fast, slow) < 1e-13
        direction = torch.randn_like(slow)
        found = torch.autograd.grad(fast, wanted, direction)
        expected = torch.autograd.grad(slow, wanted, direction, retain_graph=True)
        assert all(distance(one, other) < 1e-13 for one, other in zip(found, expected, strict=True))


def test_an_empty_batch_has_gradients_of_zero() -> None:
    operator = random_operator()
    trained = leaves(operator)
    operator.joined(torch.zeros(0, 7, dtype=torch.float64), operator.weight, None).sum().backward()
    assert trained
    assert all(value.grad is not None and not value.grad.any() for value in trained)


@pytest.mark.parametrize("tokens", [3, 8])
def test_gradcheck(tokens: int) -> None:
    operator = random_operator()
    x = torch.randn(tokens, 7, dtype=torch.float64, requires_grad=True)
    b = torch.randn(5, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 6], [6, 2]])

    def run(x: Tensor, b: Tensor, up: Tensor, down: Tensor, gain: Tensor) -> tuple[Tensor, ...]:
        own = MagnitudeDirection(operator.weight, up, down, 0.7, gain, whole=True)
        return own.apply(x), own.joined(x, own.weight, b), own.rows(ids)

    assert torch.autograd.gradcheck(run, (x, b, *leaves(operator)))
    if tokens == 8:
        own = [value.detach().requires_grad_() for value in (x, b, *leaves(operator))]
        joined = lambda *values: run(*values)[1]  # noqa: E731
        assert torch.autograd.gradgradcheck(joined, own)


def test_rows_are_the_dense_form_forward_and_backward() -> None:
    operator, ids = random_operator(), torch.tensor([[0, 6, 6], [2, 1, 6]])
    trained = leaves(operator)
    fast, slow = operator.rows(ids), written_out(operator).T[ids]
    assert distance(fast, slow) < 1e-13
    direction = torch.randn_like(slow)
    for found, expected in zip(
        torch.autograd.grad(fast, trained, direction), torch.autograd.grad(slow, trained, direction), strict=True
    ):
        assert distance(found, expected) < 1e-13


def test_a_weight_with_something_merged_into_it_is_used_as_given() -> None:
    operator, other = random_operator(), torch.randn(5, 7, dtype=torch.float64)
    x, b = torch.randn(3, 7, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    merged = operator.weight + other
    apart = MagnitudeDirection(operator.weight, operator.up, operator.down, operator.scaling, operator.gain)
    assert distance(apart.joined(x, merged, b), x @ (merged + written_out(operator)).T + b) < 1e-13


def test_a_gain_of_one_over_nothing_changes_no_bit() -> None:
    weight, x, b = torch.randn(300, 700), torch.randn(900, 700), torch.randn(300)
    operator = MagnitudeDirection(weight, torch.zeros(300, 4), torch.randn(4, 700), 2.0, torch.ones(300), whole=True)
    for some in (x, x[:9], x[0]):  # of many tokens W' is made, of few not
        assert same_bits(operator.joined(some, weight, b), F.linear(some, weight, b))
        assert same_bits(operator.for_inference(torch.float32).joined(some, weight, b), F.linear(some, weight, b))
    assert not operator.apply(x).any()
    assert not operator.dense().any()
    assert not operator.rows(torch.tensor([4, 699])).any()


def test_16_bits_keep_a_gain_that_they_cannot_write() -> None:
    operator = random_operator(dtype=torch.float32)
    gain = torch.full((5,), 1.001)
    small = MagnitudeDirection(operator.weight, torch.zeros(5, 2), operator.down, 1.0, gain, whole=True).to(
        torch.bfloat16
    )
    x = torch.randn(3, 7)
    expected = 0.001 * F.linear(x, operator.weight)
    assert gain.bfloat16().eq(1).all()
    assert small.gain.dtype == torch.float32
    assert small.apply(x.bfloat16()).dtype == small.dense().dtype == torch.bfloat16
    assert distance(small.apply(x.bfloat16()), expected) < 0.02
    assert distance(small.dense(), 0.001 * operator.weight) < 0.01


def kept_by(run: Callable[[], Tensor]) -> list[Tensor]:
    """What a computation keeps for its backward."""
    kept: list[Tensor] = []

    def note(value: Tensor) -> Tensor:
        kept.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        run()
    return kept


def test_the_backward_keeps_the_input_and_what_the_operator_has() -> None:
    operator = random_operator()
    leaves(operator)
    x = torch.randn(50, 7, dtype=torch.float64, requires_grad=True)
    own = {value.data_ptr() for value in (operator.weight, operator.up, operator.down, operator.gain)}
    for run, given in (
        (lambda: operator.joined(x, operator.weight, None), x),
        (lambda: operator.apply(x), x),
    ):
        assert {value.data_ptr() for value in kept_by(run)} == own | {given.data_ptr()}


def test_a_gain_of_zero_has_its_gradient() -> None:
    operator = random_operator()
    operator.gain[2] = 0
    x, trained = torch.randn(8, 7, dtype=torch.float64), leaves(operator)
    found = torch.autograd.grad(directed(operator.joined(x, operator.weight, None)), trained)
    expected = torch.autograd.grad(directed(x @ (operator.weight + written_out(operator)).T), trained)
    assert len(found) == len(trained) > 0
    assert all(distance(one, other) < 1e-13 for one, other in zip(found, expected, strict=True))


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-13), (torch.bfloat16, 0.02)], ids=str)
@pytest.mark.parametrize("whole", [True, False])
def test_settled_answers_the_same(dtype: torch.dtype, near: float, whole: bool) -> None:
    operator = replace(random_operator(), whole=whole)
    settled, dense = operator.for_inference(dtype), written_out(operator)
    x, b, ids = torch.randn(2, 3, 7, dtype=torch.float64), torch.randn(5, dtype=torch.float64), torch.tensor([[0, 6]])
    given, bias = operator.weight.to(dtype) * (1 if whole else 2), b.to(dtype)
    for found, expected in (
        (settled.apply(x.to(dtype)), x @ dense.T),
        (settled.joined(x.to(dtype), given, bias), x @ (given.double() + dense).T + b),
        (settled.joined(x[0, 0].to(dtype), given, None), x[0, 0] @ (given.double() + dense).T),
        (settled.rows(ids), dense.T[ids]),
        (settled.dense(), dense),
        (settled.to(dtype).apply(x.to(dtype)), x @ dense.T),
    ):
        assert found.shape == expected.shape
        assert distance(found, expected) < near
    assert settled.shape == (5, 7)
    assert settled.factors() is None


def test_autocast_computes_in_its_own_dtype() -> None:
    operator = random_operator(dtype=torch.float32)
    trained, x = leaves(operator), torch.randn(3, 7)
    exact = operator.apply(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = operator.apply(x)
    assert y.dtype == torch.bfloat16
    assert distance(y, exact) < 0.03
    directed(y).backward()
    assert all(value.grad is not None and value.grad.dtype == torch.float32 for value in trained)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("tokens", [3, 8])
def test_compiles_in_one_graph(tokens: int) -> None:
    torch._dynamo.reset()
    operator = random_operator(dtype=torch.float32)
    trained, x, ids = leaves(operator), torch.randn(tokens, 7), torch.tensor([0, 6])

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        return operator.joined(x, operator.weight, None), operator.rows(ids)

    runs = run, torch.compile(run, backend="aot_eager", fullgraph=True)
    found, expected = (torch.autograd.grad(sum(map(directed, each(x))), trained) for each in runs)
    assert len(found) == len(trained) > 0
    assert all(distance(one, other) < 1e-5 for one, other in zip(found, expected, strict=True))
