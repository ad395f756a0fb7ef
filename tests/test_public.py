"""The public names, how they are imported, and the signature of PEANuT's documentation."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

import peanut
from peanut import PeanutConfig, PeanutModel, PeftModel

NAMES = [
    "PeanutConfig",
    "PeanutModel",
    "LoraConfig",
    "LoraModel",
    "TaskType",
    "get_peft_model",
    "PeftModel",
    "get_peft_model_state_dict",
    "set_peft_model_state_dict",
    "inject_adapter_in_model",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModel",
    "from_lora",
    "from_peft",
    "to_lora",
    "to_peft",
    "Trainer",
]

METHODS = [
    "from_pretrained",
    "save_pretrained",
    "load_adapter",
    "add_adapter",
    "set_adapter",
    "delete_adapter",
    "disable_adapter",
    "merge_adapter",
    "unmerge_adapter",
    "merge_and_unload",
    "unload",
    "print_trainable_parameters",
    "get_nb_trainable_parameters",
    "active_adapters",
    "peft_config",
    "generate",
    "get_base_model",
]

DOCUMENTED = {
    "task_type": None,
    "peft_type": "PEANUT",
    "auto_mapping": None,
    "peft_version": "0.21.2",
    "base_model_name_or_path": None,
    "revision": None,
    "inference_mode": False,
    "r": 32,
    "depth": 0,
    "act_fn": "relu",
    "scaling": 1.0,
    "target_modules": None,
    "exclude_modules": None,
    "modules_to_save": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "init_weights": True,
}
"""The fields of PEANuT's API documentation with their defaults (peft_type and peft_version are filled in)."""


def test_names_are_there() -> None:
    assert set(NAMES) <= set(peanut.__all__) == set(dir(peanut))
    assert all(hasattr(peanut, name) for name in peanut.__all__)
    assert all(hasattr(PeftModel, name) for name in METHODS)
    assert issubclass(PeanutModel, peanut.LoraModel.__mro__[1])
    with pytest.raises(AttributeError, match="no attribute 'PeanutConfg'"):
        _ = peanut.PeanutConfg


def test_a_star_imports_every_name() -> None:
    found: dict[str, object] = {}
    exec("from peanut import *", found)
    assert found.keys() - {"__builtins__"} == set(peanut.__all__)
    assert {"PromptTuningInit", "PromptEncoderReparameterizationType", "XLoraModel", "AdaLoraModel"} <= found.keys()
    assert not {"Lora", "CPTModel", "PromptTuningModel", "register"} & found.keys()


def test_config_has_the_documented_fields_and_three_more() -> None:
    config = PeanutConfig()
    fields = {field.name for field in dataclasses.fields(config)}
    assert fields == DOCUMENTED.keys() | {"side", "dropout", "rank_pattern"}
    assert {name: config.to_dict()[name] for name in DOCUMENTED} == DOCUMENTED
    assert config.to_dict() == DOCUMENTED  # the three are written only where they say something
    assert (config.side, config.dropout, config.rank_pattern) == ("out", 0.0, {})
    assert PeanutConfig(side="in", rank_pattern={"a": 2}).to_dict() == DOCUMENTED | {
        "side": "in",
        "rank_pattern": {"a": 2},
    }


@pytest.mark.parametrize(
    "used", ["peanut", "peanut.PeanutError", "peanut.LoraConfig, peanut.get_peft_model, peanut.PeftModel"]
)
def test_importing_costs_nothing(used: str) -> None:
    torch_too = "" if "Lora" in used else "'torch', "
    heavy = f"{{{torch_too}'transformers', 'datasets', 'pydantic', 'accelerate', 'peft', 'rich', 'matplotlib'}}"
    program = f"import sys, peanut; {used}; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout == "[]\n"


def test_what_the_core_imports_is_named_as_a_dependency() -> None:
    """But for models of another library, quantised ones, and what only type checkers import."""
    root = Path(peanut.__file__).parent
    imported = set()
    for path in root.rglob("*.py"):
        if path.relative_to(root).parts[0] not in ("training", "lab", "cli"):
            lines = re.findall(
                r"^\s*(?:from (\w+)\S* import|import (\w+))", path.read_text(encoding="utf-8"), re.MULTILINE
            )
            imported |= {one or other for one, other in lines} - sys.stdlib_module_names
    required = (root.parents[1] / "pyproject.toml").read_text().partition("\ndependencies = ")[2].partition("]")[0]
    assert imported - {"peft", "bitsandbytes", "deepspeed", "typing_extensions"} == set(
        re.findall(r'"(\w+)>=[\d.]+"', required)
    )


def test_core_needs_none_of_the_extras() -> None:
    extras = ["datasets", "sklearn", "pydantic", "matplotlib", "peft", "accelerate", "pandas", "gguf", "PIL"]
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({extras}))\n"
        "import torch, peanut\n"
        "net = torch.nn.Sequential(torch.nn.Linear(4, 4))\n"
        "model = peanut.get_peft_model(net, peanut.PeanutConfig(r=2, target_modules=['0']))\n"
        "print(model(torch.ones(1, 4)).shape)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.stdout == "torch.Size([1, 4])\n", result.stderr
