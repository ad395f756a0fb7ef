"""LoKr against the Kronecker product that defines it (arXiv 2309.14859)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from peanut import PeanutError, get_peft_model
from peanut.methods.lokr import LoKrConfig, divided
from peanut.operators.kronecker import Kronecker

from ..support import Net, directed, distance, one_thread, randomised  # noqa: F401


def config(**options: Any) -> LoKrConfig:
    return LoKrConfig(target_modules=["layer"], **options)


@pytest.mark.parametrize(("r", "both"), [(1, False), (1, True), (9, False)])
def test_the_update_is_a_kronecker_product(r: int, both: bool) -> None:
    options = {"r": r, "alpha": 3, "decompose_both": both}
    model = randomised(get_peft_model(Net(nn.Linear(24, 30).double()), config(**options)))
    layer = model.get_base_model().layer
    values = layer.values("default")
    factors = []
    for name in ("lokr_w1", "lokr_w2"):
        whole = values.get(name)
        factors.append(values[f"{name}_a"] @ values[f"{name}_b"] if whole is None else whole)
    assert [tuple(each.shape) for each in factors] == [(5, 4), (6, 6)]
    assert ("lokr_w1_a" in values, "lokr_w2_a" in values) == (both, r == 1)
    expected = torch.empty(30, 24, dtype=torch.float64)
    for o in range(30):
        for i in range(24):
            expected[o, i] = 3 / r * factors[0][o // 6, i // 6] * factors[1][o % 6, i % 6]
    assert distance(layer.delta("default"), expected) < 1e-14


@pytest.mark.parametrize("down", [False, True])
def test_the_operator_equals_its_matrix_forward_and_backward(down: bool) -> None:
    torch.manual_seed(0)
    shapes = [(4, 3), (5, 2), (2, 7)] if down else [(4, 3), (5, 7)]
    parts = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    delta = Kronecker(*parts, **({} if down else {"down": None}), scaling=0.3)
    x, ids = torch.randn(2, 6, 21, dtype=torch.float64, requires_grad=True), torch.tensor([[0, 20], [7, 6]])
    matrix = 0.3 * torch.kron(parts[0], parts[1] @ parts[2] if down else parts[1])
    assert delta.shape == (20, 21)
    for found, expected in ((delta.apply(x), x @ matrix.T), (delta.rows(ids), matrix.T[ids]), (delta.dense(), matrix)):
        assert distance(found, expected) < 1e-13
        grads = [torch.autograd.grad(directed(y), parts, retain_graph=True) for y in (found, expected)]
        assert all(distance(one, other) < 1e-12 for one, other in zip(*grads, strict=True))
    assert torch.autograd.gradgradcheck(lambda x, *own: Kronecker(*own).apply(x), (x, *parts), fast_mode=True)
    factors = delta.factors()
    assert (factors is None) == (not down)  # of full rank there are none
    assert factors is None or distance(factors[0] @ factors[1], matrix) < 1e-13


@pytest.mark.parametrize("size", [1, 2, 7, 12, 30, 64, 127, 768, 4096])
@pytest.mark.parametrize("factor", [-1, 2, 4, 5, 16])
def test_sizes_are_divided_as_hugging_face_peft_does(size: int, factor: int) -> None:
    from peft.tuners.lokr.layer import factorization

    assert divided(size, factor) == factorization(size, factor)


@pytest.mark.parametrize(("scaled", "rank", "module"), [(False, 0.5, 0.0), (True, 0.5, 0.0), (False, 0.0, 0.5)])
def test_dropout_leaves_out_outputs_or_the_whole_update(scaled: bool, rank: float, module: float) -> None:
    options = {"rank_dropout": rank, "rank_dropout_scale": scaled, "module_dropout": module}
    model = randomised(get_peft_model(Net(nn.Linear(24, 40)), config(**options)))
    x = torch.randn(1, 24)
    plain = model.get_base_model().layer.base_layer(x)
    full = model.eval()(x) - plain
    shares = []
    for _ in range(200):
        share = ((model.train()(x) - plain) / full).squeeze(0)
        one = share.max()
        assert torch.allclose(share, torch.where(share > one / 2, one, 0.0), atol=1e-3)
        shares.append(share.round(decimals=3))
    kept = torch.stack(shares)
    assert abs(float((kept > 0.5).float().mean()) - (1 - (rank or module))) < 0.1
    if scaled:
        assert torch.allclose(kept.mean(1), torch.ones(200), atol=1e-2)
    if module:
        assert set(kept.unique().tolist()) == {0.0, 1.0}
        assert all(len(each.unique()) == 1 for each in kept)


@pytest.mark.parametrize("module", [0.0, 0.5])
@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_where_every_output_is_dropped_the_layer_is_the_base_s(outputs: int, module: float) -> None:
    """Nothing is left to scale by its share."""
    options = {"r": 2, "rank_dropout": 0.8, "rank_dropout_scale": True, "module_dropout": module}
    model = randomised(get_peft_model(Net(nn.Linear(8, outputs)), config(**options))).train()
    x, dropped = torch.randn(3, 8), 0
    plain = model.get_base_model().layer.base_layer(x)
    for _ in range(40):
        model.zero_grad()
        y = model(x)
        directed(y).backward()
        assert torch.isfinite(y).all()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
        dropped += torch.equal(y, plain)
    assert 0 < dropped < 40


def test_values_out_of_range_are_refused() -> None:
    for options in ({"r": 0}, {"rank_dropout": 1.0}, {"decompose_factor": 0}, {"init_weights": "pissa"}):
        with pytest.raises(PeanutError):
            config(**options)
