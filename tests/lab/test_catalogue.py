"""The table of methods: complete, true, and the same as the page in the documentation."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from peanut.cli.app import app
from peanut.lab.catalogue import catalogue, markdown
from peanut.model.adapters.adapter_set import AdapterSet
from peanut.model.peft_model import get_peft_model
from peanut.protocols import METHODS

from ..support import CASES, Case, one_thread  # noqa: F401

PLAIN = [
    case
    for case in {
        (case.method, case.kind): case
        for case in reversed(CASES)
        if "boft_block_num" not in case.variant.options  # the formula is in the blocks' size
    }.values()
    if case.kind == ("norm" if METHODS[case.method].kinds == ("norm",) else METHODS[case.method].kinds[0])
]
"""The first config of each method on the first kind of layer it has."""


def test_the_page_is_the_registrys() -> None:
    page = Path(__file__).parents[2] / "docs" / "methods.md"
    assert page.read_text(encoding="utf-8") == markdown(), "run: peanut methods --markdown > docs/methods.md"


def test_every_method_is_there_with_its_source() -> None:
    entries = {entry.name: entry for entry in catalogue()}
    assert entries.keys() == METHODS.keys()
    for entry in entries.values():
        assert entry.change, entry.name
        assert entry.config.endswith("Config")
    sourced = {name for name, entry in entries.items() if "arXiv" in entry.title}
    assert entries.keys() - sourced <= {"FULL", "LINEAR_PROBING", "TRAINABLE_TOKENS"}


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_the_number_of_parameters_is_what_is_trained(case: Case) -> None:
    model = get_peft_model(case.net(), case.config())
    layer = next(layer for _, layer in AdapterSet.of(model).layers())
    config = layer.method_of("default")[1]
    names = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    d_out, d_in = layer.frozen.out_features, layer.frozen.in_features
    size = METHODS[case.method].size
    expected = eval(size, {"ceil": math.ceil, "min": min, "len": len}, names | {"d_in": d_in, "d_out": d_out})
    assert sum(parameter.numel() for parameter in layer.adapters["default"].parameters()) == expected


def test_what_is_called_exact_is_exact_and_nothing_else() -> None:
    exact = {entry.name for entry in catalogue() if entry.exact_as_lora}
    assert exact == {
        "ADALORA",
        "BONE",
        "HRA",
        "LORA",
        "MISS",
        "MULTIPLICATIVE_LORA",
        "NONLINEAR_LORA",
        "PEANUT",
        "VARIATIONAL_LORA",
        "VBLORA",
        "VERA",
    }


def test_the_command_lists_them() -> None:
    result = CliRunner().invoke(app, ["methods"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert all(name in result.stdout for name in METHODS)
    assert CliRunner().invoke(app, ["methods", "--markdown"]).stdout == markdown()
