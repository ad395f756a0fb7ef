"""AdaLoRA against its formulas (arXiv 2303.10512), and step by step against the peer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peanut import AdaLoraConfig, PeanutError, PeftModel, get_peft_model
from peanut.methods.adalora import budget
from peanut.model.adapters.adapter_set import AdapterSet
from peanut.protocols import METHODS
from peanut.weights import FrozenLayer, kind_of

from ..support import (  # noqa: F401
    PEER_WARNINGS,
    Net,
    distance,
    one_thread,
    peer_loaded,
    peer_model,
    same_bits,
    scattered,
)

pytestmark = [
    *PEER_WARNINGS,
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match"),  # of what it wrote itself
]
ADALORA = METHODS["ADALORA"]
LAYERS = {
    "linear": lambda: nn.Linear(6, 5),
    "conv1d": lambda: Conv1D(5, 6),
    "conv": lambda: nn.Conv2d(3, 5, (3, 2)),
    "embedding": lambda: nn.Embedding(9, 5),
}
SCHEDULES = [
    {"total_step": 14, "tinit": 2, "tfinal": 4, "deltaT": 3},
    {"total_step": 9},
    {"total_step": 12, "tinit": 3, "tfinal": 1, "deltaT": 4, "beta1": 0.5, "beta2": 0.9},
]


class Stack(nn.Module):
    """Layers of different sizes, and a loss as transformers' models return it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(6, 9), nn.Linear(9, 7, bias=False), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.last(torch.tanh(self.layer(torch.tanh(self.first(x)))))
        return {"loss": y.square().mean(), "y": y}


def stack() -> Stack:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Stack()


def config(**options: Any) -> AdaLoraConfig:
    return AdaLoraConfig(**{"init_r": 4, "target_r": 2, "target_modules": ["first", "layer"]} | options)


def states(model: nn.Module) -> list[dict[str, Tensor]]:
    return [layer.values("default") for _, layer in AdapterSet.of(model).layers("default")]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("alpha", "scaling"), [(6, 1.5), (0, 1.0), (-2, 1.0)])
def test_change_is_the_formula(kind: str, alpha: float, scaling: float) -> None:
    module = LAYERS[kind]().double()
    layer_kind = kind_of(module)
    assert layer_kind is not None
    layer, own = FrozenLayer(module, layer_kind), config(lora_alpha=alpha).for_layer("layer")
    values = ADALORA.start(own, layer, torch.Generator().manual_seed(1))
    assert not ADALORA.change(own, values, layer).delta.dense().any()
    assert values["lora_A"].std() == pytest.approx(0.02, rel=0.5)
    scattered(values.values())
    A, B, E = values["lora_A"], values["lora_B"], values["lora_E"]
    assert (A.shape, B.shape, E.shape) == ((4, layer.in_features), (layer.out_features, 4), (4, 1))
    expected = scaling / (1 + 1e-5 / 4) * B @ torch.diag(E.flatten()) @ A
    assert distance(ADALORA.change(own, values, layer).delta.dense(), expected) < 1e-6


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_masks_are_those_of_the_peer_step_by_step(schedule: dict[str, Any]) -> None:
    own = config(**schedule)
    theirs = peer_model(stack(), own)
    ours = states(get_peft_model(stack(), own))
    layers = [theirs.base_model.model.get_submodule(name) for name in ("first", "layer")]
    generator = torch.Generator().manual_seed(2)
    kept_so_far = []
    for step in range(1, schedule["total_step"] + 1):
        for values, layer in zip(ours, layers, strict=True):
            for letter in "ABE":
                mine, other = values[f"lora_{letter}"], getattr(layer, f"lora_{letter}")["default"]
                if step == 1:
                    mine.data.copy_(torch.randn(mine.shape, generator=generator))
                    other.data.copy_(mine)
                mine.grad = torch.randn(mine.shape, generator=generator)
                other.grad = mine.grad.clone()
                for parameter in (mine, other):  # the optimizer's step moves what is masked, too
                    parameter.data.sub_(0.1 * mine.grad)
        ADALORA.after_step(own, ours)
        theirs.base_model.update_and_allocate(step)
        ipt, unc = (getattr(theirs.base_model.rankallocator, f"exp_avg_{name}") for name in ("ipt", "unc"))
        for values, layer, path in zip(ours, layers, ("first", "layer"), strict=True):
            assert int(values["steps"]) == step
            assert same_bits(values["lora_E"].detach(), layer.lora_E["default"].detach())
            for letter in "ABE" if ipt else "":  # it forgets them before the last phase
                assert same_bits(values[f"ipt_{letter}"], ipt[f"{path}.lora_{letter}.default"])
                assert same_bits(values[f"unc_{letter}"], unc[f"{path}.lora_{letter}.default"])
        pattern = theirs.peft_config["default"].rank_pattern
        if pattern is not None:
            masks = [values["kept"].flatten().bool().tolist() for values in ours]
            assert masks == list(pattern.values())
            kept_so_far.append(sum(map(sum, masks)))
    assert kept_so_far[-1] == own.target_r * 2
    assert kept_so_far == sorted(kept_so_far, reverse=True)
    assert len(set(kept_so_far)) > 1


