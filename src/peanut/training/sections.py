"""The sections of a run's config: every key with its type and default."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

__all__ = [
    "AdapterSection",
    "DataSection",
    "ModelSection",
    "RunConfig",
    "TaskName",
    "TrainingSection",
]

TaskName = Literal["text-classification", "text-regression", "causal-lm", "instruction", "image-classification"]
"""What can be trained."""


def _part_or_whole(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError("Input should be a part below 1, or a whole number of steps")
    return value


def _takes_number(hint: Any) -> bool:
    """Whether an annotation is of a number, which pydantic makes of True and False too."""
    return hint in (int, float) or any(map(_takes_number, get_args(hint)))


class Section(BaseModel):
    """A part of the run's description; a key that it does not know is an error."""

    model_config = ConfigDict(extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and _takes_number(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("Input should be a number")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError("Input should be a number of at most 18 digits")
        if isinstance(value, str) and ("\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value)):
            raise ValueError("Input should be text that a file can hold: no NUL, no half of a character")
        return value


class ModelSection(Section):
    """The frozen base model.

    Args:
        path: a local folder, or a hub id ``owner/name``.
        dtype: what the frozen weights are loaded in; ``auto`` is what the checkpoint holds.
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
        max_length: longest sequence in tokens: longer texts are cut, plain text is packed to this length. If not given,
            it is no more than the model has positions for.
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

    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3.0
    steps: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 16
    eval_batch_size: Annotated[int, Field(ge=1)] | None = None
    gradient_accumulation: Annotated[int, Field(ge=1)] = 1
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    head_learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: Annotated[float, Field(ge=0, allow_inf_nan=False), AfterValidator(_part_or_whole)] = 0.06
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
    output: Annotated[str, Field(pattern=r"\S")]
