"""A method joins by being registered; the laws, the checkpoints and the configs then know it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peanut import LoraConfig, PeanutError, PeftConfig, PeftType, get_peft_model
from peanut.operators import LowRank
from peanut.protocols import METHODS, Change, WeightMethod, method_of, register
from peanut.protocols.config import CONFIG_CLASSES
from peanut.weights import KINDS, FrozenLayer

from ..support import CASES, one_thread  # noqa: F401


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_names_itself_and_kinds_that_exist(method: WeightMethod[PeftConfig]) -> None:
    assert METHODS[method.name] is method
    assert method.config_class.method == PeftType(method.name)
    assert set(method.kinds) <= {kind.name for kind in KINDS}
    assert {case.kind for case in CASES if case.method == method.name} == set(method.kinds)
    assert vars(method) == {}  # one instance serves every layer: it keeps no state


def test_unknown_methods_are_told_with_the_nearest() -> None:
    assert method_of("lora") is method_of(PeftType.LORA)
    with pytest.raises(PeanutError, match=r"names the method 'LORRA'; expected one of .*; nearest: 'LORA'"):
        method_of("LORRA")


@dataclass(kw_only=True)
class EvenConfig(PeftConfig):
    method = PeftType.LORA


def test_a_new_method_works_by_being_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    registries: tuple[dict[str, Any], ...] = (METHODS, CONFIG_CLASSES)
    for registry in registries:
        for name, value in list(registry.items()):
            monkeypatch.setitem(registry, name, value)

    @register
    class Even(WeightMethod[EvenConfig]):
        """ΔW = g·1, refused for layers of odd width."""

        config_class = EvenConfig
        kinds = ("linear",)

        def start(self, config: EvenConfig, layer: FrozenLayer, generator: torch.Generator) -> dict[str, Tensor]:
            return {"gain": torch.zeros(1)}

        def change(self, config: EvenConfig, parameters: Mapping[str, Tensor], layer: FrozenLayer) -> Change:
            ones = torch.ones(layer.out_features, 1), torch.ones(1, layer.in_features)
            return Change(LowRank(parameters["gain"] * ones[0], ones[1]))

        def check(self, config: EvenConfig, layer: FrozenLayer, path: str) -> None:
            if layer.out_features % 2:
                raise PeanutError(f"layer '{path}' has {layer.out_features} outputs", "an even number", "leave it out")

    net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)), torch.randn(2, 3)
    with pytest.raises(PeanutError, match=r"^layer '2' has 3 outputs; expected an even number; leave it out$"):
        get_peft_model(net, EvenConfig(target_modules=["0", "2"]))
    assert type(net[0]) is nn.Linear  # refused before anything was changed
    with pytest.raises(PeanutError, match=r"matches '1', a ReLU; expected layers of kind linear; name the layers"):
        get_peft_model(net, EvenConfig(target_modules=["1"]))
    before = net[0](x)
    model = get_peft_model(net, EvenConfig(target_modules=["0"]))
    with torch.no_grad():
        net[0].adapters["default"].gain.fill_(2.0)
    assert torch.allclose(net[0](x), before + 2 * x.sum(-1, keepdim=True))
    assert model.get_nb_trainable_parameters()[0] == 1
    monkeypatch.undo()
    assert METHODS["LORA"].config_class is LoraConfig is CONFIG_CLASSES["LORA"]
