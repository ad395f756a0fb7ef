"""Warnings show the line of the user's code, however deep in the library their reason is found."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import peanut
from peanut import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model

from .support import one_thread  # noqa: F401

CONFIG = LoraConfig(r=2, target_modules=["0"])


def base(kept: bool = False) -> Any:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    if kept:
        model.kept = [model[0].weight]
    return model


def merged_beside_a_hook(folder: Path) -> None:
    model = get_peft_model(base(), CONFIG)
    model.get_base_model()[0].base_layer.register_forward_hook(lambda *_: None)
    model.merge_adapter()


def edited(folder: Path) -> Path:
    get_peft_model(base(), CONFIG).save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    return folder


CALLS: dict[str, Callable[[Path], object]] = {
    "a weight that is kept": lambda folder: get_peft_model(base(kept=True), CONFIG),
    "the same, injected": lambda folder: inject_adapter_in_model(CONFIG, base(kept=True)),
    "no embeddings": lambda folder: get_peft_model(base(), CONFIG).save_pretrained(folder, save_embedding_layers=True),
    "a config that was edited": lambda folder: PeftModel.from_pretrained(base(), edited(folder), check_base=False),
    "a hook on a base layer": merged_beside_a_hook,
}


@pytest.mark.parametrize("what", CALLS)
def test_a_warning_shows_the_line_that_called_the_library(what: str, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        CALLS[what](tmp_path)
    assert [Path(each.filename) for each in found] == [Path(__file__)]


def test_all_are_given_by_one_function_but_those_within_a_forward() -> None:
    """There the caller is torch, and a number of frames would be no better."""
    folder = Path(peanut.__file__).parent
    within = {"model/layers/output.py", "model/layers/weight.py", "model/adapters/training_hooks.py"}
    files = {path.relative_to(folder).as_posix(): path.read_text("utf-8") for path in folder.rglob("*.py")}
    asked = {path for path, text in files.items() if re.search(r"warnings\.warn\(|stacklevel", text)}
    assert asked == within | {"errors.py"}
