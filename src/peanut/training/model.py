"""Loads the base model of a run for its task and adds the adapter, or loads both from a trained adapter."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import PeanutError
from ..files import read_json, write_json
from ..model.auto import resize_to, rows_for
from ..model.checkpoints.tensor_files import open_tensors
from ..model.peft_model import PeftModel, get_peft_model
from ..protocols import PeftConfig, TaskType
from ..protocols.config import CONFIG_NAME
from .config import data_section
from .foreign import foreign_errors
from .sections import AdapterSection, DataSection, RunConfig
from .tasks import TASKS, CausalLM, Task, TextClassification, positions

__all__ = ["Trained", "build_model", "empty_base", "load_base", "load_trained", "model_config", "save_task"]

TASK_NAME = "task.json"
_WHERE = {"train", "eval", "subset", "eval_fraction", "limit", "eval_limit"}
"""Keys of the data section that say where rows come from, not how they are read."""


@dataclass(frozen=True)
class Trained:
    """A trained adapter, ready to use.

    Args:
        model: the base with the adapter in it.
        task: what it was trained for.
        processor: its tokenizer or image processor.
        folder: the adapter's folder.
        base: path or hub id of the base.
    """

    model: PeftModel
    task: Task
    processor: Any
    folder: Path
    base: str


def model_config(path: str, task: Task, processor: Any, revision: str | None = None) -> PreTrainedConfig:
    """The base model's config, with what the task needs in it.

    Raises:
        PeanutError: there is no model, or it does not fit the task.
    """
    config = _read_config(path, revision)
    task.fit(config, processor)
    return config


def empty_base(task: Task, config: PreTrainedConfig, dtype: torch.dtype, path: str) -> PreTrainedModel:
    """The base model of a config, without weights."""
    with _loading(path), torch.device("meta"):
        model: PreTrainedModel = getattr(transformers, task.model_class).from_config(config, dtype=dtype)
    return model


def load_base(
    path: str, task: Task, processor: Any, dtype: str = "auto", revision: str | None = None
) -> tuple[PreTrainedModel, list[str]]:
    """The base model with the task's head, and the modules that are to be trained whole.

    Raises:
        PeanutError: there is no model, it does not fit the task, or its checkpoint lacks more than a head.
    """
    config = model_config(path, task, processor, revision)
    model_class = getattr(transformers, task.model_class)
    with _loading(path):
        model, report = model_class.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            revision=revision,
            ignore_mismatched_sizes=task.trains_head,
            output_loading_info=True,
        )
    missing = set(report["missing_keys"]) | {entry[0] for entry in report["mismatched_keys"]}
    heads = head_names(model) if task.trains_head else []
    # A pooler that the checkpoint lacks starts at random, so it is trained like the head.
    poolers = sorted({key.rpartition(".")[0] for key in missing if heads and ".pooler." in key})
    lacking = sorted(key for key in missing if not _inside(key, [*heads, *poolers]))
    if lacking:
        raise PeanutError(
            f"the checkpoint '{path}' lacks {', '.join(lacking[:3])}{', …' if len(lacking) > 3 else ''}",
            f"the weights of {type(model).__name__}",
            "choose a model of that kind, or another task",
        )
    return model, [*heads, *poolers]


def head_names(model: PreTrainedModel) -> list[str]:
    """The modules on top of the base: what has parameters and is not the base itself."""
    on_top = {name: child for name, child in model.named_children() if name != model.base_model_prefix}
    return [name for name, child in on_top.items() if next(child.parameters(), None) is not None]


def adapter_config(section: AdapterSection, task: Task, path: str, heads: Iterable[str]) -> PeftConfig:
    """The method's config that a run's ``adapter`` section describes.

    Raises:
        PeanutError: the method or a field is unknown, or a value is out of range.
    """
    values = section.model_dump()
    values["task_type"] = values.get("task_type") or task.task_type
    values["base_model_name_or_path"] = path
    names = [*(values.get("modules_to_save") or []), *heads]
    values["modules_to_save"] = sorted(set(names)) or None
    return PeftConfig.from_dict(values, source="the section adapter")


def build_model(config: RunConfig, task: Task, processor: Any) -> PeftModel:
    """The model that a run trains: the frozen base, the adapter, and the task's head."""
    base, heads = load_base(config.model.path, task, processor, config.model.dtype, config.model.revision)
    return get_peft_model(base, adapter_config(config.adapter, task, config.model.path, heads))


def save_task(folder: Path, task: Task, processor: Any) -> None:
    """Writes what ``load_trained`` needs beside an adapter: the task, and its tokenizer or image processor."""
    processor.save_pretrained(folder)
    data = task.data.model_dump(exclude=_WHERE)
    write_json(folder / TASK_NAME, {"task": task.name, "labels": task.labels, "data": data})


