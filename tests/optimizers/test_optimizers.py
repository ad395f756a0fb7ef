"""LoRA+, LoRA-FA and Riemannian preconditioning take the steps that Hugging Face PEFT's take."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from peanut import LoraConfig, PeanutConfig, PeanutError, get_peft_model
from peanut.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer

from ..support import PEER_WARNINGS, scattered

peft = pytest.importorskip("peft")
pytestmark = PEER_WARNINGS


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(torch.tanh(self.first(self.embed(ids)))))


SETTINGS: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["embed", "first", "second"]}
MAKERS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "plus": ("loraplus", (torch.optim.AdamW,), {"lr": 0.01, "loraplus_lr_ratio": 8, "loraplus_weight_decay": 0.1}),
    "plus, faster embeddings": (
        "loraplus",
        (torch.optim.Adam,),
        {"lr": 0.01, "loraplus_lr_ratio": 4, "loraplus_lr_embedding": 0.02},
    ),
    "riemannian": ("riemannian", (torch.optim.AdamW,), {"lr": 0.01, "weight_decay": 0.1}),
    "riemannian sgd": ("riemannian", (torch.optim.SGD,), {"lr": 1e-4, "reg": 1e-1}),
    "fa": ("lorafa", (4, 6, 0.01), {"weight_decay": 0.1}),
    "fa of an embedding too": ("lorafa", (4, 6, 0.01), {}),
}
OURS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "loraplus": create_loraplus_optimizer,
    "riemannian": create_riemannian_optimizer,
    "lorafa": create_lorafa_optimizer,
}


@pytest.mark.parametrize("case", MAKERS)
def test_steps_equal_those_of_the_peer(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # It would round LoRA-FA's projection to bfloat16.
    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)
    kind, given, named = MAKERS[case]
    settings = dict(SETTINGS, target_modules=["first", "second"]) if case == "fa" else SETTINGS
    base = Mixed()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings))
    ours = get_peft_model(copy.deepcopy(base), LoraConfig(**settings))
    scattered((own for own in ours.parameters() if own.requires_grad), scale=0.4)
    theirs.load_state_dict(ours.state_dict())
    steppers = [
        OURS[kind](ours, *given, **named),
        getattr(peft.optimizers, f"create_{kind}_optimizer")(theirs, *given, **named),
    ]
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    ids = torch.arange(11)
    for _ in range(4):
        for model, stepper in zip((ours, theirs), steppers, strict=True):
            stepper.zero_grad()
            model(ids).square().sum().backward()
            stepper.step()
    after, expected = ours.state_dict(), theirs.state_dict()
    assert after.keys() == expected.keys()
    assert max((after[key] - expected[key]).abs().max().item() for key in after) < 1e-6
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    assert len(moved) == {"fa": 2, "fa of an embedding too": 3}.get(case, 6)


def test_lorafa_takes_groups_as_the_peer_makes_them() -> None:
    import peft.optimizers.lorafa as theirs

    from peanut.optimizers.lorafa import LoraFAOptimizer

    stepped = []
    for made, factors in ((LoraFAOptimizer, "scaling_factor"), (LoraFAOptimizer, "list"), (theirs.LoraFAOptimizer, "")):
        values = [torch.linspace(-1, 1, 6).reshape(shape) for shape in ((2, 3), (3, 2))]
        A, B = (nn.Parameter(value) for value in values)
        A.grad, B.grad = torch.ones(2, 3), torch.linspace(1, 2, 6).reshape(3, 2)
        given = {"scaling_factor": 2.0} if factors == "scaling_factor" else {"scaling_factors": [2.0, 2.0]}
        group = {"params": [A, B], "names": ["l.lora_A.x.weight", "l.lora_B.x.weight"], **given}
        optimizer = made([group], lr=0.1, correct_bias=False)
        if factors == "scaling_factor":
            with pytest.warns(FutureWarning, match="scaling_factors"):
                optimizer.step()
        else:
            optimizer.step()
        stepped.append(B.detach())
        assert torch.equal(A, values[0])
    assert torch.equal(stepped[0], stepped[1])
    assert torch.allclose(stepped[1], stepped[2], atol=1e-6)
    assert not torch.allclose(stepped[0], torch.linspace(-1, 1, 6).reshape(3, 2))
    with pytest.raises(PeanutError, match=r"^parameters without names and scaling_factors"):
        LoraFAOptimizer([B]).step()  # type: ignore[list-item]


def test_lorafa_tells_what_it_is_given_in_vain_and_projects_kernels() -> None:
    model = get_peft_model(nn.Sequential(nn.Conv2d(2, 4, 3)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.warns(UserWarning, match=r"^r=4 and lora_alpha=8 have no effect: adapter 'default' has r=2"):
        optimizer = create_lorafa_optimizer(model, 4, 8, 0.1)
    values = model.base_model.model[0].values("default")
    A, B = values["lora_A.weight"], values["lora_B.weight"]
    model(torch.randn(1, 2, 5, 5)).square().sum().backward()
    matrix = A.detach().flatten(1)
    assert B.grad is not None
    expected = B.grad.flatten(1) @ torch.linalg.inv(matrix @ matrix.T) / 16
    optimizer.step()
    assert A.grad is None
    assert torch.allclose(optimizer.state[B]["exp_avg"].flatten(1), 0.1 * expected, rtol=1e-3, atol=1e-6)


def test_lorafa_steps_with_an_adapter_that_is_active_later() -> None:
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)
    model.add_adapter("b", config)
    for name, value in model.named_parameters():
        value.requires_grad_("lora_" in name)
    optimizer = create_lorafa_optimizer(model, 2, 8, lr=0.1)
    model.set_adapter("b")
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert {name.partition("lora_")[2] for name in changed} == {"A.b.weight", "B.b.weight"}


def test_lorafa_divides_by_no_scale_of_zero() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
    model.base_model.model[0].set_scale("default", 0.0)
    with pytest.raises(PeanutError, match=r"^adapter 'default' of scale 0 at '0'; expected another scale"):
        create_lorafa_optimizer(model, 2, 8, lr=0.1)


def test_b_of_peanut_learns_faster() -> None:
    model = get_peft_model(Mixed(), PeanutConfig(r=4, depth=1, target_modules=["first"]))
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=0.5, loraplus_lr_ratio=16)
    rates = {id(own): group["lr"] for group in optimizer.param_groups for own in group["params"]}
    found = {
        name.split(".")[-3 if "_B" in name or "_A" in name else -4]: rates[id(own)]
        for name, own in model.named_parameters()
        if own.requires_grad
    }
    assert found["peanut_B"] == 8
    assert [rate for name, rate in found.items() if name != "peanut_B"] == [0.5] * (len(found) - 1)
    assert len(found) >= 3


@pytest.mark.parametrize("make", ["lorafa", "riemannian"])
def test_without_a_lora_it_is_refused(make: str) -> None:
    model = get_peft_model(Mixed(), PeanutConfig(r=4, target_modules=["first"]))
    given = (4, 4, 0.1) if make == "lorafa" else (torch.optim.SGD,)
    named = {} if make == "lorafa" else {"lr": 0.1}
    with pytest.raises(PeanutError, match=r"LoRA|lora_A"):
        OURS[make](model, *given, **named)
    assert any(own.requires_grad for own in model.parameters())


def test_what_is_no_class_of_optimizers_is_refused() -> None:
    model = get_peft_model(Mixed(), LoraConfig(r=4, target_modules=["first"]))
    for given in (dict, torch.optim.SGD(model.parameters(), lr=0.1)):
        with pytest.raises(PeanutError, match=r"^optimizer_cls=.*; expected a class of torch\.optim; give the class"):
            create_riemannian_optimizer(model, given, lr=0.1)  # type: ignore[arg-type]
