"""Questions with answers in a fixed format (ARC, GSM8K), and the accuracy of a language model on them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peanut.errors import PeanutError
from peanut.training.generation import end_tokens
from peanut.training.tasks import Instruction

__all__ = ["EXAMS", "Exam", "Score", "answers", "files_of", "likeliest", "score"]


@dataclass(frozen=True)
class Exam:
    """A set of questions, and how its answers are read.

    Args:
        folder: where its rows are, below the data folder: the file to train on and the one to test on.
        columns: the names of its columns, as in a run's ``data`` section.
        rows, held_back: how many are drawn to train and to test on.
        max_length: the longest conversation in tokens.
        max_new_tokens: the longest answer in tokens.
        strict: the answer that a text in the fixed format gives; None for any other text.
        loose: the answer that a reader of good will finds in any text; None if there is none.
        choices: the texts among which a question lets one choose; none for an open question.
    """

    folder: tuple[str, str]
    columns: dict[str, str]
    rows: int
    held_back: int
    max_length: int
    max_new_tokens: int
    strict: Callable[[str], str | None]
    loose: Callable[[str], str | None]
    choices: Callable[[str], list[str]]


@dataclass(frozen=True)
class Score:
    """Parts of the questions, each from 0 to 1.

    Args:
        format: answered in the fixed format.
        right: answered in the fixed format, and rightly.
        loosely_right: right when the answer is looked for anywhere in the text.
        likeliest_right: the likeliest of the choices is the right one, whatever the model would write; None where
            there are no choices.
    """

    format: float
    right: float
    loosely_right: float
    likeliest_right: float | None


def _number(text: str) -> str:
    """A number as it is compared: 1,000 is 1000.0."""
    return str(float(text.replace(",", "")))


def _arc_strict(text: str) -> str | None:
    found = re.fullmatch(r"the correct answer is (answer\d)", text.strip())
    return found[1] if found else None


def _arc_loose(text: str) -> str | None:
    found = re.search(r"answer\s?(\d)", text, re.IGNORECASE)
    return f"answer{found[1]}" if found else None


def _arc_choices(question: str) -> list[str]:
    found = re.search(r"Answer format: (\S+)", question)
    return [f"the correct answer is {name}" for name in found[1].split("/")] if found else []


def _gsm8k_strict(text: str) -> str | None:
    found = re.search(r"#### (-?\d[\d,]*(?:\.\d+)?)\Z", text.strip())
    return _number(found[1]) if found else None


def _gsm8k_loose(text: str) -> str | None:
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return _number(found[-1]) if found else None


EXAMS = {
    "ARC-Easy": Exam(
        folder=("arc-easy/train.json", "arc-easy/test.json"),
        columns={"instruction": "instruction", "output": "output"},
        rows=640,
        held_back=300,
        max_length=256,
        max_new_tokens=24,
        strict=_arc_strict,
        loose=_arc_loose,
        choices=_arc_choices,
    ),
    "GSM8K": Exam(
        folder=("gsm8k/train.jsonl", "gsm8k/test.jsonl"),
        columns={"prompt": "question", "completion": "answer"},
        rows=256,
        held_back=64,
        max_length=384,
        max_new_tokens=256,
        strict=_gsm8k_strict,
        loose=_gsm8k_loose,
        choices=lambda question: [],
    ),
}
"""ARC-Easy (Clark et al. 2018, arXiv 1803.05457) as "the correct answer is answer2"; GSM8K (Cobbe et al. 2021,
arXiv 2110.14168), whose solutions end in "#### 18"."""


def files_of(name: str, data: Path) -> tuple[Path, Path]:
    """The exam's files to train and to test on.

    Raises:
        PeanutError: one is not there.
    """
    exam = EXAMS[name]
    files = (data / exam.folder[0], data / exam.folder[1])
    for file in files:
        if not file.is_file():
            columns = " and ".join(map(repr, exam.columns.values()))
            raise PeanutError(
                f"no file '{file}'",
                f"{name}'s rows there, with the columns {columns}",
                "put them there, name another folder with --data, or leave them out with --tasks",
            )
    return files


def score(exam: Exam, texts: Sequence[str], chosen: Sequence[str | None], expected: Sequence[str]) -> Score:
    """How good the answers are.

    Args:
        exam: how they are read.
        texts: what the model wrote.
        chosen: the likeliest choice of each question, or None.
        expected: the answers of the data set.

    Raises:
        PeanutError: an expected answer is not in the fixed format.
    """
    right = [exam.strict(text) for text in expected]
    if None in right:
        wrong = expected[right.index(None)]
        raise PeanutError(f"the answer {wrong[-60:]!r} is not in the fixed format", "one that is", "correct the row")
    strict, loose = [exam.strict(text) for text in texts], [exam.loose(text) for text in texts]
    picked = [exam.strict(choice) for choice in chosen if choice is not None]
    return Score(
        format=sum(answer is not None for answer in strict) / len(texts),
        right=_agreement(strict, right),
        loosely_right=_agreement(loose, right),
        likeliest_right=_agreement(picked, right) if len(picked) == len(texts) else None,
    )


def _agreement(found: Sequence[str | None], expected: Sequence[str | None]) -> float:
    return sum(a == b for a, b in zip(found, expected, strict=True)) / len(expected)


@torch.no_grad()
def answers(
    model: Any,
    task: Instruction,
    tokenizer: Any,
    questions: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    say: Callable[[str], None],
) -> list[str]:
    """What the model answers to each question when it always takes the likeliest token."""
    texts, done = [""] * len(questions), 0
    prompts = [_prompt(question, task, tokenizer) for question in questions]
    for ids, batch in _batches(prompts, tokenizer, batch_size, model.device):
        tokens = model.generate(
            **batch,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=end_tokens(model, task, tokenizer),
        )
        new = tokens[:, batch["input_ids"].shape[1] :]
        for index, text in zip(ids, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            texts[index] = text.strip()
        done += len(ids)
        say(f"answered {done} of {len(texts)} questions")
    return texts


@torch.no_grad()
def likeliest(
    model: Any,
    task: Instruction,
    tokenizer: Any,
    questions: Sequence[str],
    choices: Sequence[Sequence[str]],
    *,
    batch_size: int,
) -> list[str | None]:
    """The likeliest choice of each question; None for a question without choices.

    The choices of a question begin alike; after that beginning, the likeliest of their next tokens decides.

    Raises:
        PeanutError: one next token does not tell the choices of a question apart.
    """
    found: list[str | None] = [None] * len(questions)
    asked = [index for index, texts in enumerate(choices) if texts]
    forks = [_fork([tokenizer(text, add_special_tokens=False)["input_ids"] for text in choices[i]]) for i in asked]
    prompts = [_prompt(questions[i], task, tokenizer) + shared for i, (shared, _) in zip(asked, forks, strict=True)]
    for ids, batch in _batches(prompts, tokenizer, batch_size, model.device):
        # Padding stands on the left and counts for no place.
        places = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        logits = model(**batch, position_ids=places, logits_to_keep=1).logits[:, -1].float().cpu()  # (B, V)
        for index, row in zip(ids, logits, strict=True):
            found[asked[index]] = choices[asked[index]][int(row[forks[index][1]].argmax())]
    return found


def _prompt(question: str, task: Instruction, tokenizer: Any) -> list[int]:
    text, special = task.question(question, tokenizer)
    tokens: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    return tokens


def _fork(choices: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """The tokens with which all choices begin, and the one with which each goes on."""
    length = 0
    while all(len(choice) > length and choice[length] == choices[0][length] for choice in choices):
        length += 1
    following = [choice[length] for choice in choices if len(choice) > length]
    if len(set(following)) < len(choices):
        raise PeanutError("one token does not tell the choices apart", "choices that it does", "reword them")
    return list(choices[0][:length]), following


def _batches(
    prompts: Sequence[Sequence[int]], tokenizer: Any, batch_size: int, device: torch.device
) -> Iterator[tuple[list[int], Any]]:
    """Batches of prompts of similar length, padded on the left: which they are, and their tokens."""
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for start in range(0, len(order), batch_size):
        ids = order[start : start + batch_size]
        rows = {"input_ids": [list(prompts[index]) for index in ids]}
        yield ids, tokenizer.pad(rows, padding_side="left", return_tensors="pt").to(device)
