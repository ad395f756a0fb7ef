"""Executes a run: from its config to a trained, saved and evaluated adapter."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import EarlyStoppingCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from ..errors import PeanutError
from ..files import make_folder, read_json, write_folder, write_json
from .callbacks import Progress, RunLog, plot
from .config import load_config
from .evaluation import evaluate, metrics_of
from .folder import RunFolder
from .lock import alone
from .metrics import LOWER_IS_BETTER
from .model import build_model, fitted_data, save_task
from .plan import Plan, make_plan
from .prepare import best_metric, encode, make_task, run_rows
from .sections import RunConfig
from .tasks import TASKS, Task, TextTask
from .trainer import Trainer

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
    make_folder(folder.path)
    # Of the processes of one distributed run the first one has the folder for all of them.
    with alone(folder.path) if os.environ.get("RANK", "0") == "0" else nullcontext():
        return _train(config, folder, overwrite, quiet)


def _train(config: RunConfig, folder: RunFolder, overwrite: bool, quiet: bool) -> RunResult:
    """Trains, in a folder that no other run uses."""
    if not overwrite:
        folder.check(config)
        if folder.finished:
            return _result(folder, "finished")
    task = make_task(config)
    processor = task.load_processor(config.model.path, config.model.revision)
    train_rows, eval_rows = run_rows(config, task, processor)
    set_seed(config.training.seed)
    model = build_model(config, task, processor)
    train_set = encode(task, train_rows, processor, config.data.train)
    eval_set = encode(task, eval_rows, processor, config.data.eval or config.data.train) if eval_rows else None
    arguments = _arguments(config, task, evaluates=eval_set is not None)
    # Nothing was written or deleted so far: a mistake in the config or the data costs no earlier run.
    with arguments.main_process_first(local=False):
        checkpoint = folder.begin(config, overwrite) if arguments.process_index == 0 else folder.latest()
    trainer = Trainer(
        model=model,
        args=arguments,
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
    if trainer.is_world_process_zero():
        _write(folder, config, task, trainer, seconds)
    trainer.accelerator.wait_for_everyone()
    return _result(folder, "resumed" if checkpoint else "trained")


def _write(folder: RunFolder, config: RunConfig, task: Task, trainer: Trainer, seconds: float) -> None:
    """Writes what a finished run leaves: its curve, the adapter, and last its metrics."""
    state, model = trainer.state, trainer._adapted()
    assert model is not None
    plot(state.log_history, best_metric(config, task), folder.curve)

    def write(path: Path) -> None:
        model.save_pretrained(path)
        save_task(path, task, trainer.processing_class)

    shutil.rmtree(folder.adapter, ignore_errors=True)  # of a run that was killed before its metrics were written
    write_folder(folder.adapter, write)
    step = (state.best_global_step or state.global_step) if trainer.eval_dataset is not None else state.global_step
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


def plan(config: Source) -> Plan:
    """What ``train`` would do with ``config``: data and names are checked, no weight is loaded, nothing is written.

    Raises:
        PeanutError: as for ``train``.
    """
    config = _config(config)
    task = make_task(config)
    processor = task.load_processor(config.model.path, config.model.revision)
    train_rows, eval_rows = run_rows(config, task, processor)
    return make_plan(config, task, processor, len(train_rows), 0 if eval_rows is None else len(eval_rows))


def _config(config: Source) -> RunConfig:
    """The run, with the model's length where it leaves that open."""
    run = config if isinstance(config, RunConfig) else load_config(config)
    if not issubclass(TASKS[run.task], TextTask):
        return run
    with suppress(PeanutError):  # a model that cannot be read is told where it is needed
        run = run.model_copy(update={"data": fitted_data(run.data, run.model.path, run.model.revision)})
    return run


_CHECKPOINTING: Any = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)
"""The name of the option in the installed transformers: the second before it was renamed."""


def _arguments(config: RunConfig, task: Task, *, evaluates: bool) -> TrainingArguments:
    """The run's settings in transformers' words."""
    training = config.training
    metric = best_metric(config, task)
    when = "epoch" if training.eval_every == "epoch" else "steps"
    every = 0 if training.eval_every == "epoch" else training.eval_every
    checkpointing: dict[str, Any] = {_CHECKPOINTING: training.gradient_checkpointing}
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
        use_cpu=not torch.accelerator.is_available(),  # else transformers refuses bfloat16 there
        bf16=training.precision == "bfloat16",
        fp16=training.precision == "float16",
        **checkpointing,
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


def _metrics_at(history: list[dict[str, Any]], step: int) -> dict[str, float]:
    found = [entry for entry in history if entry.get("step") == step and "eval_loss" in entry]
    return metrics_of(found[-1]) if found else {}


_KEPT: dict[str, type | tuple[type, ...]] = {
    "metrics": dict,
    "step": int,
    "steps": int,
    "trained_parameters": int,
    "dropped_rows": int,
    "seconds": (int, float),
}
"""What ``metrics.json`` holds."""


def _result(folder: RunFolder, status: Literal["trained", "resumed", "finished"]) -> RunResult:
    """What a finished run left; its files may have been damaged since."""
    found = read_json(folder.metrics)
    whole = isinstance(found, dict) and found.keys() == _KEPT.keys()
    whole = whole and all(isinstance(found[name], kind) for name, kind in _KEPT.items())
    if not whole or not all(isinstance(value, int | float) for value in found["metrics"].values()):
        raise PeanutError(
            f"'{folder.metrics}' is damaged",
            f"{', '.join(_KEPT)} of a finished run",
            "delete it to finish the run again, or pass --overwrite to begin anew",
        )
    if not folder.adapter.is_dir():
        raise PeanutError(
            f"'{folder.path}' holds a finished run without its adapter",
            f"the folder '{folder.adapter.name}'",
            f"delete '{folder.metrics.name}' to finish the run again, or pass --overwrite to begin anew",
        )
    return RunResult(output=folder.path, adapter=folder.adapter, status=status, **found)
