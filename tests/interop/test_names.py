"""Every public name of Hugging Face PEFT for what we have is here too; of the others it is said what to use."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peanut
from peanut import LoraConfig, get_peft_model
from peanut.methods.lora import Lora
from peanut.protocols.config import default_of
from peanut.protocols.registry import METHODS

from ..support import PEER_WARNINGS

pytestmark = PEER_WARNINGS

NAME = "adapter_model.safetensors"
MODULES = ("", ".functional", ".helpers", ".optimizers", ".tuners", ".utils")


def names_of(module: str) -> set[str]:
    theirs = importlib.import_module(f"peft{module}")
    own = [name for name, value in vars(theirs).items() if getattr(value, "__module__", None) == theirs.__name__]
    return set(getattr(theirs, "__all__", own))


@pytest.mark.parametrize("module", MODULES)
def test_every_name_is_here_or_says_why_not(module: str) -> None:
    ours, silent = importlib.import_module(f"peanut{module}"), set()
    for name in names_of(module):
        try:
            getattr(ours, name)
        except AttributeError as error:  # noqa: PERF203 - each name is asked for
            if not re.fullmatch(r"module '[\w.]+' has no attribute '\w+': \w.{20,}", str(error)):
                silent.add(name)
    assert names_of(module)
    assert not silent
    assert all(getattr(ours, name) is not None for name in ours.__all__)


@pytest.mark.parametrize("module", ["peanut", "peanut.utils", "peanut.tuners"])
def test_importing_what_is_not_here_says_what_to_use(module: str) -> None:
    with pytest.raises(ImportError, match=r"'LoHaConfig': .*use LoraConfig"):
        exec(f"from {module} import LoHaConfig", {})
    with pytest.raises(ImportError, match="cannot import name 'Typo'"):
        exec(f"from {module} import Typo", {})


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("utils.other", "fsdp_auto_wrap_policy"),
        ("utils.save_and_load", "get_peft_model_state_dict"),
        ("utils.peft_types", "TaskType"),
        ("utils.constants", "SAFETENSORS_WEIGHTS_NAME"),
        ("tuners.lora.layer", "LoraLayer"),
        ("tuners.lora.model", "LoraModel"),
        ("tuners.ia3.config", "IA3Config"),
        ("peft_model", "PeftModelForCausalLM"),
        ("mapping", "PEFT_TYPE_TO_CONFIG_MAPPING"),
        ("mapping_func", "get_peft_model"),
        ("mixed_model", "PeftMixedModel"),
        ("config", "PeftConfig"),
        ("auto", "AutoPeftModel"),
    ],
)
def test_names_are_imported_from_where_the_peer_defines_them(module: str, name: str) -> None:
    theirs, ours = (importlib.import_module(f"{library}.{module}") for library in ("peft", "peanut"))
    assert getattr(theirs, name) is not None
    assert getattr(ours, name) is not None


def test_layers_are_known_by_their_method() -> None:
    from peanut.tuners.lora import LoraLayer
    from peanut.tuners.peanut import PeanutConfig, PeanutLayer
    from peanut.tuners.tuners_utils import BaseTunerLayer

    from peanut.tuners import lora

    model = get_peft_model(net(), lora.LoraConfig(target_modules=["0"]))
    model.add_adapter("b", PeanutConfig(target_modules=["1"]))
    found = [[isinstance(layer, kind) for kind in (LoraLayer, PeanutLayer, BaseTunerLayer)] for layer in model.model]
    assert found == [[True, False, True], [False, True, True]]
    assert not isinstance(net()[0], LoraLayer)
    assert lora.LoraModel is peanut.LoraModel


def test_modules_are_there_without_an_import_of_their_own() -> None:
    code = (
        "import peanut; print(peanut.utils.TaskType.__name__, peanut.optimizers.__name__, peanut.tuners.lora.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["TaskType", "peanut.optimizers", "peanut.tuners.lora"]


def test_tables_are_those_of_hugging_face_peft() -> None:
    from peanut import utils

    theirs = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    ours = utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert sorted(ours["llama"]) == sorted(theirs["llama"])
    ia3 = utils.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    assert ia3["llama"] == peft.utils.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING["llama"]
    prefixes = peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING
    both = {kind for kind in peanut.PEFT_TYPE_TO_PREFIX_MAPPING if kind in prefixes}
    assert len(both) > 20
    assert {kind: peanut.PEFT_TYPE_TO_PREFIX_MAPPING[kind] for kind in both} == {kind: prefixes[kind] for kind in both}
    assert peanut.PEFT_TYPE_TO_CONFIG_MAPPING["LORA"] is LoraConfig
    assert peanut.PEFT_TYPE_TO_TUNER_MAPPING["LORA"] is peanut.LoraModel
    assert "PROMPT_TUNING" not in peanut.PEFT_TYPE_TO_TUNER_MAPPING
    assert (utils.CONFIG_NAME, utils.WEIGHTS_NAME) == (peft.utils.CONFIG_NAME, peft.utils.WEIGHTS_NAME)
    assert utils.SAFETENSORS_WEIGHTS_NAME == peft.utils.SAFETENSORS_WEIGHTS_NAME


def test_tables_have_methods_that_are_registered_later(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = ("CONFIG", "TUNER", "MIXED_MODEL", "PREFIX")
    found = [getattr(peanut, f"PEFT_TYPE_TO_{name}_MAPPING") for name in tables]
    before = [len(table) for table in found]

    @dataclasses.dataclass(kw_only=True)
    class LateConfig(LoraConfig):
        method = "LATE"

    class Late(Lora):
        config_class = LateConfig

    monkeypatch.setitem(METHODS, "LATE", Late())
    assert [len(table) for table in found] == [length + 1 for length in before]
    assert [found[0]["LATE"], found[3]["LATE"]] == [LateConfig, "late_"]
    assert found[1]["LATE"].method == found[2]["LATE"].method == "LATE"
    assert "NONE" not in found[0]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


@pytest.mark.parametrize("task", sorted(peanut.MODEL_TYPE_TO_PEFT_MODEL_MAPPING))
def test_models_are_of_the_class_of_their_task(task: str) -> None:
    kind = peanut.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task]
    model = get_peft_model(net(), LoraConfig(target_modules=["0"], task_type=task))
    assert isinstance(model, kind)
    assert type(model).__name__ == peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task].__name__
    direct = kind(net(), LoraConfig(target_modules=["0"]))
    assert isinstance(direct, (kind, getattr(peft, kind.__name__)))
    assert isinstance(pickle.loads(pickle.dumps(direct)), kind)
    mixed = get_peft_model(net(), LoraConfig(target_modules=["0"]), mixed=True)
    assert isinstance(mixed, peanut.PeftMixedModel)


def test_errors_are_caught_by_the_names_that_they_have_there() -> None:
    with pytest.raises(peanut.NoMatchingPeftModuleError, match="no module of Sequential"):
        get_peft_model(net(), LoraConfig(target_modules=["nowhere"]))
    with pytest.raises(peanut.PeftError):
        LoraConfig(r=-1)


def test_the_base_is_read_and_written_by_its_own_keys() -> None:
    base = net()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    model = get_peft_model(base, LoraConfig(target_modules=["0"], bias="all", modules_to_save=["1"]))
    held = peanut.get_base_model_state_dict(model)
    assert held.keys() == before.keys()
    assert all(torch.equal(held[key], before[key]) for key in before)
    found = peanut.set_base_model_state_dict(model, {key: value + 1 for key, value in before.items()})
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    assert torch.equal(model.get_base_model()[0].base_layer.weight, before["0.weight"] + 1)
    with pytest.raises(peanut.PeanutError, match="lacks 1 keys"):
        peanut.set_base_model_state_dict(model, {key: before[key] for key in before if key != "0.bias"})


FUNCTIONS = sorted(
    name
    for name in set(peft.__all__) & set(peanut.__all__)
    if inspect.isfunction(getattr(peft, name)) and inspect.isfunction(getattr(peanut, name))
)
CALLED = [
    name
    for name, function in inspect.getmembers(peft.PeftModel, callable)
    if name in vars(peft.PeftModel) and not name.startswith("_") and hasattr(peanut.PeftModel, name)
]
VARIABLE = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def parameters(function: Any) -> list[tuple[str, Any]]:
    found = inspect.signature(function).parameters.values()
    return [(each.name, each.default) for each in found if each.kind not in VARIABLE]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_take_what_they_take_there(name: str) -> None:
    theirs, ours = parameters(getattr(peft, name)), parameters(getattr(peanut, name))
    assert [own for own, _ in ours[: len(theirs)]] == [own for own, _ in theirs]


@pytest.mark.parametrize("name", CALLED)
def test_methods_take_what_they_take_there(name: str) -> None:
    theirs, ours = parameters(getattr(peft.PeftModel, name)), parameters(getattr(peanut.PeftModel, name))
    assert [own for own, _ in ours[: len(theirs)]] == [own for own, _ in theirs]


@pytest.mark.parametrize("name", sorted(set(peft.__all__) & {each for each in peanut.__all__ if "Config" in each}))
def test_configs_have_the_fields_that_they_have_there(name: str) -> None:
    if inspect.isclass(getattr(peft, name)) and name != "PromptLearningConfig":
        lacking = dict(parameters(getattr(peft, name))).keys() - dict(parameters(getattr(peanut, name))).keys()
    else:
        lacking = set()
    assert not lacking


DIFFERENT = {
    ("CPTConfig", "task_type"): (None, "CAUSAL_LM"),  # there it has to be given
    ("FourierFTConfig", "scaling"): (150.0, 300.0),
    ("OFTConfig", "r"): (0, None),  # 8 if oft_block_size is not given
    ("OFTConfig", "oft_block_size"): (32, None),
    ("OFTConfig", "use_cayley_neumann"): (True, False),
}
"""Defaults that are not Hugging Face PEFT's: of a class and a field, theirs and ours."""


