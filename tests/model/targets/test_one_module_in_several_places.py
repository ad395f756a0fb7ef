"""One module object that stands in several places of a model has one weight: it is adapted in all of them."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peanut import (
    BottleneckConfig,
    LoraConfig,
    OFTConfig,
    PeanutConfig,
    PeanutError,
    PeftConfig,
    PeftModel,
    get_peft_model,
    to_peft,
)

from ...support import directed, distance, look_of, one_thread, randomised, same_bits  # noqa: F401


class Half(nn.Module):
    def __init__(self, x: nn.Module, y: nn.Module) -> None:
        super().__init__()
        self.x, self.y = x, y

    def forward(self, z: Tensor) -> Tensor:
        answer: Tensor = self.y(torch.tanh(self.x(z)))
        return answer


def in_a_row() -> nn.Module:
    layer = nn.Linear(8, 8)
    return nn.Sequential(layer, nn.Tanh(), layer)


def in_two_halves() -> nn.Module:
    layer = nn.Linear(8, 8)
    return nn.Sequential(Half(layer, nn.Linear(8, 8)), Half(nn.Linear(8, 8), layer))


def in_a_block_that_repeats() -> nn.Module:
    blocks = nn.Sequential(*[Half(nn.Linear(8, 8), nn.Linear(8, 8))] * 3)
    return nn.Sequential(OrderedDict(h=blocks))


MODELS = {
    "in a row": (in_a_row, ["0"], ["0", "2"]),
    "in two halves": (in_two_halves, ["0.x"], ["0.x", "1.y"]),
    "in a block": (in_a_block_that_repeats, ["x"], ["h.0.x", "h.1.x", "h.2.x"]),
}
X = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def base(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().double()


def config(kind: type[PeftConfig], name: str, **options: Any) -> PeftConfig:
    own = (
        {"oft_block_size": 4} if kind is OFTConfig else {"bottleneck_size": 2} if kind is BottleneckConfig else {"r": 2}
    )
    return kind(target_modules=MODELS[name][1], **own, **options)  # type: ignore[call-arg]


@pytest.mark.parametrize("kind", [LoraConfig, PeanutConfig, OFTConfig])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_adapted_in_all_of_its_places(name: str, kind: type[PeftConfig], tmp_path: Path) -> None:
    original, places = base(name), MODELS[name][2]
    model = randomised(get_peft_model(base(name), config(kind, name), "default")).eval()
    layers = {id(model.get_base_model().get_submodule(path)) for path in places}
    assert len(layers) == 1
    assert len(list(model.adapters.layers())) == 1
    y = model(X)
    assert distance(y, original(X)) > 0.05
    # The reference: the same module with its adapted weight written out.
    (layer,) = (layer for _, layer in model.adapters.layers())
    dense = base(name)
    with torch.no_grad():
        dense.get_submodule(places[0]).weight.add_(layer.delta("default"))
    assert distance(y, dense(X)) < 1e-12
    model.merge_adapter()
    assert distance(model(X), y) < 1e-12
    model.unmerge_adapter()
    assert same_bits(model(X), y)
    model.save_pretrained(tmp_path)
    assert same_bits(PeftModel.from_pretrained(base(name), tmp_path)(X), y)
    model.add_adapter("other", config(LoraConfig, name))
    model.set_adapter(["default", "other"])
    model.delete_adapter("other")
    assert same_bits(model(X), y)
    left = model.unload()
    assert same_bits(left(X), original(X))
    assert all(type(left.get_submodule(path)) is nn.Linear for path in places)
    assert {type(module) for module in left.modules()} == {type(module) for module in original.modules()}


@pytest.mark.parametrize("name", MODELS)
def test_its_gradient_is_the_sum_over_its_places(name: str) -> None:
    model = randomised(get_peft_model(base(name), config(LoraConfig, name)))
    directed(model(X)).backward()
    (layer,) = (layer for _, layer in model.adapters.layers())
    A, B = (layer.values("default")[f"lora_{letter}.weight"] for letter in "AB")
    dense = base(name)
    place = MODELS[name][2][0]
    own = A.detach().requires_grad_(), B.detach().requires_grad_()
    weight = dense.get_submodule(place).weight.detach() + 8 / 2 * own[1] @ own[0]
    directed(torch.func.functional_call(dense, {f"{place}.weight": weight}, (X,))).backward()
    for found, wanted in zip((A, B), own, strict=True):
        assert distance(found.grad, wanted.grad) < 1e-10


KINDS = {
    "output": BottleneckConfig(target_modules=["x"], bottleneck_size=2),
    "whole": LoraConfig(r=2, target_modules=["0.y", "1.x"], modules_to_save=["0.x"]),
    "whole, named by its second place": LoraConfig(r=2, target_modules=["0.y", "1.x"], modules_to_save=["1.y"]),
}


@pytest.mark.parametrize("own", KINDS.values(), ids=KINDS)
def test_a_module_trained_whole_and_one_whose_output_changes_act_in_all_places(own: PeftConfig, tmp_path: Path) -> None:
    original = base("in two halves")
    model = randomised(get_peft_model(base("in two halves"), own)).eval()
    inner = model.get_base_model()
    assert inner.get_submodule("0.x") is inner.get_submodule("1.y")
    y = model(X)
    assert distance(y, original(X)) > 0.01
    model.save_pretrained(tmp_path)
    assert same_bits(PeftModel.from_pretrained(base("in two halves"), tmp_path)(X), y)
    assert same_bits(model.unload()(X), original(X))


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "named in its second place": ("in two halves", {"target_modules": "1.y"}),
    "excluded in its second place": ("in two halves", {"target_modules": ["x", "y"], "exclude_modules": ["1.y"]}),
    "in one block": ("in a block", {"target_modules": ["x"], "layers_to_transform": [1]}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_one_of_its_places_alone_is_refused(case: str) -> None:
    name, options = REFUSED[case]
    model = base(name)
    before = look_of(model)
    with pytest.raises(PeanutError, match=r"is the same module as '(0|h.0).x', and one of them .*both or neither"):
        get_peft_model(model, LoraConfig(r=2, **options))
    assert look_of(model)[:2] == before[:2]


def test_all_linear_layers_are_each_there_once() -> None:
    model = get_peft_model(base("in two halves"), LoraConfig(r=2, target_modules="all-linear"))
    assert [path for path, _ in model.adapters.layers()] == ["0.x", "0.y", "1.x"]


def test_models_of_hugging_face_peft_adapt_the_first_place_only_so_neither_becomes_the_other() -> None:
    import peft

    from peanut import from_peft

    theirs = peft.get_peft_model(base("in two halves"), peft.LoraConfig(r=2, target_modules=["x", "y"]))
    with pytest.raises(PeanutError, match=r"module at '0.x' stands elsewhere"):
        from_peft(theirs)
    with pytest.raises(PeanutError, match=r"layer at '0.x' stands at '1.y' too"):
        to_peft(get_peft_model(base("in two halves"), LoraConfig(r=2, target_modules=["x"])))
