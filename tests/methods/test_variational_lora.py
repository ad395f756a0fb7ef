"""Variational LoRA: its mean, its samples, and its penalty against integrals (arXiv 2406.11675, 1505.05424)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peanut
from peanut import PeanutError, get_peft_model
from peanut.methods.variational_lora import VariationalLora, VariationalLoraConfig, divergence_bound

from ..support import Net, distance, one_thread, randomised, same_bits  # noqa: F401
from .pairs import Pair, adapted, tensors, through

pytestmark = pytest.mark.filterwarnings("ignore:Pair returned no loss")
X = torch.randn(3, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
METHOD = VariationalLora()


def config(**options: Any) -> VariationalLoraConfig:
    return VariationalLoraConfig(target_modules=["a", "b"], **{"vb_r": 4} | options)


@pytest.mark.parametrize(
    ("options", "scaling"),
    [
        ({}, 2.0),
        ({"lora_alpha": 6, "use_rslora": True}, 3.0),
        ({"rank_pattern": {"a": 2, "b": 2}}, 4.0),
        ({"alpha_pattern": {".*": 2}}, 0.5),
    ],
)
def test_evaluation_is_the_formula_at_the_mean(options: dict[str, Any], scaling: float) -> None:
    model = adapted(config(**options))
    t = tensors(model)
    deltas = {name: scaling * t[f"{name}.lora_B.weight"] @ t[f"{name}.lora_A.weight"] for name in "ab"}
    assert t["a.lora_A.rho"].shape == t["a.lora_A.weight"].shape == (options.get("rank_pattern", {"a": 4})["a"], 12)
    assert distance(through(deltas, X), Pair().double()(X)) > 0.05
    assert distance(model(X), through(deltas, X)) < 1e-12
    assert same_bits(model(X), model(X))


def test_training_draws_the_posterior() -> None:
    values = {"lora_A.weight": torch.randn(2, 3).double(), "lora_A.rho": torch.tensor([[-9.0, -1, 2]] * 2).double()}
    torch.manual_seed(0)
    draws = torch.stack([METHOD.sampled(config(), values)["lora_A.weight"] for _ in range(20_000)])
    sigma = torch.log1p(torch.exp(values["lora_A.rho"]))
    assert ((draws.mean(0) - values["lora_A.weight"]).abs() < 5 * sigma / math.sqrt(20_000)).all()
    assert (draws.std(0) / sigma - 1).abs().max() < 0.03
    standard = (draws - values["lora_A.weight"]) / sigma
    assert abs(float(standard.pow(4).mean()) - 3) < 0.1  # as of a Gaussian
    assert abs(float((standard[:, 0, 0] * standard[:, 1, 0]).mean())) < 0.04  # each entry on its own


def test_outputs_spread_in_training_as_the_factors_do() -> None:
    model = randomised(get_peft_model(Net(nn.Linear(5, 3).double()), VariationalLoraConfig(target_modules=["layer"])))
    layer, x = model.get_base_model().layer, torch.randn(5).double()
    t = {suffix: value.detach() for suffix, value in layer.values("default").items()}
    mean = model.eval()(x)
    torch.manual_seed(0)
    layer.train()
    draws = torch.stack([layer(x).detach() for _ in range(20_000)])
    hidden = (F.softplus(t["lora_A.rho"]) ** 2 * x**2).sum(1)
    variance = (t["lora_B.weight"] ** 2 * hidden).sum(1)  # of B A x, the scaling being 8/8
    assert (draws.var(0) / variance - 1).abs().max() < 0.05
    assert ((draws.mean(0) - mean).abs() < 5 * (variance / 20_000).sqrt()).all()


@pytest.mark.parametrize("sigma", [1e-5, 0.01, 1000.0])
def test_start_is_silent_also_when_sampled(sigma: float) -> None:
    model = get_peft_model(Pair(), config(init_sigma=sigma))
    assert same_bits(model.train()(X.float()), Pair()(X.float()))
    t = tensors(model)
    assert distance(F.softplus(t["a.lora_A.rho"]), torch.full((4, 12), sigma)) < 1e-5
    assert t["a.lora_A.weight"].abs().sum() > 0


def integral(mean: float, sigma: float, pi: float, prior: tuple[float, float]) -> float:
    """KL(N(mean, sigma²) ‖ π N(0, σ₁²) + (1 − π) N(0, σ₂²)) by the trapezoidal rule."""
    w = torch.linspace(mean - 12 * sigma, mean + 12 * sigma, 200_001, dtype=torch.float64)
    q, *parts = (
        -0.5 * (w - center) ** 2 / deviation**2 - math.log(deviation * math.sqrt(2 * math.pi))
        for center, deviation in ((mean, sigma), (0.0, prior[0]), (0.0, prior[1]))
    )
    weighted = [math.log(weight) + part for weight, part in zip((pi, 1 - pi), parts, strict=True) if weight]
    p = torch.logsumexp(torch.stack(weighted), 0)
    return float(torch.trapezoid(q.exp() * (q - p), w))


def bound(mean: float, sigma: float, pi: float, prior: tuple[float, float]) -> float:
    values = [torch.tensor(value, dtype=torch.float64) for value in (mean, sigma)]
    return float(divergence_bound(values[0], values[1], pi, prior))


GRID = [(mean, sigma) for mean in (0.0, 0.004, -0.05, 0.7) for sigma in (0.0005, 0.0025, 0.03, 0.5)]


@pytest.mark.parametrize(("pi", "prior"), [(1.0, (0.2, 0.0025)), (0.0, (0.2, 0.0025)), (0.3, (0.1, 0.1))])
def test_penalty_is_the_divergence_where_the_prior_is_one_gaussian(pi: float, prior: tuple[float, float]) -> None:
    for mean, sigma in GRID:
        found = bound(mean, sigma, pi, prior)
        assert abs(found - integral(mean, sigma, pi, prior)) < 1e-6 * max(1.0, abs(found))


@pytest.mark.parametrize("pi", [0.1, 0.5, 0.9])
def test_penalty_bounds_the_divergence_from_above(pi: float) -> None:
    prior = (0.2, 0.0025)
    for mean, sigma in GRID:
        exact = integral(mean, sigma, pi, prior)
        found = bound(mean, sigma, pi, prior)
        alone = [integral(mean, sigma, one, prior) for one in (1.0, 0.0)]
        assert exact <= found + 1e-9
        assert found <= min(alone[0] - math.log(pi), alone[1] - math.log1p(-pi)) + 1e-9
        if sigma <= 0.0025:  # as narrow as the narrow part, or narrower: where training starts
            assert found - exact < 0.3


def test_penalty_is_weighted_by_beta_over_the_number_of_examples() -> None:
    t = tensors(adapted(config()))
    layers = [{suffix: t[f"{name}.{suffix}"] for suffix in ("lora_A.weight", "lora_A.rho")} for name in "ab"]
    total = sum(
        divergence_bound(values["lora_A.weight"], F.softplus(values["lora_A.rho"]), 0.5, (0.2, 0.0025)).sum()
        for values in layers
    )
    penalty = METHOD.penalty(config(num_data=50, vb_beta=0.5), layers)
    assert penalty is not None
    assert distance(penalty, 0.5 * total / 50) < 1e-12
    default = METHOD.penalty(config(), layers)
    assert default is not None
    assert distance(default, total / (4 * 12 + 4 * 20)) < 1e-12  # as many examples as random weights
    assert METHOD.penalty(config(vb_beta=0), layers) is None


def fitted(steps: int, **options: Any) -> tuple[float, float, Tensor]:
    """The loss before and after training a layer on noisy data of which only the first 4 inputs vary, and σ."""
    torch.manual_seed(0)
    x = torch.randn(256, 8) * torch.tensor([1.0] * 4 + [0] * 4)
    target = x @ torch.randn(8, 3) + 0.1 * torch.randn(256, 3)
    model = get_peft_model(Net(nn.Linear(8, 3)), VariationalLoraConfig(target_modules=["layer"], vb_r=4, **options))
    method, values = VariationalLora(), model.get_base_model().layer.values("default")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    start = float((model.eval().get_base_model().layer(x).detach() - target).square().mean())
    layer = model.train().get_base_model().layer
    for _ in range(steps):
        penalty = method.penalty(model.peft_config["default"], [values])
        loss = (layer(x) - target).square().mean() + (0 if penalty is None else penalty)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    end = float((layer.eval()(x).detach() - target).square().mean())
    return start, end, F.softplus(values["lora_A.rho"]).detach()


def test_training_fits_and_is_unsure_where_the_data_say_nothing() -> None:
    start, end, sigma = fitted(400, num_data=10_000, vb_pi=1)
    assert end < 0.05 * start
    assert sigma[:, 4:].mean() > 3 * sigma[:, :4].mean()
    start, end, sigma = fitted(400)
    assert end < 0.2 * start  # the default of num_data, for 32 random weights: a strong prior


def test_core_finds_the_penalty_of_all_layers() -> None:
    model = adapted(config(num_data=50))
    t = tensors(model)
    layers = [{suffix: t[f"{name}.{suffix}"] for suffix in ("lora_A.weight", "lora_A.rho")} for name in "ab"]
    expected = METHOD.penalty(config(num_data=50), layers)
    assert expected is not None
    found = peanut.penalty(model.train())
    assert distance(found, expected) < 1e-12
    found.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert len(reached) == 4
    assert all("lora_A" in name for name in reached)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vb_r": 0}, "vb_r=0; expected a whole number of at least 1"),
        ({"vb_pi": 1.5}, "vb_pi=1.5; expected a share between 0 and 1"),
        ({"vb_beta": -1}, "vb_beta=-1; expected a finite number of at least 0"),
        ({"prior_sigma_2": 0}, "prior_sigma_2=0; expected a finite number above 0"),
        ({"init_sigma": math.inf}, "init_sigma=inf; expected a finite number above 0"),
        ({"num_data": 0}, "num_data=0; expected a whole number of at least 1"),
        ({"rank_pattern": {"a": 0}}, r"rank_pattern\['a'\]=0; expected a whole number of at least 1"),
        ({"bias": "vb_only"}, "bias='vb_only'; expected 'none', 'all' or 'lora_only'"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PeanutError, match=message):
        VariationalLoraConfig(**options)