def defaults(config_class: Any) -> dict[str, Any]:
    return {field.name: default_of(field) for field in dataclasses.fields(config_class) if field.name != "peft_type"}


def test_defaults_are_those_of_hugging_face_peft_but_for_these() -> None:
    shared = {name for name in set(peft.__all__) & set(peanut.__all__) if name.endswith("Config")}
    found = {
        (name, field): (theirs, own[field])
        for name in shared
        for own in [defaults(getattr(peanut, name))]
        for field, theirs in defaults(getattr(peft, name)).items()
        if theirs != own[field] and field != "runtime_config"
    }
    assert len(shared) > 20
    assert found == DIFFERENT


def test_the_first_seven_values_need_no_names() -> None:
    given = "CAUSAL_LM", None, None, None, "some/base", "main", True
    first = list(inspect.signature(peft.LoraConfig).parameters)[: len(given)]
    for library in (peft, peanut):
        own = library.LoraConfig(*given)
        assert [getattr(own, name) for name in (first[0], *first[4:])] == ["CAUSAL_LM", *given[4:]]
    with pytest.raises(peanut.PeanutError, match=r"^LoraConfig is given 8 without a name; expected keywords, but for "):
        peanut.LoraConfig(*given, 8)


def saved(folder: Path) -> dict[str, torch.Tensor]:
    model = get_peft_model(net(), LoraConfig(target_modules=["0"], init_lora_weights=False))
    model.save_pretrained(folder)
    return peanut.load_peft_weights(folder)


