"""The command line: every subcommand on a real adapter, and errors in one line."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers as hf
import yaml
from transformers.utils import logging

from peanut import PeftModel
from peanut.cli import main
from peanut.training.model import load_trained

Call = Callable[..., str]


@pytest.fixture(autouse=True, scope="module")
def calm() -> Iterator[None]:
    """One thread, and transformers' messages afterwards as they were before a command silenced them."""
    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.fixture
def peanut(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs ``peanut`` with arguments and gives its standard output."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["peanut", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 0
        return capsys.readouterr().out

    return call


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs ``peanut`` with arguments that it must refuse, and gives the one line it says."""

    def call(*arguments: object) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["peanut", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err.startswith("error: ")
        assert told.err.count("\n") == 1
        return told.err

    return call


@pytest.fixture(scope="module")
def reviews(movie_reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 bad and 20 good reviews as CSV."""
    with movie_reviews.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(row for label in "01" for row in [row for row in rows if row["label"] == label][:20])
    return path


@pytest.fixture(scope="module")
def file(minilm: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's YAML file."""
    folder = tmp_path_factory.mktemp("run")
    path = folder / "run.yaml"
    config = {
        "model": {"path": str(minilm)},
        "task": "text-classification",
        "data": {"train": str(reviews), "max_length": 16},
        "adapter": {"r": 4, "scaling": 2.0},
        "training": {"steps": 2, "batch_size": 8, "learning_rate": 0.05},
        "output": str(folder / "out"),
    }
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def trained(file: Path) -> Path:
    """The folder of a run that ``peanut train`` made in a process of its own."""
    command = [sys.executable, "-c", "from peanut.cli import main; main()", "train", str(file)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=200)
    assert "Trained" in done.stdout
    assert "accuracy" in done.stdout
    assert "2/2" in done.stderr  # the progress bar
    assert "MISSING" not in done.stderr  # a new head is no news
    return file.parent / "out"


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=torch.arange(1000, 1012).reshape(2, 6)).logits
    return result


# Help


def test_help_lists_the_commands_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['peanut', '--help']\n"
        "from peanut.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'pydantic', 'sklearn'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=100).stdout
    assert out.rstrip().endswith("[]")
    for command in ("train", "eval", "generate", "merge", "export", "inspect", "bench"):
        assert f" {command} " in out


def test_help_of_train_lists_every_key(peanut: Call) -> None:
    out = peanut("train", "--help")
    for text in ("--model.path", "--data.max_length", "--training.schedule", "linear (cosine, constant)", "--adapter."):
        assert text in out


def test_bench_is_handed_on(peanut: Call) -> None:
    assert "--methods" in peanut("bench", "--help")


# Training


def test_dry_run_prints_the_plan_and_writes_nothing(peanut: Call, file: Path, tmp_path: Path) -> None:
    out = peanut("train", file, "--dry-run", "--output", tmp_path / "new", "--adapter.target_modules", "[query]")
    assert "bert.encoder.layer.*.attention.self.query (6)" in out
    assert "19,202 trained (18,432 adapter, 770 head)" in out
    assert "memory (estimate)" in out
    assert not (tmp_path / "new").exists()


def test_flags_win_over_the_file_wherever_they_stand(peanut: Call, file: Path) -> None:
    for arguments in ([file, "--training.steps", "7"], ["--training.steps=7", file]):
        out = peanut("train", "--dry-run", *arguments)
        assert any(line.split() == ["steps", "7"] for line in out.splitlines())


def test_flags_alone_are_enough(peanut: Call, minilm: Path, reviews: Path, tmp_path: Path) -> None:
    flags = {"model.path": minilm, "task": "text-classification", "data.train": reviews, "output": tmp_path / "out"}
    out = peanut("train", "--dry-run", *(part for key, value in flags.items() for part in (f"--{key}", value)))
    assert "36 to train on, 4 to evaluate on" in out


def test_a_dry_run_says_what_no_adapter_reaches(peanut: Call, file: Path, minilm: Path, tmp_path: Path) -> None:
    tokenizer = hf.AutoTokenizer.from_pretrained(minilm)
    tokenizer.save_pretrained(tmp_path)
    hf.MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=300,
        pad_token_id=0,
    ).save_pretrained(tmp_path)
    out = peanut("train", file, "--dry-run", "--model.path", tmp_path, "--adapter.target_modules", "all-linear")
    assert "out of reach" not in peanut("train", file, "--dry-run")
    (line,) = [line for line in out.splitlines() if "out of reach" in line]
    # 300 experts of 3 · 32 · 16, and 300 · 16 of what routes tokens to them, beside the vocabulary and four projections
    assert f"465,600 of {465_600 + 16 * len(tokenizer) + 4 * 16 * 12 + 5 * 16:,}" in " ".join(line.split())


def test_a_finished_run_says_so(peanut: Call, file: Path, trained: Path) -> None:
    before = (trained / "metrics.json").stat().st_mtime_ns
    assert "this run is complete" in peanut("train", file)
    assert (trained / "metrics.json").stat().st_mtime_ns == before


def test_overwrite_begins_anew(peanut: Call, file: Path, tmp_path: Path) -> None:
    flags = ("train", file, "--output", tmp_path / "out", "--data.eval_fraction", "0", "--training.steps")
    peanut(*flags, "1")
    assert "1 of 1" in peanut(*flags, "1", "--overwrite")
    assert "2 of 2" in peanut(*flags, "2", "--overwrite")


# What is done with a trained adapter


