"""Diff pruning against its gates, their distribution and their price (arXiv 2012.07463)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peanut import PeanutError, PeftModel, get_peft_model
from peanut.lab.measure import saved_bytes
from peanut.methods.diff_pruning import DiffPruning, DiffPruningConfig
from peanut.operators import hard_concrete
from peanut.operators.hard_concrete import HardConcrete, logistic

from ..operators.test_materialised import check_laws
from ..support import Net, directed, distance, one_thread, randomised  # noqa: F401

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


def test_a_start_that_is_a_whole_number() -> None:
    model = get_peft_model(Net(nn.Linear(4, 4)), config(init_log_alpha=5, structured=True))
    assert all(value.is_floating_point() for value in parameters_of(model).values() if value.requires_grad)
    assert parameters_of(model)["diff_log_alpha"].unique().tolist() == [5.0]


@pytest.mark.parametrize("structured", [False, True], ids=["", "structured"])
def test_operator(structured: bool) -> None:
    torch.manual_seed(1)
    values, logits = (torch.randn(6, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    group = torch.tensor([0.9], dtype=torch.float64, requires_grad=True) if structured else None
    dense = hard(logits) * values * (1 if group is None else hard(group))
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    parts = (values, logits) if group is None else (values, logits, group)
    check_laws(HardConcrete(values, logits, group), parts, dense, x)


def noise_of(seed: int, shape: tuple[int, int], rows: int) -> Tensor:
    """log u − log(1 − u), drawn for so many rows at a time: four numbers u = (k + ½)/2¹⁶ of each 64 bits."""
    draws, parts = np.random.Generator(np.random.SFC64(seed)), []
    for first in range(0, shape[0], rows):
        count = min(rows, shape[0] - first) * shape[1]
        k = draws.integers(-(2**63), 2**63, math.ceil(count / 4)).view(np.int16)[:count].astype(np.float64) + 2**15
        u = torch.from_numpy((k + 0.5) / 2**16)
        parts.append((torch.log(u) - torch.log(1 - u)).view(-1, shape[1]))
    return torch.cat(parts)


@pytest.mark.parametrize("structured", [False, True], ids=["", "structured"])
@pytest.mark.parametrize("span", [1, 16, 1000])
def test_noise_is_drawn_from_a_seed_whenever_it_is_needed(
    structured: bool, span: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hard_concrete, "SPAN", span)
    torch.manual_seed(1)
    values, logits = (torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    group = torch.tensor([0.9], dtype=torch.float64, requires_grad=True) if structured else None
    dense = hard(logits + noise_of(11, (5, 7), max(1, span // 7))) * values * (1 if group is None else hard(group))
    x = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    parts = (values, logits) if group is None else (values, logits, group)
    operator = HardConcrete(values, logits, group, seed=11)
    check_laws(operator, parts, dense, x, compiled=False)
    with torch.no_grad():
        assert distance(operator.dense(), dense) < 1e-14
        assert distance(operator.onto(torch.ones_like(dense)), 1 + dense) < 1e-14


def test_a_gate_exactly_at_its_cut_has_a_gradient() -> None:
    values, logits = torch.ones(2, 3, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    x, W = torch.ones(1, 3, requires_grad=True), torch.zeros(2, 3)
    HardConcrete(values, logits).joined(x, W, None).sum().backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.full((2, 3), 0.75))  # (r − l) σ' (0)


@pytest.mark.parametrize("structured", [False, True], ids=["", "structured"])
def test_of_the_gates_only_their_seed_is_kept(structured: bool) -> None:
    model = randomised(get_peft_model(Net(nn.Linear(80, 60)), config(structured=structured))).train()
    inner = model.get_base_model()
    x = torch.randn(3, 80, requires_grad=True)
    held = [*model.parameters(), *model.buffers()]
    assert saved_bytes(lambda: inner(x), [inner.layer], held) < 100


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_noise(reentrant: bool) -> None:
    model = randomised(get_peft_model(Net(nn.Linear(8, 6)), config(init_log_alpha=0.3))).train()
    inner, trained = model.get_base_model(), [value for value in model.parameters() if value.requires_grad]
    x = torch.randn(3, 8, requires_grad=True)
    found = []
    for run in (inner, lambda x: checkpoint(inner, x, use_reentrant=reentrant)):
        torch.manual_seed(5)
        directed(run(x)).backward()
        found.append([value.grad for value in trained])
        for value in trained:
            value.grad = None
    assert trained
    for one, other in zip(*found, strict=True):
        assert one is not None and other is not None  # noqa: PT018
        assert one.abs().max() > 0
        assert torch.equal(one, other)


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
    model = get_peft_model(Net(nn.Linear(300, 300)), config())
    with torch.no_grad():
        for suffix, value in parameters_of(model).items():
            value.copy_(parameters[suffix])
    delta = model.get_base_model().layer.change("default", sample=True).delta
    assert delta is not None
    z = delta.dense().detach()
    # With u uniform, z < c where log u − log(1 − u) + α < logit((c + 1.5)/3).
    for c in (0.0, 0.25, 0.5, 0.75, 0.999):
        share = (c + 1.5) / 3
        expected = 1 / (1 + math.exp(-(math.log(share / (1 - share)) - alpha)))
        assert abs((z <= c).double().mean().item() - expected) < 0.01
    price = METHOD.penalty(config(l0_weight=1 / z.numel()), [parameters])
    assert price is not None
    assert abs((z > 0).double().mean().item() - price.item()) < 0.01


def test_noise_is_finite() -> None:
    """Each of the 2¹⁶ numbers comes about here, and neighbours are not alike."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        noise = logistic(torch.zeros(2000, 1001, dtype=dtype), np.random.Generator(np.random.SFC64(0)))
        assert noise.dtype == dtype
        assert torch.isfinite(noise).all()
    for lag in range(1, 9):
        assert abs((noise.flatten()[lag:] * noise.flatten()[:-lag]).float().mean()) < 0.02
    drawn = logistic(torch.zeros(2000, 1001), torch.Generator().manual_seed(0))
    assert drawn.unique().numel() == 2**16
    assert abs(drawn.double().var().item() - math.pi**2 / 3) < 0.02


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
        ({"l0_weight": -1.0}, "l0_weight=-1.0; expected a finite number of at least 0"),
        ({"init_log_alpha": math.inf}, "init_log_alpha=inf; expected a finite number"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PeanutError, match=message):
        DiffPruningConfig(**options)
