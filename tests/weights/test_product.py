"""W Aᵀ: made from its factors as they are now, whatever was done to them; of codes it keeps no numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peanut import PeanutConfig, get_peft_model
from peanut.lab.measure import saved_bytes
from peanut.operators.delta import recomputed
from peanut.weights.frozen import product

from ..support import directed, distance, one_thread, randomised  # noqa: F401

WIDE, NARROW, R, TOKENS = 40, 24, 3, 5


@pytest.mark.parametrize("codes", [True, False], ids=["read again", "kept"])
def test_its_gradient_is_right_twice(codes: bool) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(WIDE, NARROW, dtype=torch.float64)
    A = torch.randn(R, NARROW, dtype=torch.float64, requires_grad=True)

    def run(A: Tensor) -> Tensor:
        return (recomputed(lambda A: product(matrix, A), A) if codes else product(matrix, A)).tanh()

    assert torch.equal(run(A), (matrix @ A.T).tanh())
    assert torch.autograd.gradcheck(run, (A,))
    assert torch.autograd.gradgradcheck(run, (A,))


@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "made"])
def test_what_is_made_of_codes_is_not_kept(leaf: bool) -> None:
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (WIDE, NARROW), dtype=torch.uint8)
    A = torch.randn(R, NARROW, dtype=torch.float64, requires_grad=True)
    given = A if leaf else A * 1.0

    def read() -> Tensor:
        return codes.double() / 8 - 1

    assert saved_bytes(lambda: recomputed(lambda A: product(read(), A), given), [], [A]) == (0 if leaf else A.nbytes)
    found = recomputed(lambda A: product(read(), A), given)
    assert distance(found, read() @ A.T) < 1e-14
    direction = torch.randn_like(found)
    (grad,) = torch.autograd.grad(found, A, direction)
    (expected,) = torch.autograd.grad(read() @ A.T, A, direction)
    assert distance(grad, expected) < 1e-13


def test_a_weight_that_is_trained_after_all_gets_its_gradient() -> None:
    """As someone who unfreezes the base asks for."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(NARROW, WIDE), nn.Tanh(), nn.Linear(WIDE, NARROW)).double()
    config = PeanutConfig(r=R, depth=1, act_fn="tanh", target_modules=["0", "2"])
    model: Any = randomised(get_peft_model(net, config).double()).train()
    x = torch.randn(TOKENS, NARROW, dtype=torch.float64)
    layer = model.base_model.model[0]
    layer.base_layer.weight.requires_grad_()
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
