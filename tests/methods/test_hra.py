"""HRA against its formula, against the peer, and its options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peanut import PeanutError, PeftModel, get_peft_model
from peanut.methods.hra import HRAConfig
from peanut.model.adapters.adapter_set import AdapterSet

from ..support import Net, directed, distance, one_thread, peer_model, randomised  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:The symmetric initialization can NOT be performed")


def net(layer: nn.Module | None = None, dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(1)
    made = Net(nn.Linear(12, 8) if layer is None else layer).to(dtype)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def new(base: Net, **options: Any) -> PeftModel:
    torch.manual_seed(7)
    return get_peft_model(base, HRAConfig(target_modules=["layer"], **options)).eval()


def layer_of(model: PeftModel) -> Any:
    return next(layer for _, layer in AdapterSet.of(model).layers())


def rotation_written_out(u: Tensor, orthogonal: bool) -> Tensor:
    """One reflection after the other; the directions made orthogonal to those before them first, if asked."""
    eye, done = torch.eye(len(u), dtype=u.dtype), []
    for column in u.T:
        direction = column
        for before in done if orthogonal else ():
            direction = direction - (before @ direction) * before
        done.append(direction / direction.norm())
    R = eye
    for direction in done:
        R = R @ (eye - 2 * torch.outer(direction, direction))
    return R


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("r", [1, 2, 5, 8])
def test_weight_is_as_the_formula_says(r: int, orthogonal: bool) -> None:
    base = net()
    model = randomised(new(base, r=r, apply_GS=orthogonal))
    layer = layer_of(model)
    W, u = layer.frozen.matrix().detach(), layer.values("default")["hra_u"].detach()
    expected = W @ rotation_written_out(u, orthogonal)
    assert distance(W + layer.delta("default"), expected) < 1e-12
    x = torch.randn(5, 12, dtype=torch.float64)
    assert distance(model(x), x @ expected.T + base.layer.bias) < 1e-12


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("r", [1, 4, 7])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_equals_the_peer(kind: str, r: int, orthogonal: bool) -> None:
    def base() -> Net:
        layer = nn.Linear(36, 8) if kind == "linear" else nn.Conv2d(4, 10, 3, stride=2, padding=1, bias=False)
        return net(layer, torch.float32)

    options: dict[str, Any] = {"r": r, "apply_GS": orthogonal}
    model = randomised(new(base(), **options))
    theirs = peer_model(base(), HRAConfig(target_modules=["layer"], **options))
    own = theirs.base_model.model.layer.hra_u["default"]
    value = layer_of(model).values("default")["hra_u"]
    assert own.shape == value.shape
    own.data.copy_(value)
    x = torch.randn(5, 36) if kind == "linear" else torch.randn(2, 4, 9, 7)
    assert distance(model(x), theirs(x)) < 1e-5


def test_starts_in_pairs() -> None:
    u = layer_of(new(net(), r=4)).values("default")["hra_u"]
    assert torch.equal(u[:, 0], u[:, 1])
    assert torch.equal(u[:, 2], u[:, 3])
    assert not torch.equal(u[:, 0], u[:, 2])
    bound = (1 / 2) ** 0.5  # of a Kaiming-uniform start with a = √5 and two inputs
    assert 0.8 * bound < u.abs().max() <= bound
    odd = layer_of(new(net(), r=5)).values("default")["hra_u"]
    assert odd.shape == (12, 5)
    assert torch.equal(odd[:, 2], odd[:, 3])
    apart = layer_of(new(net(), r=4, init_weights=False)).values("default")["hra_u"]
    assert not torch.equal(apart[:, 0], apart[:, 1])


def test_orthogonal_reflections_start_apart_and_finite() -> None:
    # Of two equal directions Gram-Schmidt would leave none for the second.
    base = net()
    model = new(base, r=4, apply_GS=True)
    x = torch.randn(5, 12, dtype=torch.float64)
    y = model(x)
    (gradient,) = torch.autograd.grad(directed(y), layer_of(model).values("default")["hra_u"])
    assert torch.isfinite(gradient).all()
    rotation = layer_of(model).change("default").rotation.dense().detach()
    assert abs(float(rotation.trace()) - (12 - 2 * 4)) < 1e-6


def test_pairs_are_trained_from_their_start() -> None:
    model, target = new(net(), r=4), randomised(new(net(), r=4))
    x = torch.randn(64, 12, dtype=torch.float64)
    wanted = target(x).detach()
    u = layer_of(model).values("default")["hra_u"]
    optimizer = torch.optim.Adam([u], lr=0.03)
    losses = []
    for _ in range(150):
        loss = (model(x) - wanted).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.05 * losses[0]


def test_rank_pattern_and_its_file() -> None:
    config = HRAConfig(r=4, rank_pattern={"layer": 2})
    assert (config.for_layer("block.layer").r, config.for_layer("other").r) == (2, 4)
    assert "rank_pattern" not in HRAConfig().to_dict()
    assert HRAConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [({"r": 0}, "r=0"), ({"bias": "lora_only"}, "bias='lora_only'"), ({"rank_pattern": {"a": 0}}, "rank_pattern")],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PeanutError, match=message):
        HRAConfig(**options)


def test_more_reflections_than_features_are_refused() -> None:
    with pytest.raises(PeanutError, match=r"r=13 reflections for 'layer', whose input has 12 features; .*at most 12"):
        new(net(), r=13)
