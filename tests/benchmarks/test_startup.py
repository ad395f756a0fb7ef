"""The measurement of what a user waits for, on models small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import startup


def test_it_measures_prints_and_writes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    monkeypatch.setattr(startup, "SEVEN_B", small)
    monkeypatch.setattr(startup, "SMALL", small)
    monkeypatch.setattr(startup, "RANK_OF_100_MB", 4)
    monkeypatch.setattr(startup, "IMPORTS", {"import peanut": "import peanut"})
    assert startup.main(["--repeats", "2", "--output", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("startup-*.json")
    seconds = json.loads(file.read_text())["seconds"]
    assert {what: list(found) for what, found in seconds.items()} == {
        "import": ["import peanut"],
        "inject into 7B": ["the model alone", "with LoRA", "with LoRA by peft", "with PEANuT"],
        "load 100 MB": ["peanut", "peft", "reading the file's tensors"],
    }
    for found in seconds.values():
        for least, median, most in found.values():
            assert 0 < least <= median <= most
    assert capsys.readouterr().out.count("\n") == 9
