"""Files are whole or not there, and what goes wrong is told in one line."""

from __future__ import annotations

import json
import os
import stat
import threading
import time
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peanut.errors import PeanutError, check_keywords, nearest, shown
from peanut.files import locked, make_folder, read_json, write_files, write_folder, write_json


def fail_after_writing(path: Path) -> None:
    path.write_text("half")
    raise OSError(28, "No space left on device")


def test_error_is_one_line_of_finding_expectation_and_remedy() -> None:
    error = PeanutError("r=0", "a whole number\n  above 0", "set r")
    assert str(error) == "r=0; expected a whole number above 0; set r"
    assert isinstance(error, ValueError)
    assert str(PeanutError("r=0", do="set r")) == "r=0; set r"


def test_nearest_puts_the_likest_first() -> None:
    assert nearest("qproj", ["v_proj", "q_proj", "lm_head"]).startswith("'q_proj'")
    assert nearest("zzz", ["b", "a"]) == "'a', 'b'"
    assert nearest("zzz", []) == ""


def test_make_folder_makes_parents_and_leaves_no_trace(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a" / "b")
    assert folder.is_dir()
    assert os.listdir(folder) == []
    assert make_folder(folder) == folder


def test_make_folder_refuses_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    for path in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(PeanutError, match=r"cannot write into folder .*; free some space or choose another folder"):
            make_folder(path)


def test_make_folder_refuses_what_cannot_be_written() -> None:
    with pytest.raises(PeanutError, match="cannot write into folder '/proc/peanut'"):
        make_folder("/proc/peanut")  # refused to root too, as tests often run as root


def test_write_files_writes_all(tmp_path: Path) -> None:
    weights = {"a": torch.arange(6.0).view(2, 3)}
    folder = write_files(
        tmp_path / "new",
        {"w.safetensors": lambda path: save_file(weights, path), "n.txt": lambda path: path.write_text("n")},
    )
    assert sorted(os.listdir(folder)) == ["n.txt", "w.safetensors"]
    assert torch.equal(load_file(folder / "w.safetensors")["a"], weights["a"])
    mask = os.umask(0)
    os.umask(mask)
    assert {stat.S_IMODE((folder / name).stat().st_mode) for name in os.listdir(folder)} == {0o666 & ~mask}


def test_write_files_that_fails_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("before")
    with pytest.raises(PeanutError, match=r"cannot write a\.txt, b\.txt into .*No space left on device"):
        write_files(tmp_path, {"a.txt": lambda path: path.write_text("after"), "b.txt": fail_after_writing})
    assert os.listdir(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "before"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the always full device of Linux")
def test_a_disk_that_is_full_for_safetensors_is_told(tmp_path: Path) -> None:
    def to_full_disk(_: Path) -> None:
        save_file({"a": torch.zeros(2)}, "/dev/full/a")

    with pytest.raises(PeanutError, match=r"cannot write a\.safetensors"):
        write_files(tmp_path, {"a.safetensors": to_full_disk})
    assert os.listdir(tmp_path) == []


def test_write_files_lets_a_bug_through_and_cleans_up(tmp_path: Path) -> None:
    def bug(_: Path) -> None:
        raise KeyError("bug")

    with pytest.raises(KeyError, match="bug"):
        write_files(tmp_path, {"a.txt": bug})
    assert os.listdir(tmp_path) == []


def test_json_is_sorted_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    write_json(path, {"b": [1, 2.5], "a": None})
    assert path.read_text() == '{\n  "a": null,\n  "b": [\n    1,\n    2.5\n  ]\n}\n'
    assert read_json(path) == {"a": None, "b": [1, 2.5]}


def test_write_json_of_what_json_cannot_hold_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    write_json(path, 1)
    with pytest.raises(TypeError):
        write_json(path, object())
    assert json.loads(path.read_text()) == 1


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe\x00"])
def test_read_json_refuses_a_broken_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c.json"
    path.write_bytes(content)
    with pytest.raises(PeanutError, match=r"cannot read '.*c\.json'.*expected a whole JSON file; save it again"):
        read_json(path)


def test_read_json_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(PeanutError, match=r"no file '.*c\.json'; expected a JSON file there"):
        read_json(tmp_path / "c.json")


@pytest.mark.parametrize("length", [10, 799, 801, 100_000])
def test_an_error_cuts_what_is_long(length: int) -> None:
    value = "x" * length
    for error in (
        PeanutError(f"a={value}", value, value),
        PeanutError(f"a={value!r}", "b", detail="tree\nof\nmodules"),
    ):
        line, _, detail = str(error).partition("\n")
        assert line.startswith("a=")
        assert len(line) < 2600
        assert ("…" in line) == (length > 790)
        assert detail in ("", "tree\nof\nmodules")


def test_an_error_is_printable_whatever_it_holds() -> None:
    line = str(PeanutError("a\x00b\x1b[2J\u202e\ud800\n  c", "é → ß"))
    assert line == "a\\x00b\\x1b[2J\\u202e\\ud800 c; expected é → ß"


class Wild:
    def __repr__(self) -> str:
        raise RuntimeError("no name")


def test_values_are_shown_short_and_always() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    values = ("x" * 10**6, list(range(10**5)), {"a": ["b"] * 10**5}, 10**5000, deep, Wild(), b"\0" * 10**6)
    assert all(len(shown(value)) < 1000 for value in values)
    assert [shown(value) for value in ("a", 1.5, None, [1, "b"], {"a": True})] == [
        "'a'",
        "1.5",
        "None",
        "[1, 'b']",
        "{'a': True}",
    ]
    while deep:  # or its end would be found by recursion
        deep = deep.pop()


def test_the_nearest_of_very_many_is_found_soon() -> None:
    names = [f"model.layers.{index}.self_attn.q_proj" for index in range(50_000)]
    start = perf_counter()
    assert nearest("model.layers.49999.self_attn.q_prj", names, 1) == "'model.layers.49999.self_attn.q_proj'"
    assert nearest("x" * 10**6, ["y" * 10**6, "xx"], 1) == "'xx'"
    assert perf_counter() - start < 10


def test_keywords_are_known_or_told() -> None:
    known, harmless = ("revision", "token"), {"device": None, "upload": (False, None)}
    assert check_keywords("f", {"token": 1, "device": 2, "upload": False}, known, harmless) == {"token": 1}
    with pytest.raises(
        PeanutError, match=r"^f is given 'revison'; expected keywords that it knows .*nearest: 'revision'"
    ):
        check_keywords("f", {"revison": 1}, known, harmless)
    with pytest.raises(
        PeanutError, match=r"^f is given upload=True, which it does not do; expected False or None; leave"
    ):
        check_keywords("f", {"upload": True}, known, harmless)


# What was left by processes that were killed


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    others = [".a.txt.swp", ".b.txt.abcdefgh", ".a.txt.ABCDEFGH", "a.txt.abcdefgh", ".a.txt.abcdefghi"]
    for name in (".a.txt.abcdefgh", ".a.txt.0_12345z", *others):
        (tmp_path / name).write_text("half")
    write_files(tmp_path, {"a.txt": lambda path: path.write_text("whole")})
    assert sorted(os.listdir(tmp_path)) == sorted(["a.txt", *others])


def test_two_writers_wait_for_each_other(tmp_path: Path) -> None:
    left, written = tmp_path / ".a.txt.abcdefgh", []
    with locked(tmp_path) as alone:
        assert alone
        left.write_text("of a writer at work")
        other = threading.Thread(target=write_files, args=(tmp_path, {"a.txt": written.append}))
        other.start()
        other.join(0.1)
        assert not written
        assert left.exists()
    other.join(10)
    assert written
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_writer_does_not_wait_for_ever_and_then_removes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peanut.files._PATIENCE", 0.05)
    left = tmp_path / ".a.txt.abcdefgh"
    left.write_text("of a writer at work")
    with locked(tmp_path):
        write_files(tmp_path, {"a.txt": lambda path: path.write_text("b")})
    assert sorted(os.listdir(tmp_path)) == [left.name, "a.txt"]


@pytest.mark.parametrize("cause", ["no such module", "no such locks"])
def test_without_locks_files_are_written_and_nothing_is_removed(
    cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    if cause == "no such module":
        monkeypatch.setattr("peanut.files.fcntl", None)
    else:
        monkeypatch.setattr("fcntl.flock", refuse)
    (tmp_path / ".a.txt.abcdefgh").write_text("left")
    write_files(tmp_path, {"a.txt": lambda path: path.write_text("b")})
    write_folder(tmp_path / "f", lambda folder: (folder / "c.txt").write_text("d"))
    assert sorted(os.listdir(tmp_path)) == [".a.txt.abcdefgh", "a.txt", "f"]


def test_folders_that_killed_processes_were_making_are_removed(tmp_path: Path) -> None:
    for name in (".f.123", f".f.{os.getpid()}", ".f.77", ".f.other", ".g.123"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("")
    with locked(tmp_path / ".f.77"):  # its writer is at work
        write_folder(tmp_path / "f", lambda folder: (folder / "whole").write_text(""))
    assert sorted(os.listdir(tmp_path)) == [".f.77", ".f.other", ".g.123", "f"]
    assert os.listdir(tmp_path / "f") == ["whole"]


def test_what_makes_a_folder_may_write_files_into_it_at_once(tmp_path: Path) -> None:
    begun = time.monotonic()
    write_folder(tmp_path / "f", lambda folder: write_json(folder / "a.json", 1))
    assert time.monotonic() - begun < 30  # it does not wait for its own lock
    assert os.listdir(tmp_path) == ["f"]
    assert read_json(tmp_path / "f" / "a.json") == 1


def test_a_folder_whose_making_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(PeanutError, match=r"^cannot write '.*f': .*No space left on device; free some space or choose"):
        write_folder(tmp_path / "f", lambda folder: fail_after_writing(folder / "half"))
    assert os.listdir(tmp_path) == []
