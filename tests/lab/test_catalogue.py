"""The table of methods: complete, true, and the same as the page in the documentation."""

from __future__ import annotations

import dataclasses
import math
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import peanut
from peanut.cli.app import app
from peanut.lab import generated
from peanut.lab.catalogue import catalogue, markdown
from peanut.model.adapters.adapter_set import AdapterSet
from peanut.model.injection import AdaptedModel
from peanut.model.peft_model import get_peft_model
from peanut.protocols import METHODS, Trial, WeightMethod

from ..support import CASES, Case, Net, one_thread, randomised  # noqa: F401

PLAIN = [
    case
    for case in {
        (case.method, case.kind): case
        for case in reversed(CASES)
        if "boft_block_num" not in case.variant.options  # the formula is in the blocks' size
        and "where" not in METHODS[case.method].size  # the sizes of LoKr's matrices have no short formula
    }.values()
    if case.kind == ("norm" if METHODS[case.method].kinds == ("norm",) else METHODS[case.method].kinds[0])
]
"""The first config of each method on the first kind of layer it has."""


def test_the_generated_files_are_the_registrys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = Path(__file__).parents[2]
    assert set(generated.files()) == {"docs/methods.md", "src/peanut/__init__.pyi"}
    for path, text in generated.files().items():
        assert (repository / path).read_text(encoding="utf-8") == text, "run: make generated"
        (tmp_path / path).parent.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert generated.main() == 0
    for path, text in generated.files().items():
        assert (tmp_path / path).read_text(encoding="utf-8") == text


def test_the_types_are_those_of_the_names() -> None:
    found = {}
    for line in generated.stub().splitlines():
        if line.startswith("from "):
            _, module, _, name, _, public = line.split()
            found[public] = getattr(import_module(module, "peanut"), name)
        elif line.startswith("class "):
            name = re.split(r"[ (]", line)[1]
            found[name] = getattr(peanut, name)
            assert found[name].__bases__ == (found["_AdaptedModel"],)
    assert found.pop("_AdaptedModel") is AdaptedModel
    assert found == {name: getattr(peanut, name) for name in peanut.__all__ if name != "__version__"}


def test_every_method_is_there_with_its_source() -> None:
    entries = {entry.name: entry for entry in catalogue()}
    assert entries.keys() == METHODS.keys()
    for entry in entries.values():
        assert entry.change, entry.name
        assert entry.config.endswith("Config")
    sourced = {name for name, entry in entries.items() if "arXiv" in entry.title}
    assert entries.keys() - sourced == {"FULL", "LINEAR_PROBING", "TRAINABLE_TOKENS"}  # no paper's


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_the_number_of_parameters_is_what_is_trained(case: Case) -> None:
    model = get_peft_model(case.net(), case.config())
    layer = next(layer for _, layer in AdapterSet.of(model).layers())
    config = layer.method_of("default")[1]
    names = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    d_out, d_in = layer.frozen.out_features, layer.frozen.in_features
    size = METHODS[case.method].size
    expected = eval(size, {"ceil": math.ceil, "min": min, "len": len}, names | {"d_in": d_in, "d_out": d_out})
    assert sum(value.numel() for value in layer.adapters["default"] if isinstance(value, nn.Parameter)) == expected


def by_itself(method: Any) -> bool:
    """Whether it changes a linear layer by itself."""
    return (
        isinstance(method, WeightMethod) and "linear" in method.kinds and not method.mixes and not method.follows_ties
    )


@pytest.mark.parametrize(
    "method", [each for each in METHODS.values() if not by_itself(each)], ids=lambda each: each.name
)
def test_what_changes_no_layer_by_itself_is_not_called_exact(method: Any) -> None:
    [entry] = catalogue([method])
    assert not entry.exact_as_lora


@pytest.mark.parametrize("method", [each for each in METHODS.values() if by_itself(each)], ids=lambda each: each.name)
def test_what_is_called_exact_is_of_a_low_rank_and_nothing_else(method: Any) -> None:
    [entry] = catalogue([method])
    layer = torch.nn.Linear(512, 1024, dtype=torch.float64)
    needed = method.tried(Trial(shapes=[(1024, 512)])) or {}
    model = randomised(get_peft_model(Net(layer), method.config_class(target_modules=["layer"], **needed)).eval())
    [(_, adapted)] = AdapterSet.of(model).layers()
    values = torch.linalg.svdvals(adapted.delta("default"))
    rank = int((values > 1e-9 * values[0]).sum())
    assert entry.exact_as_lora == (0 < rank <= 256)


def test_the_command_lists_them() -> None:
    result = CliRunner().invoke(app, ["methods"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert all(name in result.stdout for name in METHODS)
    assert CliRunner().invoke(app, ["methods", "--markdown"]).stdout == markdown()
