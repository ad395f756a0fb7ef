"""The checkpoints of a run: which are whole, and whether training can go on from one of them exactly."""

from __future__ import annotations

import json
import os
import zipfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import PeanutError, warn
from .foreign import foreign_errors

__all__ = [
    "check_complete",
    "check_optimizer",
    "check_scheduler",
    "is_whole",
    "reading",
    "restore_best",
    "whole_checkpoints",
]

STATE_NAME = "trainer_state.json"
_OF_PARAMETERS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "sum"}
"""What torch's optimisers keep in the shape of the parameter."""


_INSTEAD = ("a whole checkpoint", "delete it to go on from the one before, or begin anew")


def whole_checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints of a run that were written to their end, oldest first."""
    folders = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    steps = {
        int(folder.name.rpartition("-")[2]): folder for folder in folders if folder.name.rpartition("-")[2].isdigit()
    }
    return [folder for _, folder in sorted(steps.items()) if is_whole(folder)]


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: the Trainer writes ``trainer_state.json`` last."""
    try:
        state = json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(state, dict) and checkpoint.name == f"{PREFIX_CHECKPOINT_DIR}-{state.get('global_step')}"


def check_complete(checkpoint: Path, *, processes: int, model_only: bool) -> None:
    """Checks that a checkpoint has what going on from it exactly needs.

    Args:
        checkpoint: its folder.
        processes: how many go on.
        model_only: the checkpoints of this training have no optimiser by choice; what is missing is then a warning.

    Raises:
        PeanutError: it has no optimiser, scheduler or random state, or no whole ``trainer_state.json``.
    """
    if not (checkpoint / STATE_NAME).is_file():
        raise refused(checkpoint, f"it lacks {STATE_NAME}")
    with reading(checkpoint, STATE_NAME):
        state = TrainerState.load_from_json(str(checkpoint / STATE_NAME))
        counts = (state.global_step, state.max_steps, state.num_input_tokens_seen, state.best_global_step or 0)
        numbers = (*counts, state.epoch, state.total_flos, state.best_metric or 0)
        history, callbacks = state.log_history, state.stateful_callbacks
        if not all(_is_number(number) for number in numbers) or not all(isinstance(count, int) for count in counts):
            raise ValueError("a step, epoch or metric is no number")
        if not isinstance(history, list) or not all(isinstance(e, dict) and _is_number(e.get("step")) for e in history):
            raise ValueError("log_history is no list of entries with their step")
        if not isinstance(callbacks, dict) or not isinstance(state.best_model_checkpoint, str | None):
            raise ValueError("stateful_callbacks or best_model_checkpoint is of another type")
    random = "rng_state.pth" if processes == 1 else "rng_state_0.pth"
    missing = [name for name in ("optimizer.pt", "scheduler.pt", random) if not (checkpoint / name).is_file()]
    if missing == [random] and any(checkpoint.glob("rng_state*.pth")):
        warn(f"'{checkpoint}' was written by another number of processes: random states begin anew")
    elif missing and model_only:
        warn(f"'{checkpoint}' lacks {', '.join(missing)} (save_only_model): they begin anew")
    elif missing:
        raise refused(checkpoint, f"it lacks {', '.join(missing)}")
    for path in (checkpoint / name for name in ("optimizer.pt", "scheduler.pt", random)):
        if path.is_file() and not zipfile.is_zipfile(path):
            raise refused(checkpoint, f"{path.name} ({path.stat().st_size:,} bytes) is no archive of torch's")


def reading(checkpoint: Path, name: str) -> AbstractContextManager[None]:
    """Turns whatever a damaged file of a checkpoint raises into one line."""
    return foreign_errors(f"cannot go on from '{checkpoint}': {name} is damaged or of another run", *_INSTEAD)


def restore_best(state: TrainerState, checkpoint: Path, output: Path) -> None:
    """Finds the best checkpoint beside the one that training goes on from: the run's folder may have moved.

    Args:
        state: the state read from ``checkpoint``; transformers leaves the best one out where it does not find it.
        checkpoint: what training goes on from.
        output: the folder of the checkpoints to come.
    """
    best = TrainerState.load_from_json(str(checkpoint / STATE_NAME)).best_model_checkpoint
    if best is None:
        return
    folder = output if output.is_dir() and output.samefile(checkpoint.parent) else checkpoint.parent
    beside = folder / Path(best).name
    if is_whole(beside):
        state.best_model_checkpoint = str(beside)
    elif state.best_model_checkpoint is None:
        warn(f"the best checkpoint '{best}' is gone: the best of the steps to come is kept")
        state.best_metric = state.best_global_step = None


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Checks that an optimiser has what it keeps of each parameter, in its shape: torch looks only at their number.

    Raises:
        ValueError: it has not.
    """
    kind = type(getattr(optimizer, "optimizer", optimizer))  # accelerate wraps it
    if issubclass(kind, torch.optim.Adam | torch.optim.AdamW) and not optimizer.state:
        raise ValueError("the optimiser's state is empty")
    for parameter, state in optimizer.state.items():
        for name in _OF_PARAMETERS & state.keys():
            value = state[name]
            if value is not None and getattr(value, "shape", None) != parameter.shape:
                found = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
                raise ValueError(f"{name} is {found} for a parameter of {tuple(parameter.shape)}")


def check_scheduler(scheduler: Any, step: int, groups: int) -> None:
    """Checks that a schedule fits the checkpoint: it takes any dictionary for its state.

    Args:
        scheduler: it, with the state that was read.
        step: the checkpoint's step, beyond which it cannot be.
        groups: how many groups of parameters there are.

    Raises:
        ValueError: it does not fit.
    """
    at, rates = getattr(scheduler, "last_epoch", 0), getattr(scheduler, "base_lrs", [0.0] * groups)
    if type(at) is not int or not 0 <= at <= step:
        raise ValueError(f"the schedule stands at step {at!r}, and the checkpoint at {step}")
    if not isinstance(rates, list) or len(rates) != groups or not all(_is_number(rate) for rate in rates):
        raise ValueError(f"the schedule's base_lrs are no {groups} learning rates")


def refused(checkpoint: Path, why: str) -> PeanutError:
    """The error that a checkpoint cannot be gone on from."""
    return PeanutError(f"cannot go on from '{checkpoint}': {why}", *_INSTEAD)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
