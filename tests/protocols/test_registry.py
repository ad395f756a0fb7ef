"""A method joins by being registered; the laws, the checkpoints and the configs then know it."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import peanut
from peanut import LoraConfig, PeanutError, PeftConfig, PeftType, get_peft_model
from peanut.methods.lora import Lora
from peanut.model.injection import AdaptedModel
from peanut.model.models import model_of
from peanut.operators import LowRank
from peanut.protocols import METHODS, Change, InputMethod, WeightMethod, method_of, register
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


def test_names_are_an_enum_to_scripts() -> None:
    assert PeftType.LORA is PeftType("LORA") is PeftType["LORA"] is PeftType("lora")
    assert PeftType.LORA == "LORA"
    assert (PeftType.LORA.name, PeftType.LORA.value, str(PeftType.LORA)) == ("LORA", "LORA", "LORA")
    assert isinstance(PeftType.LORA, str)
    assert {PeftType.LORA: 1}["LORA"] == 1
    assert "LORA" in PeftType
    assert PeftType.LORA in PeftType
    assert "LORRA" not in PeftType
    assert [member.value for member in PeftType] == list(METHODS)
    assert len(PeftType) == len(METHODS)
    assert set(METHODS) <= set(dir(PeftType))
    for again in (copy.copy, copy.deepcopy, *(partial(pickled, protocol=protocol) for protocol in range(6))):
        found = again(PeftType.LORA)
        assert found == PeftType.LORA
        assert type(found) is PeftType
    assert json.dumps({"peft_type": PeftType.LORA}) == '{"peft_type": "LORA"}'
    with pytest.raises(ValueError, match=r"names the method 'LORRA'; expected one of ADALORA, .*; nearest: 'LORA'$"):
        PeftType("LORRA")
    with pytest.raises(AttributeError, match="PeftType has no member 'LORRA'"):
        _ = PeftType.LORRA


def test_names_equal_those_of_hugging_face_peft() -> None:
    import peft

    theirs = [member for member in peft.PeftType if member in PeftType]
    assert len(theirs) > 20
    for member in theirs:
        assert PeftType(member) == member == PeftType(member.value)
        assert hash(PeftType(member)) == hash(member)


def pickled(value: object, protocol: int) -> object:
    return pickle.loads(pickle.dumps(value, protocol))


@pytest.mark.parametrize(
    "used",
    [
        "from peanut import PeftType",
        "from peanut.protocols import PeftType",
        "from peanut.protocols.config import PeftType",
    ],
)
def test_all_methods_are_known_wherever_the_names_come_from(used: str) -> None:
    program = f"{used}; print(*PeftType)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert sorted(done.stdout.split()) == sorted(METHODS)
    one = f"{used}; print(PeftType.VERA, 'VERA' in PeftType, PeftType('vera').name)"
    done = subprocess.run([sys.executable, "-c", one], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["VERA", "True", "VERA"]


@dataclass(kw_only=True)
class EvenConfig(PeftConfig):
    method = "even"


@pytest.fixture
def registry() -> Iterator[None]:
    """What is registered in a test is forgotten after it."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.mark.usefixtures("registry")
def test_a_new_method_works_by_being_registered() -> None:
    with pytest.raises(PeanutError, match="names the method 'even'; expected one of"):
        EvenConfig()

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
        net[0].gain["default"].fill_(2.0)
    assert torch.allclose(net[0](x), before + 2 * x.sum(-1, keepdim=True))
    assert model.get_nb_trainable_parameters()[0] == 1
    assert PeftType.even == "even" == PeftType("EVEN")
    assert EvenConfig.from_dict({"peft_type": "Even"}) == EvenConfig()
    assert EvenConfig(peft_type="EVEN").to_dict()["peft_type"] == "even"
    assert model.base_model.method == "even"


def test_what_was_registered_for_a_test_is_gone() -> None:
    assert "even" not in PeftType
    assert METHODS["LORA"].config_class is LoraConfig


@pytest.mark.usefixtures("registry")
def test_a_name_belongs_to_one_method() -> None:
    @dataclass(kw_only=True)
    class Config(LoraConfig):
        method = "Lora"

    class Again(Lora):
        config_class = Config

    message = (
        r"Again registers the name 'Lora', which peanut.methods.lora.Lora has; expected a name of its own; give Co"
    )
    with pytest.raises(PeanutError, match=message):
        register(Again)
    assert type(METHODS["LORA"]) is Lora
    assert register(Lora) is Lora  # the same class: a module that is loaded again


