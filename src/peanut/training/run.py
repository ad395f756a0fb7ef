"""A run from its config to a trained adapter, and its evaluation afterwards."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import EarlyStoppingCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from ..errors import PeanutError, nearest
from ..files import read_json, write_json
from .callbacks import Progress, RunLog, is_metric, plot
from .config import RunConfig, load_config
from .data import draw, read_rows
from .folder import RunFolder, write_folder
from .metrics import LOWER_IS_BETTER
from .model import Trained, build_model, load_trained, save_trained
from .plan import Plan, make_plan
from .tasks import TASKS, Task
from .trainer import Trainer

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["RunResult", "evaluate", "plan", "train"]

Source = str | os.PathLike[str] | Mapping[str, Any] | RunConfig


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Args:
        output: the run's folder.
        adapter: the folder of the trained adapter.
        metrics: the evaluation of the checkpoint that was kept: the best one, or the last if nothing was evaluated.
        step: the optimiser step of that checkpoint.
        steps: all steps.
        trained_parameters: how many parameters were trained, adapter and head.
        dropped_rows: rows left out because no answer fitted into ``max_length``.
        seconds: time of training since the run was last started.
        status: ``"trained"``, ``"resumed"``, or ``"finished"`` if it was done before.
    """

    output: Path
    adapter: Path
    metrics: dict[str, float]
    step: int
    steps: int
    trained_parameters: int
    dropped_rows: int
    seconds: float
    status: Literal["trained", "resumed", "finished"]


def train(config: Source, *, overwrite: bool = False, quiet: bool = False) -> RunResult:
    """Trains what ``config`` describes; called again after an interruption, it continues from the last checkpoint.

    Args:
        config: a YAML file, a dictionary, or a ``RunConfig``.
        overwrite: begin anew, also if the output folder holds another run.
        quiet: no progress bar and no lines for losses.

    Raises:
        PeanutError: the config, the data, the model or the output folder is not as it should be.
    """
    config = _config(config)
    folder = RunFolder(config.output)
    folder.open(config, overwrite)
    if folder.finished:
        return _result(folder, "finished")
    task = _task(config)
    processor = task.load_processor(config.model.path, config.model.revision)
    train_rows, eval_rows = _rows(config, task, processor)
    set_seed(config.training.seed)
    model = build_model(config, task, processor)
    train_set = _encode(task, train_rows, processor, config.data.train)
    eval_set = _encode(task, eval_rows, processor, config.data.eval or config.data.train) if eval_rows else None
    checkpoint = folder.checkpoint
    trainer = Trainer(
        model=model,
        args=_arguments(config, task, evaluates=eval_set is not None),
        train_dataset=train_set,
        eval_dataset=eval_set,
        processing_class=processor,
        data_collator=task.collator(processor),
        compute_metrics=task.metrics,
        preprocess_logits_for_metrics=task.reduce,
        head_learning_rate=config.training.head_learning_rate,
        callbacks=[RunLog(folder.log), *([] if quiet else [Progress()])],
    )
    trainer.remove_callback(PrinterCallback)
    if config.training.patience is not None and eval_set is not None:
        trainer.add_callback(EarlyStoppingCallback(config.training.patience))
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.perf_counter() - start
    state = trainer.state
    plot(state.log_history, _metric(config, task), folder.curve)
    write_folder(folder.adapter, lambda path: save_trained(path, model, task, processor))
    step = (state.best_global_step or state.global_step) if eval_set is not None else state.global_step
    write_json(
        folder.metrics,
        {
            "metrics": _metrics_at(state.log_history, step),
            "step": step,
            "steps": state.global_step,
            "trained_parameters": model.get_nb_trainable_parameters()[0],
            "dropped_rows": task.dropped,
            "seconds": seconds,
        },
    )
    return _result(folder, "resumed" if checkpoint else "trained")


def plan(config: Source) -> Plan:
    """What ``train`` would do with ``config``: data and names are checked, no weight is loaded, nothing is written.

    Raises:
        PeanutError: as for ``train``.
    """
    config = _config(config)
    task = _task(config)
    processor = task.load_processor(config.model.path, config.model.revision)
    train_rows, eval_rows = _rows(config, task, processor)
    return make_plan(config, task, processor, len(train_rows), 0 if eval_rows is None else len(eval_rows))


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
        rows = _rows(run, _task(run), trained.processor)[1]
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
        return _metrics(trainer.evaluate(_encode(task, rows, processor, source)))


def _config(config: Source) -> RunConfig:
    return config if isinstance(config, RunConfig) else load_config(config)


def _task(config: RunConfig) -> Task:
    task = TASKS[config.task](config.data)
    _metric(config, task)
    return task


def _metric(config: RunConfig, task: Task) -> str:
    """The metric that decides which checkpoint is the best."""
    metric = config.training.metric_for_best or task.metric_names[0]
    if metric not in task.metric_names:
        raise PeanutError(
            f"training.metric_for_best is {metric!r}",
            f"one of {', '.join(task.metric_names)}",
            f"nearest: {nearest(metric, task.metric_names, 1)}",
        )
    return metric


def _rows(config: RunConfig, task: Task, processor: Any) -> tuple[Dataset, Dataset | None]:
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


def _encode(task: Task, rows: Dataset, processor: Any, source: str) -> Dataset:
    return rows if task.packs else task.encode(rows, processor, source)


def _arguments(config: RunConfig, task: Task, *, evaluates: bool) -> TrainingArguments:
    """The run's settings in transformers' words."""
    training = config.training
    metric = _metric(config, task)
    when = "epoch" if training.eval_every == "epoch" else "steps"
    every = 0 if training.eval_every == "epoch" else training.eval_every
    return TrainingArguments(
        output_dir=config.output,
        num_train_epochs=training.epochs,
        max_steps=training.steps or -1,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.eval_batch_size or training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type="constant_with_warmup" if training.schedule == "constant" else training.schedule,
        warmup_steps=training.warmup,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        seed=training.seed,
        bf16=training.precision == "bfloat16",
        fp16=training.precision == "float16",
        activation_checkpointing=training.gradient_checkpointing,
        eval_strategy=when if evaluates else "no",
        eval_steps=every or None,
        save_strategy=when,
        save_steps=every or 500,
        save_total_limit=training.save_total,
        load_best_model_at_end=evaluates,
        metric_for_best_model=metric if evaluates else None,
        greater_is_better=metric not in LOWER_IS_BETTER if evaluates else None,
        logging_steps=training.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a loss that is not a number must be seen
        restore_callback_states_from_checkpoint=True,
        remove_unused_columns=False,  # the task encodes exactly what the model reads
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,  # Progress takes the place of transformers' own bar
        report_to="none",
    )


def _metrics(entry: Mapping[str, Any]) -> dict[str, float]:
    return {key.removeprefix("eval_"): float(value) for key, value in entry.items() if is_metric(key)}


def _metrics_at(history: list[dict[str, Any]], step: int) -> dict[str, float]:
    found = [entry for entry in history if entry.get("step") == step and "eval_loss" in entry]
    return _metrics(found[-1]) if found else {}


def _result(folder: RunFolder, status: Literal["trained", "resumed", "finished"]) -> RunResult:
    return RunResult(output=folder.path, adapter=folder.adapter, status=status, **read_json(folder.metrics))