def test_budget_falls_with_the_cube_of_the_time_left() -> None:
    own = config(init_r=12, target_r=4, tinit=10, tfinal=20, deltaT=5, total_step=130)
    steps = {step: budget(own, step, total=120, count=10) for step in range(1, 131)}
    shared_out = [step for step, left in steps.items() if left is not None]
    assert shared_out == list(range(15, 111, 5))
    assert all(steps[step] == int(40 + 80 * (1 - (step - 10) / 100) ** 3) for step in shared_out)
    assert steps[110] == 40
    odd = config(init_r=12, target_r=4, deltaT=7, total_step=20)
    assert budget(odd, 20, total=120, count=10) == 40  # also where the last step is no multiple of deltaT


def test_no_budget_to_cut_masks_nothing() -> None:
    own = config(target_r=4, total_step=3)
    model = get_peft_model(stack(), own)
    scattered([value for value in model.parameters() if value.requires_grad])
    values = states(model)
    before = [value["lora_E"].detach().clone() for value in values]
    assert before
    for value in values:
        for letter in "ABE":
            value[f"lora_{letter}"].grad = torch.randn(value[f"lora_{letter}"].shape)
    for _ in range(3):
        ADALORA.after_step(own, values)
    assert all(same_bits(value["lora_E"].detach(), was) for value, was in zip(values, before, strict=True))
    assert all(value["kept"].all() for value in values)


def test_penalty_is_that_of_the_peer_and_the_formula() -> None:
    own, x = config(total_step=9, orth_reg_weight=0.3), torch.randn(4, 6)
    theirs = peer_model(stack(), own).train()
    model = get_peft_model(stack(), own)
    scattered([value for value in model.parameters() if value.requires_grad])
    values = states(model)
    for value, name in zip(values, ("first", "layer"), strict=True):
        for letter in "ABE":
            getattr(theirs.base_model.model.get_submodule(name), f"lora_{letter}")["default"].data.copy_(
                value[f"lora_{letter}"].detach()
            )
    penalty = ADALORA.penalty(own, values)
    squares = [m for v in values for m in (v["lora_A"] @ v["lora_A"].T, v["lora_B"].T @ v["lora_B"])]
    expected = 0.3 * sum((square - torch.eye(4)).square().sum().sqrt() for square in squares) / 4
    assert distance(penalty, expected) < 1e-6
    assert penalty.item() > 0.1
    base = theirs.base_model.model(x)

    class Outputs(dict):  # the peer reads the loss as an attribute
        loss: Tensor

    def answer(*_: Any, **__: Any) -> Outputs:
        outputs = Outputs(base)
        outputs.loss = base["loss"].clone()
        return outputs

    theirs.base_model.model.forward = answer
    assert distance(theirs.base_model(x).loss - base["loss"], penalty) < 1e-5
    assert ADALORA.penalty(config(orth_reg_weight=0), values) is None


def test_training_ends_with_the_target_rank_and_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    own, x = config(total_step=12, tinit=2, tfinal=3, deltaT=2, lora_alpha=40), torch.randn(30, 6)

    def train(model: PeftModel, steps: range) -> None:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in steps:
            optimizer.zero_grad()
            model.train()(x)["loss"].backward()
            optimizer.step()

    torch.manual_seed(3)
    through = get_peft_model(stack(), own)
    train(through, range(12))
    kept = [value["kept"].flatten().bool() for value in states(through)]
    assert sum(int(mask.sum()) for mask in kept) == 4
    assert all(same_bits(value["lora_E"].flatten() != 0, m) for value, m in zip(states(through), kept, strict=True))

    torch.manual_seed(3)
    half = get_peft_model(stack(), own)
    train(half, range(7))
    half.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(stack(), tmp_path, is_trainable=True)
    train(again, range(7, 12))
    for found, expected in zip(states(again), states(through), strict=True):
        assert found.keys() == expected.keys()
        assert all(same_bits(found[name].detach(), value.detach()) for name, value in expected.items())


