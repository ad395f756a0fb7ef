"""Every public name of Hugging Face PEFT for what we have is here too; of the others it is said what to use."""

from __future__ import annotations

import importlib
import pickle
import re

import peft
import pytest
import torch
from torch import nn

import peanut
from peanut import LoraConfig, get_peft_model

from ..support import PEER_WARNINGS

pytestmark = PEER_WARNINGS

PENDING = {
    "convert_to_lora",
    "get_layer_status",
    "get_model_status",
    "rescale_adapter_scale",
    "save_as_lora",
}
"""Names that are added elsewhere."""
MODULES = ("", ".helpers", ".tuners", ".utils")


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
    assert silent <= PENDING
    assert all(getattr(ours, name) is not None for name in ours.__all__)


@pytest.mark.parametrize("module", ["peanut", "peanut.utils", "peanut.tuners"])
def test_importing_what_is_not_here_says_what_to_use(module: str) -> None:
    with pytest.raises(ImportError, match=r"'LoHaConfig': .*use LoraConfig"):
        exec(f"from {module} import LoHaConfig", {})
    with pytest.raises(ImportError, match="cannot import name 'Typo'"):
        exec(f"from {module} import Typo", {})


def test_tables_are_those_of_hugging_face_peft() -> None:
    from peanut import utils

    theirs = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    ours = utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert sorted(ours["llama"]) == sorted(theirs["llama"])
    ia3 = utils.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    assert ia3["llama"] == peft.utils.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING["llama"]
    assert peanut.PEFT_TYPE_TO_CONFIG_MAPPING["LORA"] is LoraConfig
    assert peanut.PEFT_TYPE_TO_TUNER_MAPPING["LORA"] is peanut.LoraModel
    assert "PROMPT_TUNING" not in peanut.PEFT_TYPE_TO_TUNER_MAPPING
    assert (utils.CONFIG_NAME, utils.WEIGHTS_NAME) == (peft.utils.CONFIG_NAME, peft.utils.WEIGHTS_NAME)
    assert utils.SAFETENSORS_WEIGHTS_NAME == peft.utils.SAFETENSORS_WEIGHTS_NAME


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
