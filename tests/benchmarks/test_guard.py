"""The guard lets through what stays within its bounds, and names what does not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
from benchmarks.guard import Block, Found

from benchmarks import guard

BOUND = 1.5


class Stub(Block):
    """A block whose ratios are given: for each attempt those of a case, the last for all that follow."""

    def __init__(self, attempts: dict[str, list[float]]) -> None:
        self.cases = tuple(attempts)
        self.attempts = {case: list(values) for case, values in attempts.items()}
        self.asked: list[tuple[tuple[str, ...], int]] = []

    def kept(self) -> Found:
        return {case: {"kept ÷ peer": 0.1} for case in self.cases}

    def times(self, cases: Iterable[str], rounds: int, pick: Callable[[Sequence[float]], float]) -> Found:
        self.asked.append((tuple(cases), rounds))
        found: Found = {}
        for case in cases:
            values = self.attempts[case]
            value = values.pop(0) if len(values) > 1 else values[0]
            found[case] = {"step ÷ frozen": value, "step ÷ peer": 1.0}
        return found


def bounds_of(block: Block) -> Found:
    return {case: {"step ÷ frozen": BOUND, "step ÷ peer": BOUND, "kept ÷ peer": 0.1} for case in block.cases}


def guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: Stub) -> int:
    file = tmp_path / "guard.json"
    file.write_text(json.dumps({"bounds": bounds_of(block)}))
    monkeypatch.setattr(guard, "Block", lambda: block)
    return guard.main(["--bounds", str(file)])


def test_what_stays_within_its_bounds_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = Stub({"A": [1.4], "B": [1.0]})
    assert guarded(tmp_path, monkeypatch, block) == 0
    assert block.asked == [(("A", "B"), guard.ROUNDS)]


def test_a_miss_is_measured_again_alone_and_forgiven_if_it_was_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = Stub({"A": [1.9, 1.8, 1.2], "B": [1.0]})
    assert guarded(tmp_path, monkeypatch, block) == 0
    assert block.asked == [(("A", "B"), 10), (("A",), 20), (("A",), 40)]


def test_what_stays_slow_fails_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(tmp_path, monkeypatch, Stub({"A": [1.9, 1.8, 1.85], "B": [1.0]})) == 1
    told = capsys.readouterr()
    assert told.err.startswith("error: A: step ÷ frozen is 1.8; expected at most 1.5; find what made it so")
    assert told.err.count("\n") == 1
    assert "1.8/1.5!" in told.out


def test_a_missing_or_superfluous_bound_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "guard.json"
    block = Stub({"A": [1.0], "B": [1.0]})
    monkeypatch.setattr(guard, "Block", lambda: block)
    for change, message in (
        (lambda bounds: bounds.pop("B"), "bounds nothing of B"),
        (lambda bounds: bounds["B"].pop("step ÷ peer"), "of B; expected kept ÷ peer, step ÷ frozen, step ÷ peer"),
        (lambda bounds: bounds["B"].pop("kept ÷ peer"), "of B; expected kept ÷ peer, step ÷ frozen, step ÷ peer"),
        (lambda bounds: bounds.update({"C": {}}), "bounds nothing of C; expected no such case"),
        (lambda bounds: bounds.update({"B": 3}), "no bounds in"),
    ):
        bounds = bounds_of(block)
        change(bounds)  # type: ignore[no-untyped-call]
        file.write_text(json.dumps({"bounds": bounds}))
        assert guard.main(["--bounds", str(file)]) == 2
        assert message in capsys.readouterr().err
    assert block.asked == []
    assert guard.main(["--bounds", str(tmp_path / "none.json")]) == 2


def test_bounds_are_what_is_found_with_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(guard, "METHODS", ("FOURIERFT", "LORA"))
    for name, value in (("NARROW", 16), ("WIDE", 24), ("TOKENS", 8), ("RANK", 2), ("ROUNDS", 2)):
        monkeypatch.setattr(guard, name, value)
    monkeypatch.setattr(guard, "Block", lambda: Block(guard.METHODS))
    file = tmp_path / "guard.json"
    assert guard.main(["--bounds", str(file), "--update"]) == 0
    bounds = json.loads(file.read_text())["bounds"]
    assert set(bounds) == {"FOURIERFT", "LORA"}
    assert set(bounds["LORA"]) - {"kept ÷ peer"} == {"step ÷ frozen", "step ÷ peer"}
    assert set(bounds["FOURIERFT"]) >= {"token ÷ frozen", "token ÷ peer", "kept ÷ peer"}
    kept = Block(("FOURIERFT", "LORA")).kept()
    assert bounds["FOURIERFT"]["kept ÷ peer"] == pytest.approx(1.02 * kept["FOURIERFT"]["kept ÷ peer"], rel=1e-3)
    wide = {case: dict.fromkeys(own, 1000.0) for case, own in bounds.items()}
    file.write_text(json.dumps({"bounds": wide}))
    assert guard.main(["--bounds", str(file)]) == 0
    assert "FOURIERFT" in capsys.readouterr().out