def test_tensors_of_another_shape_can_be_skipped(tmp_path: Path) -> None:
    state = saved(tmp_path)
    (first, *_) = sorted(state)
    model = get_peft_model(net(), LoraConfig(target_modules=["0"]))
    found = peanut.set_peft_model_state_dict(model, state)
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    wrong = state | {first: torch.ones(3, 3)}
    with pytest.raises(peanut.PeanutError, match=r"shape \(3, 3\)"):
        peanut.set_peft_model_state_dict(model, wrong)
    with pytest.warns(UserWarning, match="another shape"):
        found = peanut.set_peft_model_state_dict(model, wrong, ignore_mismatched_sizes=True)
    assert found.missing_keys == [first.removeprefix("base_model.model.")]
    assert torch.equal(peanut.get_peft_model_state_dict(model)[first], state[first])
    other = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match="another shape"):
        loaded = peanut.PeftModel.from_pretrained(other, tmp_path, ignore_mismatched_sizes=True, check_base=False)
    assert loaded(torch.ones(1, 5)).isfinite().all()


def test_keys_are_renamed_as_asked(tmp_path: Path) -> None:
    state = saved(tmp_path)
    base = nn.Sequential(nn.Sequential(*net()))
    model = get_peft_model(base, LoraConfig(target_modules=["0.0"]))
    renamed = peanut.load_peft_weights(tmp_path, key_mapping={r"^0\.": "0.0."})
    peanut.set_peft_model_state_dict(model, renamed)
    inner = peanut.get_peft_model_state_dict(model)
    assert {key.replace("model.0.0.", "model.0."): value.sum() for key, value in inner.items()} == {
        key: value.sum() for key, value in state.items()
    }


