"""Prepares a run: its task and its data, from its config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import PeanutError, nearest
from .data import draw, read_rows
from .sections import RunConfig
from .tasks import TASKS, Task

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["best_metric", "encode", "make_task", "run_rows"]


def make_task(config: RunConfig) -> Task:
    """The run's task, with its settings checked."""
    task = TASKS[config.task](config.data)
    best_metric(config, task)
    return task


def best_metric(config: RunConfig, task: Task) -> str:
    """The metric that decides which checkpoint is the best."""
    metric = config.training.metric_for_best or task.metric_names[0]
    if metric not in task.metric_names:
        raise PeanutError(
            f"training.metric_for_best is {metric!r}",
            f"one of {', '.join(task.metric_names)}",
            f"nearest: {nearest(metric, task.metric_names, 1)}",
        )
    return metric


def run_rows(config: RunConfig, task: Task, processor: Any) -> tuple[Dataset, Dataset | None]:
    """The rows (where the task packs them, the pieces) to train and to evaluate on; the task learns its classes."""
    data, seed = config.data, config.training.seed
    rows = read_rows(data.train, text_columns=task.text_columns, subset=data.subset)
    task.learn(rows, data.train)
    train_rows, eval_rows = task.encode(rows, processor, data.train) if task.packs else rows, None
    if data.eval is not None:
        rows = read_rows(data.eval, text_columns=task.text_columns, subset=data.subset)
        task.check(rows, data.eval)
        eval_rows = task.encode(rows, processor, data.eval) if task.packs else rows
    elif data.eval_fraction > 0:
        if len(train_rows) < 2:
            raise PeanutError(
                f"'{data.train}' has one row, and data.eval_fraction is {data.eval_fraction}",
                "rows to train and to evaluate on",
                "give data.eval, or data.eval_fraction: 0",
            )
        parts = train_rows.train_test_split(test_size=data.eval_fraction, seed=seed)
        train_rows, eval_rows = parts["train"], parts["test"]
    return draw(train_rows, data.limit, seed), None if eval_rows is None else draw(eval_rows, data.eval_limit, seed)


def encode(task: Task, rows: Dataset, processor: Any, source: str) -> Dataset:
    """Rows as ``run_rows`` gives them, as inputs of the model."""
    return rows if task.packs else task.encode(rows, processor, source)
