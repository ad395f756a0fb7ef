"""The table of methods on the demo's task: every method takes part, and a short run ends in a table and a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.every_method import CONTESTANTS, main

from benchmarks import every_method
from peanut.lab.reviews import Contestant
from peanut.protocols import METHODS, PeftConfig


def config_of(contestant: Contestant) -> PeftConfig:
    return PeftConfig.from_dict(contestant.adapter)


def test_every_method_takes_part() -> None:
    elsewhere = {"ADAPTION_PROMPT", "CPT", "XLORA"}  # for causal models, or over trained adapters
    assert {config_of(each).method for each in CONTESTANTS.values()} == METHODS.keys() - elsewhere


def test_a_method_for_which_no_rate_was_looked_for_joins_with_its_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {config_of(each).method for each in every_method._others().values()} == {"LOKR", "ROAD"}
    left = {name: each for name, each in CONTESTANTS.items() if config_of(each).method not in ("OFT", "FULL", "C3A")}
    monkeypatch.setattr(every_method, "_TUNED", left)
    found = every_method._others()
    assert {name: found[name] for name in ("C3A", "FULL", "OFT")} == {
        "C3A": Contestant({"peft_type": "C3A", "block_size": 128}, 5e-3),
        "FULL": Contestant({"peft_type": "FULL"}, 5e-3),
        "OFT": Contestant({"peft_type": "OFT", "oft_block_size": 32, "r": 0}, 5e-3),
    }


def test_a_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["linear probing", "LoRA", "variational LoRA"]
    code = main(["--output", str(tmp_path), "--rows", "32", "--held-back", "16", "--only", *names])
    found = json.loads((tmp_path / "outcomes.json").read_text())
    assert [outcome["method"] for outcome in found["outcomes"]] == names
    assert found["methods"]["LoRA"]["r"] == 8
    assert set(found["calibration"]) == {"samples", "LoRA", "variational LoRA, mean", "variational LoRA, averaged"}
    assert (tmp_path / "methods.png").stat().st_size > 10_000
    probe, *others = (outcome["accuracy"] for outcome in found["outcomes"])
    assert code == int(any(other <= probe for other in others))
    assert "trained parameters" in capsys.readouterr().out


def test_a_wrong_name_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--output", str(tmp_path), "--only", "LORAA"]) == 2
    assert "error: --only 'LORAA'; expected names of the table; nearest: 'LoRA'" in capsys.readouterr().err
