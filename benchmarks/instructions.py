"""``make instructions``: fine-tunes a small language model to answer in a fixed format; accuracy before and after."""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from peanut import __version__
from peanut.errors import PeanutError, nearest
from peanut.files import make_folder, write_json
from peanut.lab.assets import fetch
from peanut.lab.measure import processor
from peanut.lab.reviews import Contestant
from peanut.training.terminal import quiet

from .exams import EXAMS, Score, answers, files_of, likeliest, score

__all__ = ["CONTESTANTS", "main"]

BEFORE = "not trained"
CONTESTANTS = {
    "LoRA": Contestant({"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"}, 1e-3),
    "PEANuT": Contestant({"peft_type": "PEANUT", "r": 15, "depth": 1, "target_modules": "all-linear"}, 1e-3),
}
"""What is compared: the same rank but one, so that PEANuT with its inner layers stays within LoRA's parameters."""


@dataclass(frozen=True)
class Job:
    """One exam of one contestant (or of the model as it is), ready to be sent to a process.

    Args:
        exam, method: their names.
        model: the base model's folder.
        data: the folder with the exams' files.
        output: the folder of the run.
        rows, held_back: how many questions are learned and asked.
        overwrite: train again what was trained before.
        batch_size: how many are asked at once.
    """

    exam: str
    method: str
    model: Path
    data: Path
    output: Path
    rows: int
    held_back: int
    overwrite: bool = False
    batch_size: int = 32


@dataclass(frozen=True)
class Outcome:
    """What a job reached.

    Args:
        exam, method: their names.
        score: how good the answers are.
        parameters: how many were trained.
        seconds: of training.
        seconds_asked: of the exam.
        examples: the first questions with the answers given and expected.
    """

    exam: str
    method: str
    score: Score
    parameters: int
    seconds: float
    seconds_asked: float
    examples: list[dict[str, str]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, trains, measures again; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/instructions"), help="folder for everything written")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with arc-easy and gsm8k")
    parser.add_argument("--model", type=Path, help="folder of a chat model; the packaged SmolLM2-135M if not given")
    parser.add_argument("--tasks", nargs="+", default=list(EXAMS), help=f"of {', '.join(EXAMS)}")
    parser.add_argument("--only", nargs="+", default=list(CONTESTANTS), help="names of methods in the table")
    parser.add_argument("--rows", type=int, help="questions to learn from, for each task")
    parser.add_argument("--held-back", type=int, help="questions to ask, for each task")
    parser.add_argument("--at-once", type=int, default=1, help="how many to train at the same time")
    parser.add_argument("--overwrite", action="store_true", help="train again what an earlier call has trained")
    options = parser.parse_args(arguments)
    quiet()
    start = time.perf_counter()
    try:
        for flag, names, known in (("--tasks", options.tasks, EXAMS), ("--only", options.only, CONTESTANTS)):
            for name in names:
                if name not in known:
                    raise PeanutError(f"{flag} {name!r}", "names of the table", f"nearest: {nearest(name, known)}")
        for name in options.tasks:
            files_of(name, options.data)
        model = options.model or fetch("smollm2")
        make_folder(options.output)
        jobs = [
            Job(
                exam=exam,
                method=method,
                model=model,
                data=options.data,
                output=folder_of(options.output, exam, method),
                rows=options.rows or EXAMS[exam].rows,
                held_back=options.held_back or EXAMS[exam].held_back,
                overwrite=options.overwrite,
            )
            for exam in options.tasks
            for method in (BEFORE, *options.only)
        ]
        outcomes = take_part(jobs, options.at_once)
        write_json(options.output / "outcomes.json", report(jobs, outcomes))
    except PeanutError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_table(outcomes)
    print_example(outcomes)
    for job in jobs:
        if job.method != BEFORE:
            print(f"{job.exam}, {job.method}: peanut generate {job.output} QUESTION; made by {job.output / 'run.yaml'}")
    print(f"{time.perf_counter() - start:.0f} s; figures: {options.output / 'outcomes.json'}")
    return 0


def folder_of(output: Path, exam: str, method: str) -> Path:
    """Where a contestant's run is."""
    return output / f"{exam}-{method}".replace(" ", "-").lower()


def take_part(jobs: Sequence[Job], at_once: int) -> list[Outcome]:
    """Runs every job, each in a process that does nothing else meanwhile."""
    with ProcessPoolExecutor(at_once, multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(_take_part, job) for job in jobs]
        try:
            return [_told(future.result()) for future in running]
        except BrokenProcessPool:
            raise PeanutError("a process was ended from outside", do="read the lines above; is there memory?") from None
        finally:
            for future in running:
                future.cancel()


def _told(found: Outcome | tuple[str, str, str]) -> Outcome:
    """An outcome as it is, and an error's parts as the error: a ``PeanutError`` does not travel between processes."""
    if isinstance(found, tuple):
        raise PeanutError(*found)
    return found


def _take_part(job: Job) -> Outcome | tuple[str, str, str]:
    quiet()
    try:
        return examine(job)
    except PeanutError as error:
        return error.found, error.expected, error.do


