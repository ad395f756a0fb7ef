"""Diff pruning against its gates, their distribution and their price (arXiv 2012.07463)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peanut import PeanutError, PeftModel, get_peft_model
from peanut.methods.diff_pruning import DiffPruning, DiffPruningConfig
from peanut.operators.gated import Gated

from ..operators.test_built import check_laws
from ..support import Net, distance, one_thread, randomised  # noqa: F401

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Net returned no loss"),  # the tests add the price themselves
]
METHOD = DiffPruning()


def config(**options: Any) -> DiffPruningConfig:
    return DiffPruningConfig(target_modules=["layer"], **options)


def hard(logit: Tensor) -> Tensor:
    """min(1, max(0, s(r − l) + l)) for s = σ(logit), l = −1.5, r = 1.5."""
    s = 1 / (1 + torch.exp(-logit))
    return torch.minimum(torch.ones_like(s), torch.maximum(torch.zeros_like(s), 3 * s - 1.5))


def parameters_of(model: PeftModel) -> dict[str, Tensor]:
    values: dict[str, Tensor] = model.get_base_model().layer.values("default")
    return values


@pytest.mark.parametrize("structured", [False, True], ids=["", "structured"])
def test_operator(structured: bool) -> None:
    torch.manual_seed(1)
    values, logits = (torch.randn(6, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    group = torch.tensor([0.9], dtype=torch.float64, requires_grad=True) if structured else None
    dense = hard(logits) * values * (1 if group is None else hard(group))
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    parts = (values, logits) if group is None else (values, logits, group)
    check_laws(Gated(values, logits, group), parts, dense, x)


@pytest.mark.parametrize("structured", [False, True], ids=["", "structured"])
def test_evaluation_is_deterministic_and_the_formula(structured: bool) -> None:
    chosen = config(init_log_alpha=0.4, structured=structured)
    model = randomised(get_peft_model(Net(nn.Linear(8, 6).double()), chosen)).eval()
    values, layer = parameters_of(model), model.get_base_model().layer
    delta = hard(values["diff_log_alpha"]) * values["diff_w"]
    if structured:
        delta = delta * hard(values["diff_group_log_alpha"])
    x = torch.randn(3, 8, dtype=torch.float64)
    expected = x @ (layer.base_layer.weight + delta).T + layer.base_layer.bias
    assert distance(model(x), expected) < 1e-14
    assert torch.equal(model(x), model(x))
    assert 0 < (delta == 0).sum() < delta.numel()


def test_training_samples_the_gates() -> None:
    chosen = config(init_log_alpha=0.3)
    model = randomised(get_peft_model(Net(nn.Linear(8, 6).double()), chosen)).train()
    x = torch.randn(3, 8, dtype=torch.float64)
    assert distance(model(x), model(x)) > 0.01
    torch.manual_seed(7)
    first = model(x)
    torch.manual_seed(7)
    assert torch.equal(model(x), first)


@pytest.mark.parametrize("alpha", [-2.0, 0.0, 1.5])
def test_gates_follow_the_hard_concrete_distribution(alpha: float) -> None:
    torch.manual_seed(3)
    parameters = {"diff_w": torch.ones(300, 300), "diff_log_alpha": torch.full((300, 300), alpha)}
    sampled = METHOD.sampled(config(), parameters)
    assert sampled["diff_w"] is parameters["diff_w"]
    z = Gated(sampled["diff_w"], sampled["diff_log_alpha"]).dense()
    # With u uniform, z < c where log u − log(1 − u) + α < logit((c + 1.5)/3).
    for c in (0.0, 0.25, 0.5, 0.75, 0.999):
        share = (c + 1.5) / 3
        expected = 1 / (1 + math.exp(-(math.log(share / (1 - share)) - alpha)))
        assert abs((z <= c).double().mean().item() - expected) < 0.01
    price = METHOD.penalty(config(l0_weight=1 / z.numel()), [parameters])
    assert price is not None
    assert abs((z > 0).double().mean().item() - price.item()) < 0.01


def test_noise_is_finite() -> None:
    zeros = {"diff_w": torch.zeros(2000, 1000), "diff_log_alpha": torch.zeros(2000, 1000)}
    assert torch.isfinite(METHOD.sampled(config(), zeros)["diff_log_alpha"]).all()


def test_price() -> None:
    layers = [
        {"diff_log_alpha": torch.randn(n, 3), "diff_w": torch.randn(n, 3), "diff_group_log_alpha": torch.randn(1)}
        for n in (2, 5)
    ]
    plain = sum((1 / (1 + math.exp(-a))) for values in layers for a in values["diff_log_alpha"].flatten().tolist())
    price = METHOD.penalty(config(l0_weight=0.5), layers)
    assert price is not None
    assert abs(price.item() - 0.5 * plain) < 1e-5
    whole = sum(
        (1 / (1 + math.exp(-a))) * (1 / (1 + math.exp(-values["diff_group_log_alpha"].item())))
        for values in layers
        for a in values["diff_log_alpha"].flatten().tolist()
    )
    price = METHOD.penalty(config(l0_weight=0.5, structured=True), layers)
    assert price is not None
    assert abs(price.item() - 0.5 * whole) < 1e-5


@pytest.mark.parametrize("structured", [False, True], ids=["", "structured"])
def test_gradient_of_the_price(structured: bool) -> None:
    alpha, group = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((4, 3), (1,)))

    def price(alpha: Tensor, group: Tensor) -> Tensor:
        layer = {"diff_w": alpha, "diff_log_alpha": alpha, "diff_group_log_alpha": group}
        total = METHOD.penalty(config(l0_weight=0.5, structured=structured), [layer])
        assert total is not None
        return total

    assert torch.autograd.gradcheck(price, (alpha, group))


def test_start() -> None:
    values = parameters_of(get_peft_model(Net(nn.Linear(8, 6)), config(structured=True)))
    assert {suffix: (tuple(value.shape), value.unique().tolist()) for suffix, value in values.items()} == {
        "diff_w": ((6, 8), [0.0]),
        "diff_log_alpha": ((6, 8), [5.0]),
        "diff_group_log_alpha": ((1,), [5.0]),
    }
    assert parameters_of(get_peft_model(Net(nn.Linear(8, 6)), config())).keys() == {"diff_w", "diff_log_alpha"}


def test_a_price_closes_the_gates_of_what_is_not_needed() -> None:
    """Only the first input decides the target, so with a price on entries only its column stays open."""
    torch.manual_seed(2)
    base = nn.Linear(6, 1, bias=False)
    with torch.no_grad():
        base.weight.zero_()
    chosen = config(l0_weight=0.02, init_log_alpha=1.0)
    model = get_peft_model(Net(base), chosen).train()
    values = parameters_of(model)
    optimizer = torch.optim.Adam([value for value in model.parameters() if value.requires_grad], lr=0.05)
    for _ in range(400):
        x = torch.randn(64, 6)
        price = METHOD.penalty(chosen, [values])
        assert price is not None
        loss = (model(x) - 2 * x[:, :1]).square().mean() + price
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    delta = model.eval().get_base_model().layer.delta("default")[0]
    assert abs(delta[0] - 2) < 0.3
    assert delta[1:].abs().max() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"l0_weight": math.nan}, "l0_weight=nan; expected a finite number"),
        ({"l0_weight": -1.0}, "l0_weight=-1.0; expected a number of at least 0"),
        ({"init_log_alpha": math.inf}, "init_log_alpha=inf; expected a finite number"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PeanutError, match=message):
        DiffPruningConfig(**options)
