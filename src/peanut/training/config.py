"""The description of a run: one YAML file, every key of which is also a flag."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from ..errors import PeanutError, nearest

__all__ = [
    "AdapterSection",
    "DataSection",
    "ModelSection",
    "RunConfig",
    "TaskName",
    "TrainingSection",
    "differing_keys",
    "load_config",
    "parse_yaml",
    "to_yaml",
]

TaskName = Literal["text-classification", "text-regression", "causal-lm", "instruction", "image-classification"]
"""What can be trained."""


def _part_or_whole(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError("Input should be a part below 1, or a whole number of steps")
    return value


class Section(BaseModel):
    """A part of the run's description; a key that it does not know is an error."""

    model_config = ConfigDict(extra="forbid")


class ModelSection(Section):
    """The frozen base model.

    Args:
        path: a local folder, or a hub id ``owner/name``.
        dtype: what the frozen weights are kept in; ``auto`` is what the checkpoint holds.
        revision: revision on the hub.
    """

    path: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    revision: str | None = None


class DataSection(Section):
    """The data, and the names of its columns.

    Args:
        train: a CSV, TSV, JSONL, JSON, Parquet or (causal-lm) text file, an image folder with one folder a class, or a
            hub dataset ``owner/name`` or ``owner/name:split``.
        eval: the same for evaluation; a part of the training data if not given.
        subset: the configuration of a hub dataset.
        eval_fraction: the part that is split off for evaluation when ``eval`` is not given; 0 for none.
        limit, eval_limit: at most so many rows, drawn at random with the run's seed.
        text, text_pair: the sentence, and the second one if the task is about pairs.
        label: the class (whole numbers or names), or the number to predict.
        image: the picture, in a dataset with columns.
        messages: chat messages, a list of ``{role, content}``.
        prompt, completion: the question and its answer.
        instruction, input, output: the same in three parts, ``input`` optional.
        template: how instruction data becomes text: the tokenizer's ``chat`` template, or ``plain`` (the parts one
            after the other with an empty line between). ``auto`` is ``chat`` where the tokenizer has a template.
        max_length: longest sequence in tokens: longer texts are cut, plain text is packed to this length.
    """

    train: str
    eval: str | None = None
    subset: str | None = None
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    limit: Annotated[int, Field(ge=1)] | None = None
    eval_limit: Annotated[int, Field(ge=1)] | None = None
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    image: str = "image"
    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    instruction: str | None = None
    input: str | None = None
    output: str | None = None
    template: Literal["auto", "chat", "plain"] = "auto"
    max_length: Annotated[int, Field(ge=2)] = 256


class AdapterSection(BaseModel):
    """The method, and the fields of its config class as further keys (``r``, ``target_modules``, …).

    Args:
        peft_type: the method's name.
    """

    model_config = ConfigDict(extra="allow")

    peft_type: str = "PEANUT"


class TrainingSection(Section):
    """How to train.

    Args:
        epochs: passes over the data.
        steps: optimiser steps; overrides ``epochs``.
        batch_size, eval_batch_size: rows a step and device; evaluation takes ``batch_size`` if not given.
        gradient_accumulation: steps whose gradients are added up before the optimiser moves.
        learning_rate: of the adapter.
        head_learning_rate: of the modules trained whole (the classifier); that of the adapter if not given.
        schedule: course of the learning rates after the warm-up.
        warmup: steps in which the learning rates rise from zero; below 1, that part of all steps.
        weight_decay: AdamW's; biases and norms are left out.
        max_grad_norm: gradients are scaled down to this norm; 0 to leave them.
        seed: of the head's start, the order of the data, dropout and the split.
        precision: the dtype of the computation (autocast); float32 leaves every layer its own dtype.
        gradient_checkpointing: recompute activations in the backward, for memory.
        eval_every: evaluate and save after so many steps, or after each ``epoch``.
        log_every: report the loss after so many steps.
        save_total: checkpoints kept: the newest ones and the best.
        metric_for_best: which metric decides; the task's own if not given.
        patience: stop when the metric has not improved for so many evaluations.
    """

    epochs: Annotated[float, Field(gt=0)] = 3.0
    steps: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 16
    eval_batch_size: Annotated[int, Field(ge=1)] | None = None
    gradient_accumulation: Annotated[int, Field(ge=1)] = 1
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    head_learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: Annotated[float, Field(ge=0), AfterValidator(_part_or_whole)] = 0.06
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    gradient_checkpointing: bool = False
    eval_every: Annotated[int, Field(ge=1)] | Literal["epoch"] = "epoch"
    log_every: Annotated[int, Field(ge=1)] = 10
    save_total: Annotated[int, Field(ge=1)] = 2
    metric_for_best: str | None = None
    patience: Annotated[int, Field(ge=1)] | None = None


