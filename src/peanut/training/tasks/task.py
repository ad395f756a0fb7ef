"""The interface of a task: data columns, model inputs, head and metrics."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...errors import PeanutError
from ...protocols import TaskType
from ..foreign import foreign_errors
from ..sections import DataSection

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import EvalPrediction, PreTrainedConfig

__all__ = ["Task", "TextTask"]


class Task(ABC):
    """One kind of training.

    A run calls, in this order: ``learn`` on the training rows, ``check`` on the evaluation rows, ``load_processor``,
    ``fit`` with the model's config, ``encode`` on both, and gives the Trainer ``collator``, ``reduce`` and ``metrics``.

    Args:
        data: the names of the columns.
        labels: the classes in the order of their ids, if they are known already.
    """

    name: ClassVar[str]
    model_class: ClassVar[str]
    """Name of the Auto class of transformers that makes the model."""
    task_type: ClassVar[TaskType | None]
    metric_names: ClassVar[tuple[str, ...]]
    """The metrics; the first one decides which checkpoint is the best unless the config says otherwise."""

    has_classes: ClassVar[bool] = False
    """Whether the answer is a class, so that ``labels`` names all of them."""

    packs: ClassVar[bool] = False
    """Whether rows are joined and cut into pieces, so that splits and limits count pieces."""

    def __init__(self, data: DataSection, labels: Sequence[str] = ()) -> None:
        self.data = data
        self.labels = list(labels)
        self.dropped = 0
        """Rows left out because nothing of them could be learned within ``max_length``."""

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Columns that are text even where they look like numbers."""
        return ()

    @property
    def trains_head(self) -> bool:
        """Whether a head on top of the base model is trained beside the adapter."""
        return False

    @abstractmethod
    def check(self, rows: Dataset, source: str) -> None:
        """Checks the columns and values of ``rows``.

        Raises:
            PeanutError: a column is missing or does not hold what the task needs.
        """

    def learn(self, rows: Dataset, source: str) -> None:
        """Checks the training rows and learns from them what evaluation must agree with."""
        self.check(rows, source)

    def fit(self, config: PreTrainedConfig, processor: Any) -> None:  # noqa: B027 - most tasks fit as they are
        """Writes what the task needs (classes, padding) into the model's config.

        Raises:
            PeanutError: the model does not fit the task.
        """

    @abstractmethod
    def load_processor(self, path: str | Path, revision: str | None = None) -> Any:
        """The tokenizer or image processor in a model's folder."""

    @abstractmethod
    def encode(self, rows: Dataset, processor: Any, source: str) -> Dataset:
        """The rows as inputs of the model."""

    @abstractmethod
    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """What makes a batch of encoded rows."""

    @abstractmethod
    def example(self, config: PreTrainedConfig, batch_size: int) -> dict[str, Tensor]:
        """A batch of the largest size that training can meet, to estimate memory with; the values mean nothing."""

    @abstractmethod
    def reduce(self, logits: Any, labels: Tensor) -> Tensor:
        """What the metrics need of a batch's logits: small, so that evaluation keeps no logits."""

    @abstractmethod
    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The task's metrics from what ``reduce`` kept."""


def positions(config: PreTrainedConfig) -> int | None:
    """How many tokens a model has positions for, ``None`` for any number."""
    count = getattr(config.get_text_config(), "max_position_embeddings", None)
    return count - _first_position(config) if isinstance(count, int) else None


def _first_position(config: PreTrainedConfig) -> int:
    """Where a model's positions begin: behind the padding's if their embedding has one, as RoBERTa's."""
    import transformers

    short = copy.deepcopy(config)
    short.num_hidden_layers = 1
    try:
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(short)
    except Exception:  # the Auto class knows no such model, or none with one layer: its positions begin at 0
        return 0
    named = (module for path, module in model.named_modules() if path.rpartition(".")[2] == "position_embeddings")
    padding = [index for module in named if (index := getattr(module, "padding_idx", None)) is not None]
    return padding[0] + 1 if padding else 0


class TextTask(Task):
    """A task whose input is text."""

    def load_processor(self, path: str | Path, revision: str | None = None) -> Any:
        from transformers import AutoTokenizer

        with foreign_errors(f"'{path}' has no tokenizer", "a model's folder with one", "copy it"):
            tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise PeanutError(f"the tokenizer of '{path}' has no padding token", "one, or an end token", "set one")
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def fit(self, config: PreTrainedConfig, processor: Any) -> None:
        longest = positions(config)
        if longest is not None and self.data.max_length > longest:
            raise PeanutError(
                f"data.max_length is {self.data.max_length}", f"at most the model's {longest}", "lower data.max_length"
            )
        if config.pad_token_id is None:
            config.pad_token_id = processor.pad_token_id
