"""Names of modules in a config: a list as files hold it, and a set for scripts."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
from torch import nn

from peanut import AdaLoraConfig, LoraConfig, PeftConfig, get_peft_model
from peanut.protocols.names import Names


def test_names_are_a_list_that_equals_a_set() -> None:
    names = AdaLoraConfig(target_modules=["v", "q", "v"], total_step=9).target_modules
    assert names == {"q", "v"} == names
    assert names == ["q", "v"]
    assert names != {"q"}
    assert not names != {"q", "v"}  # noqa: SIM202 - a list has an operator of its own for it
    assert json.dumps(names) == '["q", "v"]'
    for other in (copy.deepcopy(names), pickle.loads(pickle.dumps(names))):
        assert (other, type(other)) == (names, Names)


def test_scripts_change_them_as_a_set() -> None:
    names = Names(["v", "q"])
    names |= {"k", "q"}
    names.update({"o"}, ["up"])
    names -= {"up", "none"}
    names.add("gate")
    names.discard("gone")
    assert names == ["gate", "k", "o", "q", "v"]
    assert names - {"gate"} == {"k", "o", "q", "v"}
    assert names & {"q"} == ["q"]
    assert names | {"a"} == ["a", *names]


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_what_was_added_is_adapted_and_saved_as_a_list(field: str, tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["0", "1"], exclude_modules=["2"])
    names = getattr(config, field)
    names |= {"2"}
    config.save_pretrained(tmp_path)
    assert type(config.to_dict()[field]) is list
    assert getattr(PeftConfig.from_pretrained(tmp_path), field) == names
    model = get_peft_model(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), LoraConfig(target_modules=names))
    assert set(model.base_model.targeted_module_names) == names
    names |= {"3"}
    assert "3" not in model.peft_config["default"].target_modules  # the model has its own


def test_names_are_compared_with_sets() -> None:
    names = Names(["b", "a"])
    assert {"a"} < names <= {"a", "b"}
    assert {"a", "b", "c"} >= names
    assert not names > {"a", "c"}
    assert names < ["c"]


def test_files_hold_each_name_once_in_order_however_the_list_was_written_to() -> None:
    config = LoraConfig(target_modules=["q", "v"])
    assert isinstance(config.target_modules, list)
    config.target_modules.append("k")
    config.target_modules += ["q"]
    assert config.to_dict()["target_modules"] == ["k", "q", "v"]