def load_trained(adapter: str | os.PathLike[str], base_model: str | None = None, dtype: str = "auto") -> Trained:
    """A trained adapter on its base, from the adapter's folder or the run's.

    Args:
        adapter: the folder.
        base_model: the base's folder or hub id; the one that the adapter names if not given.
        dtype: what the base is loaded in.

    Raises:
        PeanutError: something is missing or does not fit.
    """
    folder = Path(adapter)
    if not (folder / CONFIG_NAME).is_file() and (folder / "adapter" / CONFIG_NAME).is_file():
        folder = folder / "adapter"
    config = PeftConfig.from_pretrained(folder)
    path = base_model or config.base_model_name_or_path
    if not path:
        raise PeanutError(f"the adapter '{folder}' names no base model", "its folder or hub id", "give --base-model")
    task = _task_of(folder, config, path)
    has_processor = any((folder / name).is_file() for name in ("tokenizer_config.json", "preprocessor_config.json"))
    processor = task.load_processor(folder if has_processor else path)
    revision = None if base_model else config.revision
    base, _ = load_base(path, task, processor, dtype, revision)
    if (folder / "tokenizer_config.json").is_file():
        resize_to(base, rows_for(base, folder, len(processor)))
    return Trained(PeftModel.from_pretrained(base, folder), task, processor, folder, path)


def _task_of(folder: Path, config: PeftConfig, base: str) -> Task:
    """The task that a folder records or, for an adapter from elsewhere, that its config and its head imply."""
    if (folder / TASK_NAME).is_file():
        task, kind = _read_task(folder / TASK_NAME), config.task_type
        if {task.task_type, kind} == {TaskType.CAUSAL_LM, TaskType.SEQ_CLS}:
            raise PeanutError(
                f"'{folder / TASK_NAME}' names the task {task.name} and {CONFIG_NAME} {TaskType(kind).value}",
                "one adapter's files",
                "copy them together, or train again",
            )
        return task
    kind = str(getattr(config.task_type, "value", config.task_type))
    if kind == "CAUSAL_LM":
        return CausalLM(_default_data(base))
    if kind == "SEQ_CLS":
        return TextClassification(_default_data(base), [f"LABEL_{index}" for index in range(_classes(folder))])
    raise PeanutError(
        f"'{folder}' has no {TASK_NAME} and its config the task {kind}",
        "an adapter that peanut train wrote",
        "train it",
    )


def _read_task(path: Path) -> Task:
    """The task that ``save_task`` wrote; nothing in the file is believed."""
    stored = read_json(path)
    name = stored.get("task") if isinstance(stored, dict) else None
    if not isinstance(name, str) or name not in TASKS:
        raise PeanutError(f"'{path}' names no task", f"one of {', '.join(TASKS)}", "train again")
    labels, data = stored.get("labels"), stored.get("data")
    classes = TASKS[name].has_classes
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise PeanutError(f"'{path}' has no list of labels", "the names of the classes", "train again")
    if classes != bool(labels) or len(set(labels)) < len(labels):
        raise PeanutError(f"'{path}' has {len(labels)} labels for {name}", "each class once", "train again")
    if not isinstance(data, dict):
        raise PeanutError(f"'{path}' does not say how data is read", "its section data", "train again")
    return TASKS[name](data_section(data, f"'{path}'"), labels)


def _default_data(base: str) -> DataSection:
    """The data section's defaults, as far as the base model reaches."""
    return fitted_data(DataSection(train=""), base)


def fitted_data(data: DataSection, base: str, revision: str | None = None) -> DataSection:
    """The data section with a ``max_length`` that nobody gave lowered to what the base model has positions for."""
    longest = None if "max_length" in data.model_fields_set else positions(_read_config(base, revision))
    if longest is None or longest >= data.max_length:
        return data
    return data.model_copy(update={"max_length": longest})


def _classes(folder: Path) -> int:
    """How many classes the stored head tells apart."""
    with open_tensors(folder / "adapter_model.safetensors") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    rows = [shape[0] for key, shape in shapes.items() if shape and (".classifier." in key or ".score." in key)]
    if not rows:
        raise PeanutError(f"the adapter '{folder}' holds no classifier", "a trained head", "train one")
    return int(min(rows))


def _read_config(path: str, revision: str | None = None) -> PreTrainedConfig:
    with _loading(path):
        config: PreTrainedConfig = transformers.AutoConfig.from_pretrained(path, revision=revision)
    return config


def _inside(key: str, paths: Iterable[str]) -> bool:
    return any(key == path or key.startswith(f"{path}.") for path in paths)


def _loading(path: str) -> AbstractContextManager[None]:
    return foreign_errors(f"cannot load the model '{path}'", "a model's folder or a hub id", "check model.path")
