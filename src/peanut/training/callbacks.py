"""Trainer callbacks: the progress bar and the log file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from ..files import as_one_line, write_files

__all__ = ["Progress", "RunLog", "plot"]

_SHOWN = ("loss", "learning_rate", "grad_norm")


class Progress(ProgressCallback):
    """The usual bar, with one short line for every loss and every evaluation."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        shown = {key: logs[key] for key in _SHOWN if key in logs}
        shown |= {key: value for key, value in logs.items() if is_metric(key)}
        if shown:
            values = "  ".join(f"{key.removeprefix('eval_')} {value:.4g}" for key, value in shown.items())
            kind = "eval " if any(key.startswith("eval_") for key in shown) else "train"
            self.training_bar.write(f"step {state.global_step:>6}  {kind}  {values}")


class RunLog(TrainerCallback):
    """Writes every log entry as a line of JSON; after a resume the lines that were not kept are gone.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            text = "".join(map(_line, state.log_history))
            write_files(self.path.parent, {self.path.name: lambda path: path.write_text(text, encoding="utf-8")})

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not state.log_history:
            return
        with as_one_line(f"cannot write '{self.path}'"), self.path.open("a", encoding="utf-8") as file:
            file.write(_line(state.log_history[-1]))


def is_metric(key: str) -> bool:
    """Whether a log entry's key is a metric of an evaluation, not its speed."""
    speed = ("runtime", "per_second", "preparation_time")
    return key.startswith("eval_") and not key.endswith(speed)


def plot(history: list[dict[str, Any]], metric: str, path: Path) -> None:
    """Draws the loss of training and evaluation, and a metric, over the steps.

    Args:
        history: the Trainer's log.
        metric: the metric that decides.
        path: the PNG file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="step", ylabel="loss")
    series = [("loss", "training loss", axes), ("eval_loss", "evaluation loss", axes)]
    if metric != "loss":
        right = axes.twinx()
        right.set_ylabel(metric)
        series.append((f"eval_{metric}", metric, right))
    for index, (key, label, where) in enumerate(series):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            steps, values = zip(*points, strict=True)
            where.plot(steps, values, color=f"C{index}", marker="o" if len(points) < 40 else None, label=label)
    figure.legend(loc="outside upper center", ncols=len(series), frameon=False)
    write_files(path.parent, {path.name: lambda where: figure.savefig(where, format="png", dpi=120)})


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"