class RunConfig(Section):
    """A run: which model, task, data, adapter and training, and the folder that receives everything.

    Args:
        model, data, adapter, training: the sections.
        task: what is trained.
        output: the run's folder.
    """

    model: ModelSection
    task: TaskName
    data: DataSection
    adapter: AdapterSection = Field(default_factory=AdapterSection)
    training: TrainingSection = Field(default_factory=TrainingSection)
    output: str


def load_config(
    source: str | os.PathLike[str] | Mapping[str, Any] | None = None, overrides: Mapping[str, Any] | None = None
) -> RunConfig:
    """The run that a YAML file (or a dictionary) describes, with single keys replaced.

    Args:
        source: the file; may be left out if ``overrides`` says everything.
        overrides: dotted key → value, as in ``{"training.epochs": 3}``.

    Raises:
        PeanutError: the file is missing or not YAML, a key is unknown or missing, or a value is out of range.
    """
    values: dict[str, Any] = {}
    name = "the flags"
    if isinstance(source, Mapping):
        values, name = _copy(source), "the config"
    elif source is not None:
        values, name = _read(Path(source)), f"'{source}'"
    for key, value in (overrides or {}).items():
        _put(values, key, value)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise _one_line(error.errors()[0], name) from None


def to_yaml(config: RunConfig) -> str:
    """The run as YAML, every key with its value."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def parse_yaml(text: str) -> Any:
    """The value that ``text`` writes in YAML; numbers such as ``1e-3`` are numbers.

    Raises:
        PeanutError: it is not YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - it is a SafeLoader
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise PeanutError(f"not YAML: {reason}", "key: value lines", "correct it") from None


def differing_keys(old: RunConfig, new: RunConfig) -> list[str]:
    """The dotted keys whose values differ between two runs."""
    left, right = dict(_flat(old.model_dump(mode="json"))), dict(_flat(new.model_dump(mode="json")))
    return [key for key in {**left, **right} if left.get(key) != right.get(key)]


class _Loader(yaml.SafeLoader):
    """YAML with YAML 1.2's floats: PyYAML alone reads 1e-3 as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise PeanutError(f"cannot read '{path}': {reason}", "a YAML file", "check the path") from None
    try:
        values = parse_yaml(text)
    except PeanutError as error:
        raise PeanutError(f"'{path}' is {error.found}", error.expected, error.do) from None
    if not isinstance(values, dict):
        raise PeanutError(
            f"'{path}' holds no keys", "sections model, task, data, adapter, training, output", "write them"
        )
    return values


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = values.get(section)
        if not isinstance(inner, dict):
            inner = values[section] = {}
        values = inner
    values[last] = value


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and (value or prefix == ""):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _one_line(error: ErrorDetails, name: str) -> PeanutError:
    """pydantic's finding as one line, with the nearest key for a mistyped one."""
    key, section = _place(error["loc"])
    expected = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    do = f"change {key}"
    if error["type"] == "extra_forbidden":
        prefix, _, last = key.rpartition(".")
        known = [f"{prefix}.{field}" if prefix else field for field in section.model_fields]
        sections = {field: _section(info.annotation) for field, info in RunConfig.model_fields.items()}
        elsewhere = [f"{field}.{last}" for field, inner in sections.items() if inner and last in inner.model_fields]
        do = f"nearest: {nearest(elsewhere[0] if elsewhere else key, elsewhere or known)}"
        return PeanutError(f"{name} has the key {key!r}", "a known key", do)
    if error["type"] == "missing":
        inner = _section(section.model_fields[key.rpartition(".")[2]].annotation)
        if inner is not None:
            key += "." + next(field for field, info in inner.model_fields.items() if info.is_required())
        return PeanutError(f"{name} has no key {key!r}", f"a value for {key}", f"add it, or give --{key} VALUE")
    if error["type"] == "model_type":
        inner = _section(section.model_fields[key.rpartition(".")[2]].annotation)
        expected = "a section with keys such as " + ", ".join(list(inner.model_fields)[:3]) if inner else expected
    elif key == "task":
        expected = "one of " + ", ".join(get_args(TaskName))
        do = f"nearest: {nearest(str(error['input']), get_args(TaskName), 1)}"
    elif key == "training.eval_every":
        expected = "a whole number of at least 1, or 'epoch'"
    return PeanutError(f"{key} is {error['input']!r}", expected, do)


def _place(location: tuple[int | str, ...]) -> tuple[str, type[BaseModel]]:
    """The dotted key at pydantic's location, less the names of union members, and the model that holds it."""
    model: type[BaseModel] = RunConfig
    keys: list[str] = []
    for part in map(str, location):
        keys.append(part)
        inner = _section(model.model_fields[part].annotation) if part in model.model_fields else None
        if inner is None or len(keys) == len(location):
            break
        model = inner
    return ".".join(keys), model


def _section(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
