"""Every method as LoRA: exact where ΔW is a thin product, the best of a rank elsewhere, and readable by the peer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from peanut import to_lora
from peanut.cli.app import app
from peanut.lab.catalogue import catalogue
from peanut.model.adapters.adapter_set import AdapterSet
from peanut.protocols import METHODS

from ..support import FIRST_CASES, PEER_WARNINGS, Case, change_in_output, distance, one_thread, peer_loaded  # noqa: F401

pytestmark = PEER_WARNINGS
CASES = [case for case in FIRST_CASES if case.kind in METHODS["LORA"].kinds]
EXACT = {entry.name for entry in catalogue() if entry.exact_as_lora}
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@every_case
def test_at_full_rank_nothing_is_lost(case: Case, tmp_path: Path) -> None:
    model, x = case.adapted(dtype=torch.float32), case.input(torch.float32)
    expected = model(x)
    layer = next(layer for _, layer in AdapterSet.of(model).layers())
    least = min(layer.frozen.out_features, layer.frozen.in_features)
    export = to_lora(model, rank=None if case.method in EXACT else least)
    assert export.largest_error < 1e-5
    assert export.rank <= (3 * least if case.method in EXACT else least)
    model.set_adapter(export.name)
    assert change_in_output(model, case.net(torch.float32), x) > 0.02
    assert distance(model(x), expected) < 1e-5
    export.save(tmp_path)
    assert distance(peer_loaded(case.net(torch.float32), tmp_path)(x), expected) < 1e-5


@every_case
def test_a_smaller_rank_is_the_best_there_is_and_says_how_good(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    model = case.adapted(dtype=torch.float32)
    layer = next(layer for _, layer in AdapterSet.of(model).layers())
    values = torch.linalg.svdvals(layer.delta("default").double())
    export = to_lora(model, rank=2)
    assert export.rank <= 2
    left = values[2:].norm() / values.norm() if values.norm() > 0 else torch.zeros(())
    assert export.largest_error == pytest.approx(float(left), abs=1e-5)
    assert (f"{case.method} as LoRA of rank" in capsys.readouterr().out) == (left > 1e-5)


def test_the_command_takes_a_rank(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", "--help"], env={"COLUMNS": "120"})
    assert "--rank" in result.stdout
