"""The demo's task: MiniLM on movie reviews with any number of methods, each trained in a process of its own."""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import __version__
from ..errors import PeanutError
from ..files import make_folder, write_files
from .measure import processor

__all__ = ["Contestant", "Outcome", "folder_of", "print_table", "report", "train_alone", "write_curve", "write_rows"]


@dataclass(frozen=True)
class Contestant:
    """A method as it takes part.

    Args:
        adapter: its config, as in a run's ``adapter`` section.
        rate: its learning rate.
        more: other settings of its training.
    """

    adapter: Mapping[str, Any]
    rate: float
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a method reached.

    Args:
        method: its name in the table.
        accuracy: on the rows held back.
        parameters: how many were trained, head included.
        seconds: of training, evaluations included.
        megabytes: the most memory that its process held.
    """

    method: str
    accuracy: float
    parameters: int
    seconds: float
    megabytes: float


def write_rows(reviews: Path, folder: Path, rows: int, held_back: int) -> None:
    """Draws short reviews (Rotten Tomatoes), each text once, and writes ``train.csv`` and ``test.csv``."""
    with reviews.open(encoding="utf-8", newline="") as file:
        found = {row["text"]: row["label"] for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"}
    drawn = random.Random(0).sample(sorted(found.items()), rows + held_back)  # noqa: S311 - the same rows every time
    make_folder(folder)
    for name, part in (("train.csv", drawn[:rows]), ("test.csv", drawn[rows:])):

        def write(path: Path, part: list[tuple[str, str]] = part) -> None:
            with path.open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([("text", "label"), *part])

        write_files(folder, {name: write})


def train_alone(method: str, contestant: Contestant, base: Path, output: Path) -> Outcome:
    """Trains one method in a process of its own, so that its peak of memory is its own too."""
    print(f"\n{method}", flush=True)
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_train, args=(method, contestant, str(base), str(output), send))
    process.start()
    send.close()
    try:
        outcome: Outcome = receive.recv()
    except EOFError:
        process.join()
        raise PeanutError(
            f"training {method} ended with exit code {process.exitcode}", do="read the lines above"
        ) from None
    process.join()
    return outcome


def _train(method: str, contestant: Contestant, base: str, output: str, send: Any) -> None:
    from ..training.run import train
    from ..training.terminal import quiet

    quiet()
    folder, data = folder_of(output, method), Path(output, "data")
    rows = sum(1 for _ in (data / "train.csv").open(encoding="utf-8")) - 1
    result = train(
        {
            "model": {"path": base},
            "task": "text-classification",
            "data": {"train": str(data / "train.csv"), "eval": str(data / "test.csv"), "max_length": 40},
            "adapter": dict(contestant.adapter),
            "training": {
                "epochs": 2,
                "batch_size": 32,
                "eval_batch_size": 100,
                "learning_rate": contestant.rate,
                "head_learning_rate": 5e-3,
                **contestant.more,
                "eval_every": math.ceil(2 * rows / 32 / 3),
                "log_every": max(1, rows // 32 // 10),
            },
            "output": str(folder),
        },
        overwrite=True,
    )
    send.send(Outcome(method, result.metrics["accuracy"], result.trained_parameters, result.seconds, _peak_megabytes()))


def folder_of(output: str | Path, method: str) -> Path:
    """Where a method's run is."""
    return Path(output, method.replace(" + ", "-").replace(" ", "-").lower())


def _peak_megabytes() -> float:
    """The most memory that this process held, on a GPU that of torch's tensors."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def write_curve(output: Path, methods: Sequence[str]) -> None:
    """Draws every method's loss and accuracy over the steps into ``curve.png``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    loss.set(xlabel="step", ylabel="training loss")
    accuracy.set(xlabel="step", ylabel="accuracy on reviews held back")
    for method in methods:
        log = [json.loads(line) for line in (folder_of(output, method) / "log.jsonl").read_text("utf-8").splitlines()]
        for axes, key in ((loss, "loss"), (accuracy, "eval_accuracy")):
            points = [(entry["step"], entry[key]) for entry in log if key in entry]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=method)
    accuracy.legend(loc="lower right")
    write_files(output, {"curve.png": lambda path: figure.savefig(path, format="png", dpi=120)})


def report(
    contestants: Mapping[str, Contestant], outcomes: Sequence[Outcome], rows: int, held_back: int
) -> dict[str, Any]:
    """What was reached, with versions and hardware."""
    return {
        "versions": {"peanut": __version__, "torch": str(torch.__version__), "transformers": transformers.__version__},
        "hardware": processor(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "threads": torch.get_num_threads(),
        "rows": {"train": rows, "held_back": held_back},
        "methods": {
            name: {key: _short(value) for key, value in each.adapter.items()}
            | {"learning_rate": each.rate, **each.more}
            for name, each in contestants.items()
        },
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }


def _short(value: Any) -> Any:
    """A long list in words."""
    if isinstance(value, list) and len(value) > 20:
        return f"{len(value)} values, {value[0]} to {value[-1]}"
    return value


def print_table(outcomes: Sequence[Outcome]) -> None:
    """Prints what every method reached."""
    from rich.console import Console
    from rich.table import Table

    table = Table("method", title="movie reviews, MiniLM-L6")
    for name in ("accuracy", "trained parameters", "seconds", "peak memory, MB"):
        table.add_column(name, justify="right")
    for outcome in outcomes:
        table.add_row(
            outcome.method,
            f"{outcome.accuracy:.3f}",
            f"{outcome.parameters:,}",
            f"{outcome.seconds:.0f}",
            f"{outcome.megabytes:.0f}",
        )
    Console().print(table)