def test_eval_prints_the_metrics_of_the_run(peanut: Call, trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())["metrics"]
    out = dict(line.split() for line in peanut("eval", trained).splitlines() if line.strip())
    assert float(out["accuracy"]) == pytest.approx(metrics["accuracy"], abs=1e-4)
    assert float(out["loss"]) == pytest.approx(metrics["loss"], abs=1e-4)


def test_eval_on_other_rows_with_other_columns(peanut: Call, trained: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("review,stars\nfine,1\nbad,0\n")
    out = peanut("eval", trained / "adapter", "--data", rows, "--data.text", "review", "--data.label", "stars")
    assert "accuracy" in out


def test_inspect_prints_config_and_layers(peanut: Call, trained: Path) -> None:
    out = peanut("inspect", trained)
    assert "PEANUT" in out
    rows = [line.split() for line in out.splitlines() if "384 × 384" in line]
    assert len(rows) == 12
    assert all(row[0].startswith("bert.encoder.layer.") and row[4] == "3,072" for row in rows)
    assert all(float(row[5]) > 0 and row[6].endswith("%") and 1 <= float(row[7]) <= 4 for row in rows)


def test_merge_writes_a_model_that_needs_no_adapter(peanut: Call, trained: Path, tmp_path: Path) -> None:
    peanut("merge", trained, "--output", tmp_path / "model")
    merged = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    adapted = load_trained(trained).model
    assert merged.config.label2id == {"0": 0, "1": 1}
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-5)
    with adapted.disable_adapter():
        assert (logits(merged) - logits(adapted)).abs().max() > 1e-3
    hf.AutoTokenizer.from_pretrained(tmp_path / "model")


def test_export_writes_a_lora_that_agrees(peanut: Call, trained: Path, minilm: Path, tmp_path: Path) -> None:
    out = peanut("export", trained, "--to", "lora", "--output", tmp_path / "lora")
    assert "largest relative error" in out
    assert json.loads((tmp_path / "lora/adapter_config.json").read_text())["peft_type"] == "LORA"
    lora = load_trained(tmp_path / "lora").model
    assert isinstance(lora, PeftModel)
    torch.testing.assert_close(logits(lora), logits(load_trained(trained).model), rtol=1e-5, atol=1e-6)
    assert "accuracy" in peanut("eval", tmp_path / "lora", "--data", _rows(tmp_path), "--base-model", minilm)


def test_generate_answers_as_transformers_does(peanut: Call, smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "What is 2+2?", "completion": "4"}\n' * 4)
    run = {
        "model.path": smollm2,
        "task": "instruction",
        "data.train": tmp_path / "rows.jsonl",
        "data.eval_fraction": 0,
        "data.max_length": 64,
        "training.steps": 1,
        "training.learning_rate": 1e-6,
        "training.batch_size": 1,
        "adapter.layers_to_transform": "[0]",
        "output": tmp_path / "out",
    }
    peanut("train", *(part for key, value in run.items() for part in (f"--{key}", value)))
    answer = peanut("generate", tmp_path / "out", "What is the capital of France?", "--max-new-tokens", 10)
    assert "Paris" in answer
    several = peanut("generate", tmp_path / "out", "Hi.", "Bye.", "--max-new-tokens", 2, "--no-merge")
    assert [line for line in several.splitlines() if line.startswith(">")] == ["> Hi.", "> Bye."]


# Errors


def _rows(folder: Path) -> Path:
    path = folder / "rows.csv"
    path.write_text("text,label\nfine,1\nbad,0\n")
    return path


def test_errors_of_train(refused: Call, file: Path, trained: Path, tmp_path: Path) -> None:
    assert "has the key 'training.epoch'; expected a known key; nearest: 'training.epochs'" in refused(
        "train", file, "--training.epoch", "3"
    )
    assert "the flag '--adapter.r' has no value" in refused("train", file, "--adapter.r")
    assert "the flag '--adapter.r' has no value" in refused("train", file, "--adapter.r", "--training.steps", "1")
    assert "cannot read" in refused("train", tmp_path / "none.yaml")
    assert "0 YAML files and 0 keys" in refused("train")
    assert "2 YAML files" in refused("train", file, file)
    assert "another training.steps" in refused("train", file, "--training.steps", "3")
    assert "cannot write into folder" in refused("train", file, "--output", file / "x")
    assert "no file 'none.csv'" in refused("train", file, "--output", tmp_path / "x", "--data.train", "none.csv")


@pytest.mark.parametrize("command", ["eval", "inspect", "generate"])
def test_a_folder_without_an_adapter(refused: Call, tmp_path: Path, command: str) -> None:
    assert "adapter_config.json" in refused(command, tmp_path)


def test_errors_of_the_others(
    refused: Call, trained: Path, tmp_path: Path, tiny_llama: Callable[..., hf.PreTrainedModel]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("mine")
    for command in (("merge", trained), ("export", trained, "--to", "lora")):
        assert "is there already" in refused(*command, "--output", tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]
    assert "was trained for text-classification" in refused("generate", trained, "Hi")
    assert "unknown argument 'dat.text'" in refused("eval", trained, "--dat.text", "x")
    assert "cannot load the model" in refused("eval", trained, "--base-model", tmp_path / "mine")
    weights = trained / "adapter/adapter_model.safetensors"
    cut = tmp_path / "cut"
    cut.mkdir()
    for path in weights.parent.iterdir():
        (cut / path.name).write_bytes(path.read_bytes()[: 1000 if path == weights else None])
    assert "cannot read" in refused("inspect", cut)


def test_a_missing_library_is_told_in_one_line(refused: Call, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'peanut-peft[train]'" in refused("train", file, "--dry-run")
