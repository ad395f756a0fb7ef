"""Learning an answer's format: reading answers, asking a model, and a short run that learns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from benchmarks.exams import EXAMS, Score, answers, likeliest, score
from benchmarks.instructions import BEFORE, CONTESTANTS, Job, examine, main, run_of

from benchmarks import instructions
from peanut import PeanutError
from peanut.lab.reviews import Contestant
from peanut.training.config import load_config
from peanut.training.sections import DataSection
from peanut.training.tasks import Instruction

from ..support import one_thread, save_small_llama  # noqa: F401

ARC, GSM8K = EXAMS["ARC-Easy"], EXAMS["GSM8K"]


def arc_question(text: str) -> str:
    return f"Which? {text}\n\nAnswer1: a Answer2: b Answer3: c\n\nAnswer format: answer1/answer2/answer3"


QUESTIONS = [arc_question(text) for text in ("Ice", "A long question about the sun and the moon", "Two words")]


@pytest.fixture(scope="module")
def model(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two small random layers, with SmolLM2's tokenizer and its chat template."""
    folder = tmp_path_factory.mktemp("tiny")
    return save_small_llama(folder, smollm2, initializer_range=0.5)  # else all tokens are nearly as likely


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hand-made rows, each file with one answer for all."""
    folder = tmp_path_factory.mktemp("data")
    arc = [{"instruction": text, "input": "", "output": "the correct answer is answer2"} for text in QUESTIONS * 4]
    gsm8k = [{"question": f"{n} + {4 - n}?", "answer": "#### 4"} for n in range(8)]
    for file, text in (
        ("arc-easy/{}.json", json.dumps(arc)),
        ("gsm8k/{}.jsonl", "".join(json.dumps(row) + "\n" for row in gsm8k)),
    ):
        for part in ("train", "test"):
            path = folder / file.format(part)
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    return folder


def loaded(folder: Path) -> tuple[Any, Instruction, Any]:
    model = hf.AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, Instruction(DataSection(train="")), hf.AutoTokenizer.from_pretrained(folder)


# Reading answers


@pytest.mark.parametrize(
    ("text", "strict", "loose"),
    [
        ("the correct answer is answer3", "answer3", "answer3"),
        (" the correct answer is answer3\n", "answer3", "answer3"),
        ("The correct answer is answer4: spiral.", None, "answer4"),
        ("Answer 2, for answer1 is wrong", None, "answer2"),
        ("the correct answer is answer1 the correct answer is answer1", None, "answer1"),
        ("It is ice.", None, None),
        ("", None, None),
    ],
)
def test_answers_of_arc(text: str, strict: str | None, loose: str | None) -> None:
    assert (ARC.strict(text), ARC.loose(text)) == (strict, loose)


@pytest.mark.parametrize(
    ("text", "strict", "loose"),
    [
        ("6 * 3 = 18\n#### 18", "18.0", "18.0"),
        ("#### 1,234.50", "1234.5", "1234.5"),
        ("#### -7 ", "-7.0", "-7.0"),
        ("#### 18 eggs", None, "18.0"),
        ("She has 3, then 18.", None, "18.0"),
        ("#### ", None, None),
        ("no number", None, None),
    ],
)
def test_answers_of_gsm8k(text: str, strict: str | None, loose: str | None) -> None:
    assert (GSM8K.strict(text), GSM8K.loose(text)) == (strict, loose)


def test_choices_are_those_that_the_question_names() -> None:
    assert ARC.choices(QUESTIONS[0]) == [f"the correct answer is answer{n}" for n in (1, 2, 3)]
    assert GSM8K.choices("How many eggs?") == []


def test_a_score_counts_each_part() -> None:
    expected = [f"the correct answer is answer{n}" for n in (1, 2, 1, 2)]
    texts = ["the correct answer is answer1", "the correct answer is answer1", "Answer1!", "No idea."]
    chosen = ["the correct answer is answer2"] * 4
    assert score(ARC, texts, chosen, expected) == Score(0.5, 0.25, 0.5, 0.5)
    assert score(GSM8K, ["#### 2", "so 3"], [None, None], ["#### 2", "#### 3"]) == Score(0.5, 0.5, 1.0, None)
    with pytest.raises(PeanutError, match=r"the answer '18 eggs' is not in the fixed format"):
        score(GSM8K, ["18"], [None], ["18 eggs"])


# Asking


def test_answers_in_batches_are_those_of_one_question_at_a_time(model: Path) -> None:
    llm, task, tokenizer = loaded(model)
    said: list[str] = []
    found = answers(llm, task, tokenizer, QUESTIONS, max_new_tokens=5, batch_size=2, say=said.append)
    assert said == ["answered 2 of 3 questions", "answered 3 of 3 questions"]
    for question, answer in zip(QUESTIONS, found, strict=True):
        tokens = tokenizer(task.question(question, tokenizer)[0], add_special_tokens=False)["input_ids"]
        start = len(tokens)
        while len(tokens) < start + 5 and tokens[-1] != tokenizer.eos_token_id:
            with torch.no_grad():
                tokens.append(int(llm(torch.tensor([tokens])).logits[0, -1].argmax()))
        assert answer == tokenizer.decode(tokens[start:], skip_special_tokens=True).strip()
    assert len(set(found)) > 1


def test_the_likeliest_choice_is_that_of_the_whole_sentence(model: Path) -> None:
    llm, task, tokenizer = loaded(model)
    questions = [*QUESTIONS, "Open?", "Who?", "And who else?", "Why?"]
    words = ["1 2 3", "2 3", "3 1 4", "", "5 6", "9 8 7 6", "7 5 3"]
    choices = [[f"the correct answer is answer{word}" for word in row.split()] for row in words]
    expected: list[str | None] = []
    for question, texts in zip(questions, choices, strict=True):
        start = tokenizer(task.question(question, tokenizer)[0], add_special_tokens=False)["input_ids"]
        likelihoods = []
        for text in texts:
            tokens = torch.tensor(start + tokenizer(text, add_special_tokens=False)["input_ids"])
            with torch.no_grad():
                logs = llm(tokens[None]).logits[0].double().log_softmax(-1)
            places = torch.arange(len(start), len(tokens))
            likelihoods.append(float(logs[places - 1, tokens[places]].sum()))
        expected.append(texts[likelihoods.index(max(likelihoods))] if texts else None)
    assert likeliest(llm, task, tokenizer, questions, choices, batch_size=4) == expected
    assert len(set(expected)) > 3
    with pytest.raises(PeanutError, match="one token does not tell the choices apart"):
        likeliest(llm, task, tokenizer, QUESTIONS[:1], [["a b", "a b c"]], batch_size=4)


# Runs


def test_the_format_is_learned(model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = Contestant(CONTESTANTS["PEANuT"].adapter, 2e-2, {"epochs": 15, "schedule": "constant"})
    monkeypatch.setitem(instructions.CONTESTANTS, "PEANuT", quick)
    monkeypatch.setitem(EXAMS, "GSM8K", replace(GSM8K, max_new_tokens=12))
    jobs = {
        method: Job("GSM8K", method, model, data, tmp_path / method, rows=4, held_back=6)
        for method in (BEFORE, "PEANuT")
    }
    before, after = (examine(job) for job in jobs.values())
    assert (before.score.format, before.parameters) == (0.0, 0)
    assert after.score == Score(1.0, 1.0, 1.0, None)
    assert after.parameters > 0
    assert {example["answer"] for example in after.examples} == {"#### 4"}
    assert load_config(tmp_path / "PEANuT" / "run.yaml") == load_config(run_of(jobs["PEANuT"]))
    again = examine(jobs["PEANuT"])
    assert (again.seconds, again.score) == (after.seconds, after.score)  # asked again, not trained again


def test_a_short_run(model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--output", tmp_path, "--data", data, "--model", model, "--rows", 4, "--held-back", 2]
    assert main([*map(str, options), "--tasks", "ARC-Easy", "--only", "LoRA"]) == 0
    found = json.loads((tmp_path / "outcomes.json").read_text())
    (exam,) = found["exams"].values()
    assert exam["rows"] == {"train": 4, "held_back": 2}
    assert list(exam["outcomes"]) == ["LoRA", BEFORE]  # files of the library are sorted
    assert exam["outcomes"]["LoRA"]["settings"]["r"] == 16
    assert exam["outcomes"]["LoRA"]["score"].keys() == {"format", "right", "loosely_right", "likeliest_right"}
    out = capsys.readouterr().out
    assert "answers to questions held back" in out
    assert f"peanut generate {tmp_path / 'arc-easy-lora'} QUESTION" in out


def test_mistakes_are_told(model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--output", str(tmp_path / "out"), "--model", str(model)]
    for options, message in (
        (["--data", str(tmp_path), "--tasks", "GSM8K"], f"no file '{tmp_path / 'gsm8k' / 'train.jsonl'}'; expected "),
        (["--data", str(data), "--tasks", "ARC"], "--tasks 'ARC'; expected names of the table; nearest: 'ARC-Easy'"),
        (["--data", str(data), "--only", "LORA"], "--only 'LORA'; expected names of the table; nearest: 'LoRA'"),
    ):
        assert main([*common, *options]) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err.startswith(f"error: {message}")
        assert told.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