def test_what_is_missing_is_allowed_by_the_switch_that_the_error_names(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(net(), peft.LoraConfig(target_modules=["0"], init_lora_weights=False))
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / NAME)
    (first, *rest) = sorted(state)
    save_file({key: state[key] for key in rest} | {"base_model.model.9.weight": torch.ones(1)}, tmp_path / NAME)
    with pytest.raises(peanut.PeanutError, match=r"lacks 0\.lora_A.*unexpected 9\.weight.*or pass strict=False$"):
        peanut.PeftModel.from_pretrained(net(), tmp_path)
    with pytest.warns(UserWarning, match=r"lacks 0\.lora_A.* stays as it is here"):
        model = peanut.PeftModel.from_pretrained(net(), tmp_path, strict=False)
    found = peanut.get_peft_model_state_dict(model)
    assert all(torch.equal(found[key], state[key]) for key in rest)
    assert found[first].isfinite().all()
    with pytest.warns(UserWarning, match="lacks"):
        loaded = model.load_adapter(tmp_path, "other", strict=False)
    assert (loaded.missing_keys, loaded.unexpected_keys) == ([first.removeprefix("base_model.model.")], ["9.weight"])
    with pytest.warns(UserWarning, match="lacks"):
        peanut.set_peft_model_state_dict(model, {key: state[key] for key in rest}, strict=False)


def test_a_name_that_matches_nothing_is_allowed_by_the_pattern_that_the_error_names() -> None:
    with pytest.raises(peanut.PeanutError, match=r"names 'typo'.*give one pattern") as refused:
        get_peft_model(net(), LoraConfig(target_modules=["0", "typo"]))
    (pattern,) = re.findall(r"r'(.*)'$", str(refused.value))
    assert pattern == r"(.*\.)?(0|typo)"
    model = get_peft_model(net(), LoraConfig(target_modules=pattern))
    assert model.base_model.targeted_module_names == ["0"]


def test_another_base_is_allowed_by_the_switch_that_the_error_names(tmp_path: Path) -> None:
    state = saved(tmp_path)
    other = net()
    nn.init.ones_(other[0].weight)  # type: ignore[arg-type]
    peanut.get_peft_model(net(), LoraConfig(target_modules=["0"], init_lora_weights=False)).save_pretrained(tmp_path)
    with pytest.raises(peanut.PeanutError, match="check_base=False"):
        peanut.PeftModel.from_pretrained(other, tmp_path)
    found = peanut.get_peft_model_state_dict(peanut.PeftModel.from_pretrained(other, tmp_path, check_base=False))
    assert found.keys() == state.keys()
