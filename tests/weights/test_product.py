"""W Aᵀ is made no more often than A changes, and never not made again when it has changed, however that was done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peanut import PeanutConfig, get_peft_model
from peanut.lab.measure import saved_bytes
from peanut.weights import product
from peanut.weights.product import Products

from ..support import Net, directed, distance, gradients, one_thread, randomised  # noqa: F401

WIDE, NARROW, R, TOKENS = 40, 24, 3, 5


def reads() -> Any:
    """Counts how often a product is made."""
    return mock.patch.object(product, "product", wraps=product.product)


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(NARROW, WIDE), nn.Tanh(), nn.Linear(WIDE, NARROW)).double()
    made = get_peft_model(net, PeanutConfig(r=R, depth=1, act_fn="tanh", target_modules=["0", "2"]))
    return randomised(made.double()).train()


def batches() -> Iterator[Tensor]:
    torch.manual_seed(1)
    while True:
        yield torch.randn(TOKENS, NARROW, dtype=torch.float64)


def test_it_is_read_once_for_all_batches_whose_gradients_add_up(model: Any) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    given = batches()
    for _ in range(3):
        with reads() as made:
            for _ in range(4):
                directed(model(next(given))).backward()
        assert made.call_count == 2  # one a layer
        optimizer.step()
        optimizer.zero_grad()


def test_gradients_that_add_up_are_those_of_one_batch(model: Any) -> None:
    whole = torch.cat([x for x, _ in zip(batches(), range(4), strict=False)])
    direction = torch.randn_like(whole)
    for x, part in zip(whole.split(TOKENS), direction.split(TOKENS), strict=True):
        model(x).backward(part)
    found = gradients(model)
    model.zero_grad()
    model(whole).backward(direction)
    assert found.keys() == gradients(model).keys() > set()
    assert all(distance(found[name], grad) < 1e-12 for name, grad in gradients(model).items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_it_is_not_read_again_where_a_block_runs_again(model: Any, reentrant: bool) -> None:
    x = next(batches()).requires_grad_()
    with reads() as made:
        directed(checkpoint(model, x, use_reentrant=reentrant)).backward()
    assert made.call_count == 2
    found = gradients(model)
    model.zero_grad()
    directed(model(x)).backward()
    assert found.keys() == gradients(model).keys() > set()
    assert all(torch.equal(found[name], grad) for name, grad in gradients(model).items())


def by_hand(parameter: nn.Parameter) -> None:
    parameter.data -= 0.1 * parameter.grad  # type: ignore[operator] # behind the version counter's back
    parameter.grad = None


def by_hand_zeroed(parameter: nn.Parameter) -> None:
    parameter.data -= 0.1 * parameter.grad  # type: ignore[operator]
    parameter.grad.zero_()  # type: ignore[union-attr]


def in_place(parameter: nn.Parameter) -> None:
    with torch.no_grad():
        parameter.add_(0.1)


def clipped(parameter: nn.Parameter) -> None:
    parameter.data.mul_(0.5)
    nn.utils.clip_grad_norm_([parameter], 0.01)


def replaced(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data * 0.5


@pytest.mark.parametrize("change", [by_hand, by_hand_zeroed, in_place, clipped, replaced])
@pytest.mark.parametrize("batches_before", [1, 2])
def test_whatever_changes_a_parameter_is_seen(
    model: Any, change: Callable[[nn.Parameter], None], batches_before: int
) -> None:
    given = batches()
    for _ in range(batches_before):
        directed(model(next(given))).backward()
    for parameter in model.parameters():
        if parameter.requires_grad:
            change(parameter)
    x = next(given)
    expected = model.eval()(x).detach()
    assert torch.equal(model.train()(x), expected)


def test_a_change_between_two_forwards_without_a_backward_is_seen(model: Any) -> None:
    x = next(batches())
    before = model(x)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(0.5)  # as a gradient by differences does
    after = model(x)
    assert distance(after, before) > 1e-3
    assert torch.equal(after, model.eval()(x))


@pytest.mark.parametrize("view", [True, False], ids=["kept", "read again"])
def test_its_gradient_is_right_twice(view: bool) -> None:
    torch.manual_seed(0)
    matrix, products = torch.randn(WIDE, NARROW, dtype=torch.float64), Products()
    A = torch.randn(R, NARROW, dtype=torch.float64, requires_grad=True)

    def run(A: Tensor) -> Tensor:
        products.forget()
        return products.of(matrix, lambda: matrix, A, view=view, transposed=False).tanh()

    assert torch.autograd.gradcheck(run, (A,))
    assert torch.autograd.gradgradcheck(run, (A,))


@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "made"])
def test_what_is_made_of_codes_is_not_kept(leaf: bool) -> None:
    torch.manual_seed(0)
    codes, products = torch.randint(0, 16, (WIDE, NARROW), dtype=torch.uint8), Products()
    A = torch.randn(R, NARROW, dtype=torch.float64, requires_grad=True)
    given = A if leaf else A * 1.0

    def read() -> Tensor:
        return codes.double() / 8 - 1

    assert saved_bytes(lambda: products.of(codes, read, given, view=False, transposed=False), [], [A]) == 0
    found = products.of(codes, read, given, view=False, transposed=False)
    assert distance(found, read() @ A.T) < 1e-14
    (grad,) = torch.autograd.grad(directed(found), A)
    (expected,) = torch.autograd.grad(directed(read() @ A.T), A)
    assert distance(grad, expected) < 1e-13


def test_a_weight_that_is_trained_after_all_gets_its_gradient(model: Any) -> None:
    """As someone who unfreezes the base asks for."""
    x = next(batches())
    layer = model.base_model.model[0]
    layer.base_layer.weight.requires_grad_()
    for _ in range(2):  # what was made before it was unfrozen is not given again
        model.zero_grad()
        directed(model(x)).backward()
    found = layer.base_layer.weight.grad
    eps, direction = 1e-6, torch.randn_like(found)
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            layer.base_layer.weight.add_(direction, alpha=sign * eps)
            ends.append(directed(model(x)))
            layer.base_layer.weight.sub_(direction, alpha=sign * eps)
    assert distance((found * direction).sum(), (ends[0] - ends[1]) / (2 * eps)) < 1e-6


def test_eval_lets_go_of_it(model: Any) -> None:
    model(next(batches()))
    held = [layer.frozen.products for layer in (model.base_model.model[0], model.base_model.model[2])]
    assert all(products._made for products in held)
    model.eval()
    assert not any(products._made for products in held)
