"""Evaluates a trained adapter: metrics and predictions."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ..errors import PeanutError
from .callbacks import Progress, is_metric
from .config import load_config
from .data import draw, read_rows
from .folder import RunFolder
from .model import Trained, load_trained
from .prepare import encode, make_task, run_rows
from .trainer import Trainer

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["evaluate", "evaluate_rows", "metrics_of"]


def evaluate(
    adapter: str | os.PathLike[str],
    data: str | None = None,
    *,
    base_model: str | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    columns: Mapping[str, str] | None = None,
    quiet: bool = False,
) -> dict[str, float]:
    """The task's metrics of a trained adapter.

    Args:
        adapter: the adapter's folder, or the run's.
        data: the rows, as in the config's ``data.eval``; the run's own evaluation rows if not given.
        base_model: the base's folder or hub id, if it is not where it was.
        limit: at most so many rows, drawn at random.
        batch_size: rows a step.
        columns: names of columns (``{"label": "stars"}``), where they are others than in training.
        quiet: no progress bar.

    Raises:
        PeanutError: the adapter, its base or the data is not as it should be.
    """
    trained = load_trained(adapter, base_model)
    task = trained.task
    if data is None:
        config = RunFolder(adapter).config
        if not config.is_file():
            raise PeanutError(f"'{adapter}' is no run's folder", "the rows to evaluate on", "give --data")
        run = load_config(config)
        data = run.data.eval or run.data.train
        rows = run_rows(run, make_task(run), trained.processor)[1]
        if rows is None:
            raise PeanutError(f"the run '{adapter}' held no rows back for evaluation", "such rows", "give --data")
    else:
        task.data = task.data.model_copy(update=dict(columns or {}))
        rows = read_rows(data, text_columns=task.text_columns)
        task.check(rows, data)
        rows = task.encode(rows, trained.processor, data) if task.packs else rows
    return evaluate_rows(trained, draw(rows, limit, seed=0), data, batch_size, quiet=quiet)


def evaluate_rows(
    trained: Trained, rows: Dataset, source: str, batch_size: int = 32, *, quiet: bool = False
) -> dict[str, float]:
    """The metrics of a loaded adapter on rows that are read (and packed, if its task packs them)."""
    task, processor = trained.task, trained.processor
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=trained.model,
            args=TrainingArguments(
                scratch,
                per_device_eval_batch_size=batch_size,
                disable_tqdm=True,
                report_to="none",
                remove_unused_columns=False,
                dataloader_pin_memory=torch.cuda.is_available(),
                logging_nan_inf_filter=False,
            ),
            data_collator=task.collator(processor),
            compute_metrics=task.metrics,
            preprocess_logits_for_metrics=task.reduce,
        )
        trainer.remove_callback(PrinterCallback)
        if not quiet:
            trainer.add_callback(Progress())
        return metrics_of(trainer.evaluate(encode(task, rows, processor, source)))


def metrics_of(entry: Mapping[str, Any]) -> dict[str, float]:
    """The metrics in an entry of the Trainer's log, by their own names."""
    return {key.removeprefix("eval_"): float(value) for key, value in entry.items() if is_metric(key)}
