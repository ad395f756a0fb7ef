"""Arguments of public calls: flags given as text, swapped ones, and those that are not set."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import peanut
from peanut import LoraConfig, PeanutError, PeftModel, get_peft_model, inject_adapter_in_model

from ..support import Net, one_thread, refused  # noqa: F401

SOURCE = "pretrained_model_name_or_path"
CONFIG = LoraConfig(r=2, target_modules=["layer"])
WRONG: dict[str, tuple[Any, str]] = {
    "a path for a model": (lambda model: get_peft_model("here", CONFIG), "get_peft_model(model='here')"),  # type: ignore[arg-type]
    "swapped": (lambda model: get_peft_model(CONFIG, model), "get_peft_model(model=a LoraConfig)"),  # type: ignore[arg-type]
    "swapped when loading": (lambda model: PeftModel.from_pretrained("a", model), "from_pretrained(model='a')"),  # type: ignore[arg-type]
    "swapped when injecting": (
        lambda model: inject_adapter_in_model(model.get_base_model(), CONFIG),  # type: ignore[arg-type]
        "inject_adapter_in_model(model=a LoraConfig)",
    ),
    "a path for a model of a class": (lambda model: PeftModel("here", CONFIG), "PeftModel(model='here')"),  # type: ignore[arg-type]
    "a path to be converted": (lambda model: peanut.from_peft("here"), "from_peft(model='here')"),
    "a path to be exported": (lambda model: peanut.to_lora("here"), "to_lora(model='here')"),
    "no adapter": (
        lambda model: peanut.AutoPeftModel.from_pretrained(None),
        "from_pretrained(pretrained_model_name_or_path=None)",
    ),
    "no config": (
        lambda model: peanut.PeftConfig.from_pretrained(None),
        "from_pretrained(pretrained_model_name_or_path=None)",
    ),
    "no folder for a config": (lambda model: CONFIG.save_pretrained(None), "save_pretrained(save_directory=None)"),
    "no folder": (lambda model: model.save_pretrained(None), "save_pretrained(save_directory=None)"),
    "no folder to load": (lambda model: model.load_adapter(None, "a"), "load_adapter(model_id=None)"),
    "a flag of text": (
        lambda model: model.load_adapter("a", "b", is_trainable="no"),
        "load_adapter(is_trainable='no')",
    ),
    "a flag of a merge": (lambda model: model.merge_and_unload(safe_merge="no"), "merge_and_unload(safe_merge='no')"),
    "a flag by position": (lambda model: model.set_adapter("default", "x"), "set_adapter(inference_mode='x')"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_of_another_type_is_one_line(what: str) -> None:
    model = get_peft_model(Net(nn.Linear(4, 4)), CONFIG)
    call, message = WRONG[what]
    with refused(model, f"^{re.escape(message)}(; expected (a|the|True) |$)"):
        call(model)


def test_flags_may_be_numbers_and_paths_may_be_text(tmp_path: Path) -> None:
    model = get_peft_model(Net(nn.Linear(4, 4)), CONFIG, low_cpu_mem_usage=0)  # type: ignore[arg-type]
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(Net(nn.Linear(4, 4)), tmp_path, is_trainable=1, check_base=False)  # type: ignore[arg-type]
    assert again.training
    with pytest.raises(TypeError, match="unexpected keyword argument 'adaptername'"):
        get_peft_model(Net(nn.Linear(4, 4)), CONFIG, adaptername="a")  # type: ignore[call-arg]
    assert issubclass(PeanutError, ValueError)