def run_of(job: Job) -> dict[str, Any]:
    """The run that trains the job's contestant: what ``peanut train`` reads."""
    exam = EXAMS[job.exam]
    contestant = CONTESTANTS.get(job.method, Contestant({}, 1.0))
    return {
        "model": {"path": str(job.model)},
        "task": "instruction",
        "data": {
            "train": str(files_of(job.exam, job.data)[0]),
            "limit": job.rows,
            "eval_fraction": 0,
            "max_length": exam.max_length,
            **exam.columns,
        },
        "adapter": dict(contestant.adapter),
        "training": {
            "epochs": 1,
            "batch_size": 8,
            "learning_rate": contestant.rate,
            "log_every": max(1, math.ceil(job.rows / 8) // 10),
            **contestant.more,
        },
        "output": str(job.output),
    }


def examine(job: Job) -> Outcome:
    """Trains the job's contestant, if it has to be trained, and asks it, in float32, the questions held back."""
    from peanut.training.config import load_config
    from peanut.training.data import draw, read_rows
    from peanut.training.model import load_base, load_trained
    from peanut.training.prepare import make_task
    from peanut.training.run import train

    exam = EXAMS[job.exam]
    config = run_of(job)
    print(f"\n{job.exam}, {job.method}", flush=True)
    parameters, seconds = 0, 0.0
    if job.method == BEFORE:
        task: Any = make_task(load_config(config))
        tokenizer = task.load_processor(job.model)
        model: Any = load_base(str(job.model), task, tokenizer, "float32")[0]
    else:
        result = train(config, overwrite=job.overwrite)
        parameters, seconds = result.trained_parameters, result.seconds
        # In bfloat16 the logits of the choices are often equal, and rounding would answer.
        trained = load_trained(result.adapter, dtype="float32")
        model, task, tokenizer = trained.model, trained.task, trained.processor
        model.merge_adapter()
    model = model.to(torch.accelerator.current_accelerator() or "cpu").eval()
    test = files_of(job.exam, job.data)[1]
    rows = read_rows(str(test), text_columns=task.text_columns)
    task.check(rows, str(test))
    pairs = [(said[0]["content"], said[1]["content"]) for said in task.conversations(draw(rows, job.held_back, 0), "")]
    questions, expected = [question for question, _ in pairs], [answer for _, answer in pairs]
    start = time.perf_counter()
    texts = answers(
        model,
        task,
        tokenizer,
        questions,
        max_new_tokens=exam.max_new_tokens,
        batch_size=job.batch_size,
        say=lambda text: print(f"{job.exam}, {job.method}: {text}", flush=True),
    )
    choices = [exam.choices(question) for question in questions]
    chosen = likeliest(model, task, tokenizer, questions, choices, batch_size=job.batch_size)
    shown = zip(questions, texts, expected, strict=True)
    return Outcome(
        exam=job.exam,
        method=job.method,
        score=score(exam, texts, chosen, expected),
        parameters=parameters,
        seconds=seconds,
        seconds_asked=time.perf_counter() - start,
        examples=[{"question": q, "answer": a, "expected": e} for q, a, e in list(shown)[:3]],
    )


def report(jobs: Sequence[Job], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What was reached, with settings, versions and hardware."""
    exams: dict[str, Any] = {}
    for job, outcome in zip(jobs, outcomes, strict=True):
        exam = exams.setdefault(
            job.exam,
            {
                "rows": {"train": job.rows, "held_back": job.held_back},
                "max_new_tokens": EXAMS[job.exam].max_new_tokens,
                "outcomes": {},
            },
        )
        found = asdict(outcome)
        run = run_of(job)
        exam["training"] = {key: value for key, value in run["training"].items() if key != "learning_rate"}
        found["settings"] = run["adapter"] | {"learning_rate": run["training"]["learning_rate"]}
        if job.method == BEFORE:
            del found["settings"]
        exam["outcomes"][found.pop("method")] = {key: value for key, value in found.items() if key != "exam"}
    return {
        "versions": {"peanut": __version__, "torch": str(torch.__version__), "transformers": transformers.__version__},
        "hardware": processor(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "threads": torch.get_num_threads(),
        "model": jobs[0].model.name,
        "precision": {"training": "that of the checkpoint", "exam": "float32, merged"},
        "exams": exams,
    }


def print_table(outcomes: Sequence[Outcome]) -> None:
    """Prints every outcome."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title="answers to questions held back", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("task", "method"):
        table.add_column(name, no_wrap=True)
    for name in (
        "in the\nformat",
        "and\nright",
        "read\nloosely",
        "choice",
        "million\nparam.",
        "sec.",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for outcome in outcomes:
        found = outcome.score
        parts = (found.format, found.right, found.loosely_right, found.likeliest_right)
        table.add_row(
            outcome.exam,
            outcome.method,
            *("–" if part is None else f"{part:.3f}" for part in parts),
            f"{outcome.parameters / 1e6:.2f}",
            f"{outcome.seconds:.0f}",
        )
    Console().print(table)


def print_example(outcomes: Sequence[Outcome]) -> None:
    """Prints one question of every exam with the answers of all who were asked it."""
    asked = set()
    for outcome in outcomes:
        example = outcome.examples[0]
        if outcome.exam not in asked:
            asked.add(outcome.exam)
            print(f"\n{outcome.exam}: {example['question']}\n[expected] {example['expected']}")
        print(f"[{outcome.method}] {example['answer']}")
    print()


if __name__ == "__main__":
    sys.exit(main())