@pytest.mark.usefixtures("registry")
def test_a_method_that_is_defined_again_takes_its_own_place() -> None:
    def cell(rank: int) -> type[PeftConfig]:
        @dataclass(kw_only=True)
        class CellConfig(LoraConfig):
            method = "cell"
            r: int = rank

        @register
        class Cell(Lora):
            config_class = CellConfig

        return CellConfig

    first, second = cell(2), cell(3)
    config = PeftConfig.from_dict({"peft_type": "cell", "target_modules": ["0"]})
    assert type(config) is second is not first
    model = get_peft_model(nn.Sequential(nn.Linear(3, 4)), config)
    assert type(model.base_model).__name__ == "CellModel"
    assert model.get_nb_trainable_parameters()[0] == 3 * (3 + 4)


# Classes of adapted models


def test_every_method_has_a_class_of_models_that_can_be_pickled() -> None:
    for method in METHODS.values():
        found = model_of(method)
        if isinstance(method, InputMethod):
            assert found is AdaptedModel
            continue
        assert (found.method, found.__base__) == (method.name, AdaptedModel)
        assert found.__name__ == method.config_class.__name__.removesuffix("Config") + "Model"
        assert getattr(peanut, found.__name__) is found is pickle.loads(pickle.dumps(found))
    program = "import pickle, sys; print(pickle.loads(bytes.fromhex(sys.argv[1])).method)"  # where it is not made yet
    done = subprocess.run(
        [sys.executable, "-c", program, pickle.dumps(peanut.VeraModel).hex()],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "VERA\n"


def test_a_class_of_models_takes_its_own_configs() -> None:
    model = peanut.LoraModel(nn.Sequential(nn.Linear(3, 4)), LoraConfig(target_modules=["0"]))
    assert type(copy.deepcopy(model)) is peanut.LoraModel
    with pytest.raises(
        PeanutError, match="VeraConfig given to LoraModel; expected a config of LORA; use get_peft_model"
    ):
        peanut.LoraModel(nn.Sequential(nn.Linear(3, 4)), peanut.VeraConfig(target_modules=["0"]))
    given = peanut.VBLoRAConfig(target_modules=["0"], vb_r=2)
    assert given.peft_type == "VARIATIONAL_LORA"
    assert peanut.VBLoRAModel(nn.Sequential(nn.Linear(3, 4)), given).adapters.configs["default"] is not None
    peanut.AdaLoraModel.update_and_allocate(model, 3)
    with pytest.raises(AttributeError, match="no attribute 'LorraModel'"):
        _ = peanut.LorraModel


@pytest.mark.usefixtures("registry")
def test_a_method_may_bring_its_own_class_of_models_and_one_name_is_enough_for_two() -> None:
    @dataclass(kw_only=True)
    class OwnConfig(LoraConfig):
        method = "own"

    @register
    class Own(Lora):
        config_class = OwnConfig

    class WithMore(AdaptedModel):
        method = "own"

    assert model_of(METHODS["own"]) is WithMore
    twin = dataclass(kw_only=True)(type("LoraConfig", (LoraConfig,), {"method": "twin", "__module__": __name__}))
    register(type("Twin", (Lora,), {"config_class": twin, "__module__": __name__}))
    assert model_of(METHODS["twin"]) is AdaptedModel  # LoraModel is LORA's
    assert model_of(METHODS["LORA"]) is peanut.LoraModel


def test_config_classes_by_name_for_scripts_that_choose_one() -> None:
    from peanut.protocols.config import CONFIG_CLASSES

    assert all(CONFIG_CLASSES[name] is method.config_class for name, method in METHODS.items())


@pytest.mark.parametrize("name", ["", "a/b", None, 5, "two\nlines"])
def test_names_that_cannot_be_used_are_refused(name: object) -> None:
    @dataclass(kw_only=True)
    class OddConfig(PeftConfig):
        method = name  # type: ignore[assignment]

    class Odd(Lora):
        config_class = OddConfig  # type: ignore[assignment]

    with pytest.raises(PeanutError, match=r"^.*Odd registers the name .*; expected letters, digits, spaces"):
        register(Odd)
    with pytest.raises(PeanutError, match=r"^.*registers the name None; expected"):
        register(type("NoConfig", (), {}))
    assert name not in METHODS


def test_members_as_of_an_enum() -> None:
    assert list(PeftType.__members__) == list(METHODS)
    assert PeftType.__members__["LORA"] is PeftType.LORA