def test_the_peer_loads_what_was_masked(tmp_path: Path) -> None:
    own, x = config(total_step=2), torch.randn(4, 6)
    model = get_peft_model(stack(), own)
    scattered([value for value in model.parameters() if value.requires_grad])
    for value in states(model):
        for letter in "ABE":
            value[f"lora_{letter}"].grad = torch.randn(value[f"lora_{letter}"].shape)
    for _ in range(2):
        ADALORA.after_step(own, states(model))
    assert sum(int(value["kept"].sum()) for value in states(model)) == 4
    model.eval().save_pretrained(tmp_path)
    assert distance(model(x)["y"], stack()(x)["y"]) > 0.05
    theirs = peer_loaded(stack(), tmp_path)
    assert distance(theirs(x)["y"], model(x)["y"]) < 1e-5


@pytest.mark.parametrize("drop_all_of_one", [False, True])
def test_we_load_what_the_peer_cut_out(drop_all_of_one: bool, tmp_path: Path) -> None:
    own, x = config(total_step=3, lora_alpha=10), torch.randn(4, 6)
    theirs = peer_model(stack(), own)
    trained = [value for value in theirs.parameters() if value.requires_grad]
    scattered(trained)
    masks = {"first.lora_E.default": [True, False, True, True], "layer.lora_E.default": [False] * 4}
    if not drop_all_of_one:
        masks["layer.lora_E.default"][2] = True
    theirs.base_model.rankallocator.mask_using_rank_pattern(theirs.base_model.model, masks)
    theirs.peft_config["default"].rank_pattern = dict(masks)
    theirs.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(stack(), tmp_path)
    assert distance(theirs(x)["y"], stack()(x)["y"]) > 0.05
    assert distance(model(x)["y"], theirs(x)["y"]) < 1e-5
    assert [len(value["lora_A"]) for value in states(model)] == [3, 0 if drop_all_of_one else 1]
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(stack(), tmp_path / "again")
    assert same_bits(again(x)["y"], model(x)["y"])
    assert distance(peer_loaded(stack(), tmp_path / "again")(x)["y"], theirs(x)["y"]) < 1e-5


def test_training_without_an_end_is_refused() -> None:
    with pytest.raises(PeanutError, match=r"^AdaLoRA in training without total_step; expected .*; set total_step$"):
        ADALORA.after_step(config(), states(get_peft_model(stack(), config())))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_r": 0}, r"^init_r=0; expected a whole number of at least 1; "),
        ({"target_r": 5}, r"^target_r=5 above init_r=4; "),
        ({"deltaT": 0}, r"^deltaT=0; "),
        ({"beta1": 1.0}, r"^beta1=1.0; expected a number between 0 and 1; "),
        ({"beta2": 0}, r"^beta2=0; "),
        ({"orth_reg_weight": -1}, r"^orth_reg_weight=-1; "),
        ({"tinit": 5, "tfinal": 5, "total_step": 10}, r"^tinit=5 and tfinal=5 leave none of total_step=10 "),
        ({"total_step": 0}, r"^total_step=0; "),
        ({"use_dora": True}, r"^use_dora=True; expected that it is not set; remove use_dora"),
        ({"use_rslora": True}, r"^use_rslora=True; "),
        ({"lora_bias": True}, r"^lora_bias=True; "),
        ({"alpha_pattern": {"layer": 2}}, r"^alpha_pattern=.*; "),
        ({"init_lora_weights": "pissa"}, r"^init_lora_weights='pissa'; expected True or False; "),
        ({"layer_replication": [[0, 1]]}, r"^layer_replication="),
        ({"bias": "some"}, r"^bias='some'; "),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PeanutError, match=message) as error:
        config(**options)
    assert "\n" not in str(error.value)


def test_fields_are_those_of_the_peer_with_its_defaults() -> None:
    theirs, ours = peft.AdaLoraConfig(total_step=5).to_dict(), AdaLoraConfig(total_step=5).to_dict()
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name] and str(theirs[name]) != "PeftType.ADALORA"} == set()


def test_a_rank_that_nothing_uses_is_told() -> None:
    with pytest.warns(UserWarning, match=r"^r=20 is not used by AdaLoRA: init_r=12 and target_r=8 are$"):
        get_peft_model(Net(nn.Linear(6, 5)), AdaLoraConfig(r=20, target_modules=["layer"]))
